"""The decoder's passes on a GPU: a step is one CUDA graph, from the last tokens of the sequences to the next ones, and a copy to the host.

Whatever a step reads is on the device: the cache, the last token and position of each row, its settings, its random numbers and the tokens
it has seen. The host writes them when a sequence is added, and then only counts.
"""

from functools import partial

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.graphs import Graphed
from ..kernels import sample
from ..kernels.launch import power_of_two
from ..model.gpt import GPT, CachedTokens
from .sampling import NOT_FINITE
from .sequence import Sequence


class Rows:
    """What the device holds of each row."""

    def __init__(self, model: GPT, slots: int, capacity: int, n_token: int):
        c, weight = model.config, model.embedding
        on = partial(torch.zeros, device=weight.device)
        self.cache = on(c.n_layer, 2, slots, capacity, c.n_kv_head, c.head_dim, dtype=weight.dtype)
        self.tokens = on(slots, dtype=torch.int64)  # the last of each sequence, which is not in the cache yet
        self.positions = on(slots, dtype=torch.int64)  # its position
        self.settings = on(slots, 5)  # of `sample`
        self.random = on(slots, capacity, dtype=torch.int64)  # of the draw after each position, in [0, 2⁶³)
        self.seen = on(slots, n_token, dtype=torch.bool)

    def move(self, source: int, target: int, n_cached: int) -> None:
        self.cache[:, :, target, :n_cached] = self.cache[:, :, source, :n_cached]
        for t in (self.tokens, self.positions, self.settings, self.random, self.seen):
            t[target] = t[source]


def next_tokens(model: GPT, state: Rows, n: int) -> Tensor:
    """The next token of the first n rows (n,), −1 where the logits are not finite. Nothing is read back, so a CUDA graph can hold it."""
    tokens, positions, seen = state.tokens[:n], state.positions[:n], state.seen[:n]
    seen.scatter_(1, tokens[:, None], True)
    logits = model(tokens[None], cache=CachedTokens(state.cache, positions))[0, :, : seen.shape[1]]  # pyright: ignore[reportCallIssue, reportArgumentType]
    random = state.random[:n].gather(1, positions[:, None])[:, 0]
    chosen = sample(logits, random, state.settings[:n], seen)
    torch.clamp(chosen, min=0, out=tokens)
    torch.clamp(positions + 1, max=state.random.shape[1] - 1, out=positions)  # rows without a sequence stay in the cache
    return chosen


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. A copy to a GPU does not synchronise."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class GPURunner:
    """Runs the sequences of a `Decoder`: sequence i has row i. There is a graph for each power of two of rows, and for `slots`; it is
    captured at its third step."""

    def __init__(self, model: GPT, *, slots: int, capacity: int, n_token: int):
        self._model, self._slots, self._state = model, slots, Rows(model, slots, capacity, n_token)
        self._steps = {}  # by rows
        self.move = self._state.move

    def run(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """The next token of each sequence. Raises UserError if the logits are not finite."""
        new = [(row, s) for row, s in enumerate(sequences) if not s.n_cached]
        if new:
            self._prefill([(row, s.ids[:-1]) for row, s in new if len(s.ids) > 1])
            for row, sequence in new:
                self._start(row, sequence)
        n = min(power_of_two(len(sequences)), self._slots)
        if n not in self._steps:
            step = partial(next_tokens, self._model, self._state, n)
            self._steps[n] = Graphed(step) if self._state.tokens.is_cuda else step
        chosen = self._steps[n]().tolist()[: len(sequences)]
        if min(chosen) < 0:
            raise UserError(NOT_FINITE)
        for sequence in sequences:
            sequence.n_cached = len(sequence.ids)
        return dict(zip(sequences, chosen, strict=True))

    def _prefill(self, beginnings: list[tuple[int, list[int]]]) -> None:
        """Compute the cache of all tokens of the prompts but the last, in one pass."""
        if not beginnings:
            return
        tokens = torch.tensor([token for _, ids in beginnings for token in ids])
        rows = torch.tensor([row for row, ids in beginnings for _ in ids])
        positions = torch.tensor([i for _, ids in beginnings for i in range(len(ids))])
        bounds = torch.tensor([0, *(len(ids) for _, ids in beginnings)]).cumsum(0)
        device, n = self._state.tokens.device, len(tokens)
        given = on_device(torch.cat((tokens, rows, positions, bounds)), device)  # one copy
        where = CachedTokens(self._state.cache, given[2 * n : 3 * n], given[n : 2 * n], given[3 * n :].int())
        self._model(given[None, :n], cache=where, last=given[:0])

    def _start(self, row: int, sequence: Sequence) -> None:
        """Write what the device must know of a new sequence."""
        state, s, n = self._state, sequence.sampling, len(sequence.ids)
        device, capacity = state.tokens.device, state.random.shape[1]
        # The numbers that a CPU draws one by one: the same seed gives the same text, up to the rounding of the logits.
        u = torch.rand(capacity - n + 1, dtype=torch.float64, generator=sequence.generator)
        given = torch.cat((torch.tensor([sequence.ids[-1], n - 1]), (u * 2.0**63).long(), torch.tensor(sequence.ids)))
        given = on_device(given, device)
        state.tokens[row], state.positions[row] = given[0], given[1]
        state.random[row, n - 1 :] = given[2 : 3 + capacity - n]
        state.seen[row] = False
        state.seen[row].scatter_(0, given[-n:], True)
        settings = (s.temperature, s.top_k or torch.inf, s.top_p, s.min_p, s.repetition_penalty)
        state.settings[row] = on_device(torch.tensor(settings), device)
