"""Texts written side by side, one token each a step; they join and leave whenever they like (continuous batching).

    decoder = Decoder(model, slots=32)
    a = decoder.add(prompt_ids, Sampling(seed=1))
    decoder.step()  # {a: token}
    decoder.remove(a)

Each text has a row of the cache. The rows in use are always the first ones: where a text leaves, the last row moves into its place, so a
step never touches the row of a finished text.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import UserError
from ..model.gpt import GPT, CachedTokens
from . import native
from .sampling import NOT_FINITE, Sampling, candidates, draw, penalize


@dataclass
class _Text:
    handle: int
    ids: list[int]  # prompt, and what is written
    sampling: Sampling
    generator: torch.Generator
    is_cached: bool = False  # all of ids but the last


class TorchForward:
    """The forward pass by `GPT.forward`, for GPUs and where `native.c` does not run. The arguments are those of `NativeForward`."""

    def __init__(self, model: GPT):
        self._model = model

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor, cache: Tensor, last: Tensor) -> Tensor:
        """As `NativeForward`, but the tokens are either whole beginnings of texts, one after the other, or one of each row 0, 1, …"""
        device = cache.device
        where = CachedTokens(cache, rows.to(device), positions.to(device), is_beginning=not torch.equal(rows, torch.arange(len(rows))))
        return self._model(tokens[None].to(device), cache=where, last=last.to(device))[0]


class Decoder:
    """Up to `slots` texts at a time; `Writer` makes text of their tokens. `capacity` is the longest text, prompt included, by default the
    model's context; the cache takes slots · capacity · layers · 2 · H_kv · D numbers.

    Raises ValueError for a capacity beyond the context."""

    def __init__(self, model: GPT, *, slots: int, capacity: int | None = None, n_token: int | None = None):
        c, weight = model.config, model.embedding
        capacity = c.context if capacity is None else capacity
        if not 1 <= capacity <= c.context:
            raise UserError(f"capacity is {capacity}; it must be between 1 and the model's context of {c.context}")
        self._slots, self._capacity, self._n_token = slots, capacity, n_token or c.vocab_size
        runs_native = native.can_run(model)
        self._forward = native.NativeForward(model) if runs_native else TorchForward(model)
        self._argmax = native.argmax if runs_native else lambda logits: logits.argmax(-1)
        dtype = torch.float32 if runs_native else weight.dtype
        shape = (c.n_layer, 2, slots, capacity, c.n_kv_head, c.head_dim)
        self._cache = torch.zeros(shape, dtype=dtype, device=weight.device)  # zeros: masked keys are multiplied by 0 too
        self._texts: list[_Text] = []  # in the order of their rows
        self._handles = itertools.count()

    @property
    def free(self) -> int:
        """How many texts can still be added."""
        return self._slots - len(self._texts)

    def add(self, ids: list[int], sampling: Sampling) -> int:
        """Begin a text after the prompt `ids` (with `<|endoftext|>` in front); its handle. `sampling.max_new_tokens` and `sampling.stop`
        are the caller's business (`Writer`).

        Raises ValueError where no slot is free, or for a prompt that is empty or fills the capacity."""
        if not self.free:
            raise UserError(f"all {self._slots} slots are taken; remove a text first")
        if not 1 <= len(ids) < self._capacity:
            raise UserError(f"the prompt has {len(ids)} tokens; between 1 and {self._capacity - 1} fit")
        generator = torch.Generator()
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
        self._texts.append(_Text(next(self._handles), list(ids), sampling, generator))
        return self._texts[-1].handle

    def remove(self, handle: int) -> None:
        """Forget a text; its slot is free at once. Raises ValueError for an unknown handle."""
        row = next((i for i, text in enumerate(self._texts) if text.handle == handle), None)
        if row is None:
            raise UserError(f"there is no text {handle} here; present are {[text.handle for text in self._texts]}")
        last = self._texts.pop()
        if last.handle != handle:
            n = len(last.ids)
            self._cache[:, :, row, :n] = self._cache[:, :, len(self._texts), :n]
            self._texts[row] = last

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """The next token of every text, by handle. A text whose capacity is full must be removed before; raises ValueError else, and where
        the logits are not finite."""
        texts = self._texts
        full = [text.handle for text in texts if len(text.ids) > self._capacity]
        if full:
            raise UserError(f"the texts {full} fill their {self._capacity} tokens; remove them")
        if not texts:
            return {}
        beginnings = [(row, text.ids[:-1]) for row, text in enumerate(texts) if not text.is_cached and len(text.ids) > 1]
        if beginnings:
            tokens = torch.tensor([i for _, ids in beginnings for i in ids])
            rows = torch.tensor([row for row, ids in beginnings for _ in ids])
            positions = torch.tensor([i for _, ids in beginnings for i in range(len(ids))])
            self._forward(tokens, rows, positions, self._cache, torch.empty(0, dtype=torch.int64))
        rows = torch.arange(len(texts))
        tokens, positions = torch.tensor([t.ids[-1] for t in texts]), torch.tensor([len(t.ids) - 1 for t in texts])
        logits = self._forward(tokens, rows, positions, self._cache, rows)[:, : self._n_token]  # (texts, V)
        # One that is not finite in the hidden state spoils all logits of its row; `draw` sees one in the embedding.
        if not all(map(math.isfinite, logits[:, 0].tolist())):
            raise UserError(NOT_FINITE)
        chosen = self._choose(logits)
        for text, token in zip(texts, chosen, strict=True):
            text.ids.append(token)
            text.is_cached = True
        return {text.handle: token for text, token in zip(texts, chosen, strict=True)}

    def _choose(self, logits: Tensor) -> list[int]:
        texts = self._texts
        for row, text in enumerate(texts):
            if text.sampling.repetition_penalty != 1:
                seen = torch.tensor(sorted(set(text.ids)), device=logits.device)
                penalize(logits[row], seen, text.sampling.repetition_penalty)
        chosen = [0] * len(texts)
        groups: dict[tuple, list[int]] = {}  # texts with the same filters are drawn together
        for row, text in enumerate(texts):
            groups.setdefault(tuple(text.sampling.filters.items()), []).append(row)
        for filters, rows in groups.items():
            part = logits if len(rows) == len(texts) else logits[rows]
            if dict(filters)["temperature"] == 0:
                tokens = self._argmax(part)
            else:
                u = torch.stack([torch.rand(1, dtype=torch.float64, generator=texts[row].generator) for row in rows])
                tokens = draw(*candidates(part, **dict(filters)), u.to(logits.device))
            for row, token in zip(rows, tokens.tolist(), strict=True):
                chosen[row] = token
        return chosen
