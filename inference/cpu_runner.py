"""The decoder's passes on a CPU: `native.c`, or PyTorch without a C compiler, and the choice of the tokens."""

import math

import torch
from torch import Tensor

from ..common.errors import UserError
from ..model.gpt import GPT, CachedTokens
from . import native
from .sampling import NOT_FINITE, candidates, draw, penalize
from .sequence import Sequence

PREFILL_WORK = 1 << 30  # multiply-adds of a step's prompt tokens with `limits_prefill`: about 50 ms on two CPU cores


class TorchForward:
    """The forward pass by `GPT.forward`, for CPUs without a C compiler. The arguments are those of `NativeForward`, with these limits: the
    rows are 0, 1, … in order, several tokens of a row begin at position 0, and `last` holds the last token of each row."""

    def __init__(self, model: GPT):
        self._model = model

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor, cache: Tensor, last: Tensor) -> Tensor:
        is_before = torch.ones(len(tokens), dtype=torch.bool)
        is_before[last] = False
        if is_before.any():
            before = positions[is_before]
            bounds = torch.cat(((before == 0).nonzero().flatten(), torch.tensor([len(before)]))).int()
            self._model(tokens[None, is_before], cache=CachedTokens(cache, before, rows[is_before], bounds), last=last[:0])
        return self._model(tokens[None, last], cache=CachedTokens(cache, positions[last]))[0]


class CPURunner:
    """Runs the sequences of a `Decoder`: sequence i has row i of the cache."""

    def __init__(self, model: GPT, *, slots: int, capacity: int, n_token: int, limits_prefill: bool):
        c, self._n_token = model.config, n_token
        runs_native = native.can_run(model)
        self._forward = native.NativeForward(model) if runs_native else TorchForward(model)
        self._runs_native = runs_native
        self._argmax = native.argmax if runs_native else lambda logits: logits.argmax(-1)
        work = c.n_matrix - c.vocab_size * c.width  # multiply-adds per token without the head
        self._max_prefill = max(8, PREFILL_WORK // work) if runs_native and limits_prefill else None
        dtype = torch.float32 if runs_native else model.embedding.dtype
        self._cache = torch.zeros((c.n_layer, 2, slots, capacity, c.n_kv_head, c.head_dim), dtype=dtype)

    def move(self, source: int, target: int, n_cached: int) -> None:
        """Move the sequence of a row to another row."""
        self._cache[:, :, target, :n_cached] = self._cache[:, :, source, :n_cached]

    def run(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """The next token of each sequence whose prompt is processed. Raises UserError if the logits are not finite."""
        counts = self._count_tokens(sequences)
        new = [s.ids[s.n_cached : s.n_cached + n] for s, n in zip(sequences, counts, strict=True)]
        tokens = torch.tensor([i for ids in new for i in ids])
        rows = torch.tensor([row for row, ids in enumerate(new) for _ in ids])
        positions = torch.tensor([i for s, n in zip(sequences, counts, strict=True) for i in range(s.n_cached, s.n_cached + n)])
        is_ready = torch.tensor([s.n_cached + n == len(s.ids) for s, n in zip(sequences, counts, strict=True)])
        last = (torch.tensor(counts).cumsum(0) - 1)[is_ready]
        logits = self._forward(tokens, rows, positions, self._cache, last)[:, : self._n_token]  # (ready sequences, V)
        for sequence, n in zip(sequences, counts, strict=True):
            sequence.n_cached += n
        ready = [s for s in sequences if s.n_cached == len(s.ids)]
        # A hidden state that is not finite makes all logits of its row so; `draw` finds one in the head.
        if not all(map(math.isfinite, logits[:, 0].tolist())):
            raise UserError(NOT_FINITE)
        return dict(zip(ready, self._choose(ready, logits), strict=True))

    def _count_tokens(self, sequences: list[Sequence]) -> list[int]:
        """How many tokens of each sequence the next pass processes. Prompts divide `_max_prefill` equally; short ones leave their rest."""
        counts = [len(s.ids) - s.n_cached for s in sequences]
        if self._max_prefill is not None:
            prompts, rest = sorted((row for row, n in enumerate(counts) if n > 1), key=lambda row: counts[row]), self._max_prefill
            for i, row in enumerate(prompts):
                counts[row] = min(counts[row], max(1, rest // (len(prompts) - i)))
                rest -= counts[row]
        return counts

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        for row, sequence in enumerate(sequences):
            if sequence.sampling.repetition_penalty != 1:
                penalize(logits[row], torch.tensor(sorted(set(sequence.ids))), sequence.sampling.repetition_penalty)
        chosen = [0] * len(sequences)
        groups: dict[tuple, list[int]] = {}  # sequences with the same filters are drawn together
        for row, sequence in enumerate(sequences):
            groups.setdefault(tuple(sequence.sampling.filters.items()), []).append(row)
        for filters, rows in groups.items():
            part = logits if len(rows) == len(sequences) else logits[rows]
            if dict(filters)["temperature"] == 0:
                tokens = self._argmax(part)
            else:
                u = torch.stack([torch.rand(1, dtype=torch.float64, generator=sequences[row].generator) for row in rows])
                tokens = self._draw(part, u, **dict(filters))
            for row, token in zip(rows, tokens.tolist(), strict=True):
                chosen[row] = token
        return chosen

    def _draw(self, logits: Tensor, u: Tensor, *, top_k: int | None, **filters: float) -> Tensor:
        """A token of each row of logits (B, V). Raises UserError if they are not finite."""
        if not self._runs_native or top_k is None or top_k >= logits.shape[1]:
            return draw(*candidates(logits, top_k=top_k, **filters), u)
        tokens = native.draw(logits, u, top_k=top_k, **filters)
        if (tokens < 0).any():
            raise UserError(NOT_FINITE)
        return tokens
