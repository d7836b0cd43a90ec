"""Direct preference optimization (arXiv 2305.18290): of two answers the chosen one shall become more likely than the rejected one.

    h = β (log p(chosen) − log p_ref(chosen) − log p(rejected) + log p_ref(rejected))        loss = −log σ(h)

A reward of an answer is β (log p − log p_ref). The reference is the model that training starts with. Its log-probabilities are computed
once and stored beside the pairs, so there is no second model in memory.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.files import atomic_file
from ..data.batches import pair_batches
from ..data.shards import Split
from ..model.checkpoint import load_tensors, save_tensors
from .config import DPOConfig
from .processes import Processes, barrier, total

STATISTICS = ("dpo_loss", "chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy", "chosen_logp", "rejected_logp")


def answer_log_probs(nll: Tensor, targets: Tensor, cu_seqlens: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    """The sum of log p over the targets of each answer, and their number: (n_pairs, 2) each, chosen and rejected. `nll` and `targets` are
    (1, N), in the layout of `PairBatches`."""
    n = targets.shape[1]
    document = torch.searchsorted(cu_seqlens, torch.arange(n, device=targets.device), right=True, out_int32=True) - 1
    is_learnt = (targets[0] >= 0).to(nll.dtype)
    sums = nll.new_zeros(2, len(cu_seqlens)).index_add(1, document, torch.stack([-nll[0] * is_learnt, is_learnt]))
    log_probs, counts = sums[:, : 2 * n_pairs].unflatten(1, (n_pairs, 2))
    return log_probs, counts


def dpo_loss(log_probs: Tensor, reference: Tensor, counts: Tensor, config: DPOConfig) -> tuple[Tensor, Tensor]:
    """The loss of each pair, (n_pairs,); and the sums of STATISTICS over the pairs, at the end the number of pairs. The arguments are
    (n_pairs, 2). A pair without answers (counts 0) is padding and has the loss 0."""
    is_pair = counts[:, 0] > 0
    per_token = 1 / counts.clamp(min=1)
    scale = per_token if config.length_normalised else torch.ones_like(counts)
    rewards = config.beta * (log_probs - reference) * scale  # (n_pairs, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    dpo = -F.logsigmoid(margins) * is_pair
    loss = dpo
    if config.sft_weight:
        loss = dpo - config.sft_weight * log_probs[:, 0] * per_token[:, 0]
    values = torch.stack([dpo, *rewards.T, margins, (margins > 0) * is_pair, *log_probs.T, is_pair.to(dpo.dtype)])
    return loss, values.detach().sum(1)


@torch.inference_mode()
def validate_pairs(
    model, split: Split, reference: Tensor, config: DPOConfig, *, micro_batch: int, context: int, here: Processes, autocast
) -> tuple[float, float]:
    """(mean loss of a pair, bits per character of the chosen answers) on the whole split; the processes share the work."""
    device, n = reference.device, micro_batch // 2
    found = torch.zeros(2, dtype=torch.float64, device=device)  # sums: loss, -log p
    for i, batch in enumerate(pair_batches(split, context=context, micro_batch=micro_batch)):
        if i % here.world_size == here.rank:
            tokens, targets, cu_seqlens, *_ = batch.on(device)
            assert cu_seqlens is not None
            with autocast():
                nll = model(tokens, targets, cu_seqlens=cu_seqlens, reduction="none")
            log_probs, counts = answer_log_probs(nll, targets, cu_seqlens, n)
            own = reference[i * n : (i + 1) * n]
            loss, _ = dpo_loss(log_probs[: len(own)], own, counts[: len(own)], config)
            found += torch.stack([loss.sum(), -log_probs[:, 0].sum()]).double()
    loss, nats = total(found).tolist()
    return loss / split.n_documents, nats / math.log(2) / split.characters


@torch.no_grad()
def reference_log_probs(model, split: Split, name: str, *, micro_batch: int, context: int, here: Processes, autocast) -> Tensor:
    """log p of the chosen and the rejected answer of each pair: (pairs, 2). Read from a file beside the pairs, or computed by the main
    process and written there. `name` identifies the model."""
    path = Path(split.folder) / f"reference-{name}.safetensors"
    if here.is_main and not path.is_file():
        device = next(model.parameters()).device
        found = []
        for batch in pair_batches(split, context=context, micro_batch=micro_batch):
            tokens, targets, cu_seqlens, *_ = batch.on(device)
            assert cu_seqlens is not None
            with autocast():
                nll = model(tokens, targets, cu_seqlens=cu_seqlens, reduction="none")
            found.append(answer_log_probs(nll, targets, cu_seqlens, micro_batch // 2)[0].float().cpu())
        with atomic_file(path) as temporary:
            save_tensors(temporary, {"log_probs": torch.cat(found)[: split.n_documents].contiguous()})
    barrier()
    return load_tensors(path.parent, path.name)["log_probs"].to(here.device)
