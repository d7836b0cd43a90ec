"""The validation loss of a model, on a split or an evenly spread part of it."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import torch

from ..data.batches import eval_batches
from ..data.shards import Split, evenly
from ..data.tokenizer import Tokenizer
from ..model.gpt import GPT
from ..training import processes


@torch.inference_mode()
def validate(
    model: GPT,
    split: Split,
    *,
    context: int,
    micro_batch: int,
    document_mask: bool,
    here: processes.Processes | None = None,
    autocast=contextlib.nullcontext,
) -> tuple[float, float]:
    """(loss in nats per token, bits per character) on the whole split. With `here`, the processes share the work."""
    device = model.embedding.device
    nll = torch.zeros(2, dtype=torch.float64, device=device)  # sum, tokens
    for i, batch in enumerate(eval_batches(split, context=context, micro_batch=micro_batch, document_mask=document_mask)):
        if here is None or i % here.world_size == here.rank:
            tokens, targets, cu_seqlens, *_ = batch.on(device)
            with autocast():
                loss = model(tokens, targets, cu_seqlens=cu_seqlens, reduction="sum")
            nll += torch.stack([loss.double(), (targets >= 0).sum().double()])
    nats, n_tokens = (nll if here is None else processes.total(nll)).tolist()
    return nats / n_tokens, nats / math.log(2) / split.characters


def part(split: Split, tokenizer: Tokenizer, n_documents: int) -> Split:
    """A split in memory with `n_documents` of the split, evenly spread, or the split itself if it has no more."""
    if split.n_documents <= n_documents:
        return split
    places = [np.arange(*split.starts[i : i + 2]) for i in evenly(split.n_documents, n_documents)]
    documents, learnt = ([take(place) for place in places] for take in (split.take, split.is_learnt))
    starts = np.cumsum([0, *map(len, documents)])
    return replace(
        split,
        n_tokens=int(starts[-1]),
        n_documents=len(documents),
        characters=sum(len(tokenizer.decode(document[flags].tolist())) for document, flags in zip(documents, learnt, strict=True)),
        entropy_bits=None,
        starts=starts,
        shards=(np.concatenate(documents),),
        learnt=None if split.learnt is None else (np.concatenate(learnt),),
    )
