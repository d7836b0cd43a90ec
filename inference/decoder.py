"""One forward pass for a batch of sequences; sequences can be added and removed between steps (continuous batching).

    decoder = Decoder(model, slots=32)
    sequence = Sequence(prompt_ids, Sampling(seed=1))
    decoder.add(sequence)
    decoder.step()  # {sequence: token}
    decoder.remove(sequence)

Each sequence has a row of the KV cache. The rows in use are always the first ones: when a sequence is removed, the last row moves into its
place.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.errors import UserError
from ..model.gpt import GPT, CachedTokens
from . import native
from .sampling import NOT_FINITE, candidates, draw, penalize
from .sequence import Sequence

# Without cuDNN's attention, which H100 and newer prefer: it compiles a plan for each number of cached tokens.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TorchForward:
    """The forward pass by `GPT.forward`, for GPUs and for CPUs without a C compiler. The arguments are those of `NativeForward`, with these
    limits: the rows are 0, 1, … in order, several tokens of a row begin at position 0, and `last` holds the last token of each row."""

    def __init__(self, model: GPT):
        self._model = model

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor, cache: Tensor, last: Tensor) -> Tensor:
        is_before = torch.ones(len(tokens), dtype=torch.bool)
        is_before[last] = False
        if is_before.any():
            self._run(tokens[is_before], rows[is_before], positions[is_before], cache, last[:0], is_beginning=True)
        return self._run(tokens[last], rows[last], positions[last], cache, torch.arange(len(last)), is_beginning=False)

    def _run(self, tokens: Tensor, rows: Tensor, positions: Tensor, cache: Tensor, last: Tensor, *, is_beginning: bool) -> Tensor:
        n, longest, cu_seqlens = len(tokens), int(positions.max()) + 1, None
        given = on_device(torch.cat((tokens, rows, positions, last)), cache.device)  # one copy
        if is_beginning:
            cu_seqlens = on_device(torch.cat(((positions == 0).nonzero().flatten(), torch.tensor([n]))).int(), cache.device)
        where = CachedTokens(cache, given[n : 2 * n], given[2 * n : 3 * n], longest, cu_seqlens)
        with sdpa_kernel(ATTENTION):
            return self._model(given[None, :n], cache=where, last=given[3 * n :])[0]


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. A copy to a GPU does not synchronise."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


PREFILL_WORK = 1 << 30  # multiply-adds of a step's prompt tokens with `limits_prefill`: about 50 ms on two CPU cores


class Decoder:
    """Up to `slots` sequences in one batch. `capacity` is the longest sequence, prompt included; the default is the model's context. The
    cache holds slots · capacity · layers · 2 · H_kv · D numbers. With `limits_prefill` long prompts are processed over several steps, so
    that the other sequences continue meanwhile (with `native.c` only; on a GPU a prompt is fast).

    Raises UserError if the capacity exceeds the context."""

    def __init__(self, model: GPT, *, slots: int, capacity: int | None = None, n_token: int | None = None, limits_prefill: bool = False):
        c, weight = model.config, model.embedding
        self.capacity = c.context if capacity is None else capacity
        if not 1 <= self.capacity <= c.context:
            raise UserError(f"capacity is {capacity}; it must be between 1 and the model's context of {c.context}")
        self._slots, self._n_token = slots, n_token or c.vocab_size
        runs_native = native.can_run(model)
        self._forward = native.NativeForward(model) if runs_native else TorchForward(model)
        self._argmax = native.argmax if runs_native else lambda logits: logits.argmax(-1)
        work = c.n_matrix - c.vocab_size * c.width  # multiply-adds per token without the head
        self._max_prefill = max(8, PREFILL_WORK // work) if runs_native and limits_prefill else None
        dtype = torch.float32 if runs_native else weight.dtype
        shape = (c.n_layer, 2, slots, self.capacity, c.n_kv_head, c.head_dim)
        self._cache = torch.zeros(shape, dtype=dtype, device=weight.device)  # zeros: masked keys are multiplied by 0 too
        self._sequences: list[Sequence] = []  # in the order of their rows

    @property
    def free(self) -> int:
        """How many sequences can still be added."""
        return self._slots - len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence whose `ids` are a prompt that begins with `<|endoftext|>`. The caller applies `max_new_tokens` and `stop`.

        Raises ValueError if no slot is free, or if the prompt is empty or fills the capacity."""
        if not self.free:
            raise ValueError(f"all {self._slots} slots are taken; remove a sequence first")
        if not 1 <= len(sequence.ids) < self.capacity:
            raise ValueError(f"the prompt has {len(sequence.ids)} tokens; between 1 and {self.capacity - 1} fit")
        self._sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence and free its slot. Raises ValueError if it was not added."""
        if sequence not in self._sequences:
            raise ValueError(f"this sequence is not among the {len(self._sequences)} of the decoder; add it first")
        row, last = self._sequences.index(sequence), self._sequences.pop()
        if last is not sequence:
            n = last.n_cached
            self._cache[:, :, row, :n] = self._cache[:, :, len(self._sequences), :n]
            self._sequences[row] = last

    @torch.inference_mode()
    def step(self) -> dict[Sequence, int]:
        """Append the next token to every sequence and return the tokens. Long prompts may need several steps.

        Raises ValueError if a sequence fills its capacity, UserError if the logits are not finite."""
        sequences = self._sequences
        if full := [row for row, s in enumerate(sequences) if len(s.ids) > self.capacity]:
            raise ValueError(f"the sequences {full} fill their {self.capacity} tokens; remove them")
        if not sequences:
            return {}
        counts = self._count_tokens()
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
        chosen = self._choose(ready, logits)
        for sequence, token in zip(ready, chosen, strict=True):
            sequence.ids.append(token)
        return dict(zip(ready, chosen, strict=True))

    def _count_tokens(self) -> list[int]:
        """How many tokens of each sequence the next pass processes. Prompts divide `_max_prefill` equally; short ones leave their rest."""
        counts = [len(s.ids) - s.n_cached for s in self._sequences]
        if self._max_prefill is not None:
            prompts, rest = sorted((row for row, n in enumerate(counts) if n > 1), key=lambda row: counts[row]), self._max_prefill
            for i, row in enumerate(prompts):
                counts[row] = min(counts[row], max(1, rest // (len(prompts) - i)))
                rest -= counts[row]
        return counts

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        for row, sequence in enumerate(sequences):
            if sequence.sampling.repetition_penalty != 1:
                seen = on_device(torch.tensor(sorted(set(sequence.ids))), logits.device)
                penalize(logits[row], seen, sequence.sampling.repetition_penalty)
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
                tokens = draw(*candidates(part, **dict(filters)), on_device(u, logits.device))
            for row, token in zip(rows, tokens.tolist(), strict=True):
                chosen[row] = token
        return chosen
