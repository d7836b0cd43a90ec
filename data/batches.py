"""Batches whose order is a pure function of (seed, epoch, step): there is no loader state to save or resume.

A document longer than `context` is cut into pieces of at most `context` tokens. An epoch concatenates all pieces in a random order: its
*stream*. With N = micro_batch × context, micro-batch m of the epoch is the stream's [m·N, m·N + N). So nothing is padded, and each token
occurs once an epoch, except for a tail shorter than one step. A step takes the next global_batch / micro_batch micro-batches and assigns
them to the processes in turn, so the step is the same on any number of processes.

The target of a token is the token stored after it: the next one of the document, also at a cut. After the last token of a document it is
the `<|endoftext|>` that begins the next one, so the model learns where a story ends.

In a split of conversations only the answers are targets. Emphasised targets may weigh more, and a share of the conversations may end after
their last emphasised token. A conversation that a micro-batch's border cuts is learnt up to there: its rest would be without its question.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from .shards import Split

IGNORED = -100  # the target of padding; the losses skip it


@dataclass(frozen=True)
class Batch:
    """One micro-batch. With a document mask it is flattened to one row of N = micro_batch × context tokens.

    The length of `cu_seqlens` depends only on the split and N, so that compiled code and CUDA graphs see one shape. (In training it is
    longer with a probability below 1e-18 per micro-batch.)
    """

    tokens: Tensor  # (1, N), or (micro_batch, context) without a document mask; int64
    targets: Tensor  # as tokens; int64, IGNORED for padding
    cu_seqlens: Tensor | None  # (segments + 1,) int32: 0, the end of each segment, then N up to a fixed length
    reference: Tensor | None = None  # (pairs, 2) fp32, of `PairBatches`
    weights: Tensor | None = None  # as targets; fp32, of each target in the loss; None: 1

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(tokens, targets, cu_seqlens, reference, weights) on the device. A copy to a GPU does not synchronise."""
        move = (lambda t: t.pin_memory().to(device, non_blocking=True)) if device.type == "cuda" else lambda t: t
        cu_seqlens, reference, weights = (None if t is None else move(t) for t in (self.cu_seqlens, self.reference, self.weights))
        return move(self.tokens), move(self.targets), cu_seqlens, reference, weights


class Batches:
    """The training batches of one process.

    With `document_mask`, each segment of `cu_seqlens` is a document or the part of it in the micro-batch, at most `context` tokens, and
    attention must stay within it. Without it, the rows are consecutive parts of the stream."""

    def __init__(
        self,
        split: Split,
        *,
        context: int,  # tokens
        micro_batch: int,  # sequences of `context` tokens, per process and pass
        global_batch: int,  # sequences of `context` tokens, per step over all processes
        seed: int,
        document_mask: bool = True,
        emphasis: float = 1.0,  # weight of emphasised targets
        cut_share: float = 0.0,  # of the conversations that end after their last emphasised token
        rank: int = 0,
        world_size: int = 1,
    ):
        """Raises UserError for sizes that do not match, or a split that holds less than one step."""
        sizes = {"context": context, "micro_batch": micro_batch, "global_batch": global_batch, "world_size": world_size}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} ({value}) must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank ({rank}) must be from 0 to {world_size - 1}: world_size is {world_size}")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed ({seed}) must be from 0 to 2**64 - 1")
        together = micro_batch * world_size
        if global_batch % together:
            below = global_batch // together * together
            tries = " or ".join(str(size) for size in (below, below + together) if size)
            raise UserError(
                f"micro_batch ({micro_batch}) × processes ({world_size}) must divide global_batch ({global_batch}); "
                f"try global_batch {tries}"
            )
        if split.has_pairs:
            raise UserError(f"{split.folder} holds pairs of answers, of which one is to be avoided; set objective dpo")
        if split.learnt is not None and not document_mask:
            raise UserError(f"{split.folder} holds conversations, which must not see each other; set data.document_mask true")
        if n_long := int((split.lengths > context)[~split.is_learnt(split.starts[:-1])].sum()):  # a replayed text may be longer
            raise UserError(
                f"{split.folder} has {n_long:,} conversations longer than the context of {context} tokens; make it again with "
                f"tritale prepare --context {context}, which names them"
            )
        self.tokens_per_step = global_batch * context  # over all processes
        self._starts, self._lengths = _pieces(split, context)  # (pieces,)
        if cut_share:
            self._lengths = _cut(split, self._starts, self._lengths, cut_share, seed)
        n_tokens = int(self._lengths.sum())
        if n_tokens < self.tokens_per_step:
            fits = n_tokens // (together * context) * together
            remedy = f"lower global_batch to {fits} or less" if fits else "lower micro_batch or context"
            raise UserError(
                f"{split.folder} holds {n_tokens:,} tokens, less than one step of global_batch ({global_batch}) × "
                f"context ({context}) = {self.tokens_per_step:,}; {remedy}, or add stories"
            )
        self.steps_per_epoch = n_tokens // self.tokens_per_step
        self.micro_batches_per_step = global_batch // together  # of this process

        self._split, self._seed, self._document_mask = split, seed, document_mask
        self._emphasis = emphasis
        self._shape = micro_batch, context
        self._own = range(rank, global_batch // micro_batch, world_size)  # this process's micro-batches of a step
        self._micro_batches = global_batch // micro_batch  # of a step, all processes
        self._n_segments = _likely_segments(self._lengths, micro_batch * context)
        self._epoch = None  # the one that _order and _ends belong to

    def step(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of optimizer step `step`, which counts from 0 over all epochs."""
        if step < 0:
            raise UserError(f"step ({step}) must be at least 0")
        epoch, step = divmod(step, self.steps_per_epoch)
        return (self._micro_batch(epoch, step * self._micro_batches + i) for i in self._own)

    def n_targets(self, step: int) -> float:
        """The sum of the weights of the targets of optimizer step `step` that are not IGNORED, over all processes; at least 1."""
        if self._split.learnt is None:
            return self.tokens_per_step
        epoch, step = divmod(step, self.steps_per_epoch)
        parts = (self._parts(epoch, step * self._micro_batches + i) for i in range(self._micro_batches))
        return max(1, sum(float(_weights(self._split, *part, self._emphasis).sum()) for part in parts))

    def _micro_batch(self, epoch: int, m: int) -> Batch:
        parts = self._parts(epoch, m)
        return _batch(self._split, *parts, self._shape, self._n_segments if self._document_mask else None, self._emphasis)

    def _parts(self, epoch: int, m: int) -> tuple[np.ndarray, np.ndarray, int]:
        # The starts and lengths of the pieces in micro-batch m, and how many tokens of the first are in the one before.
        if epoch != self._epoch:
            self._order = _random_order(self._seed, epoch, len(self._starts))  # (pieces,)
            self._ends = np.cumsum(self._lengths[self._order])  # (pieces,), in the stream
            self._epoch = epoch
        n = self._shape[0] * self._shape[1]
        begin, end = m * n, m * n + n
        first = np.searchsorted(self._ends, begin, side="right")  # the piece that holds position `begin`
        last = np.searchsorted(self._ends, end, side="left")  # … and position `end - 1`
        pieces = self._order[first : last + 1]
        starts, lengths = self._starts[pieces], self._lengths[pieces]
        cut = begin - (self._ends[first] - lengths[0])  # tokens in the previous micro-batch
        starts[0] += cut
        lengths[0] -= cut
        lengths[-1] -= self._ends[last] - end  # tokens in the next one
        return starts, lengths, int(cut)


class PairBatches:
    """The training batches of one process from a split of pairs, for preference training: a micro-batch of B sequences holds B / 2 pairs,
    each the chosen answer's conversation and the rejected one's, as segments 2i and 2i + 1. The rest is padding."""

    def __init__(
        self, split: Split, reference: Tensor, *, context: int, micro_batch: int, global_batch: int, seed: int, rank: int, world_size: int
    ):
        """`reference` (pairs, 2) goes with each pair. Raises UserError if the split holds other data, or fewer pairs than a step."""
        if micro_batch % 2 or global_batch % (micro_batch * world_size):
            raise UserError(
                f"train.micro_batch is {micro_batch}; for pairs it must be even, and times {world_size} processes divide {global_batch}"
            )
        self._answers, self._split, self._reference, self._seed = _answers(split, context), split, reference, seed
        self._shape, self._pairs = (micro_batch, context), micro_batch // 2
        self._own = range(rank, global_batch // micro_batch, world_size)
        self._pairs_per_step = global_batch // 2
        if split.n_documents < self._pairs_per_step:
            raise UserError(f"{split.folder} has {split.n_documents:,} pairs, fewer than a step; lower train.global_batch")
        self.steps_per_epoch = split.n_documents // self._pairs_per_step

    def step(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of optimizer step `step`, which counts from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _random_order(self._seed, epoch, self._split.n_documents)[step * self._pairs_per_step :]
        for i in self._own:
            pairs = order[i * self._pairs : (i + 1) * self._pairs]
            yield replace(_pair_batch(self._split, self._answers, pairs, self._shape), reference=self._reference[pairs])

    def n_targets(self, step: int) -> int:
        """How many pairs a step has, over all processes."""
        return self._pairs_per_step


def pair_batches(split: Split, *, context: int, micro_batch: int) -> Iterator[Batch]:
    """All pairs of the split in stored order, without reference. Raises UserError if the split holds other data."""
    answers = _answers(split, context)
    for first in range(0, split.n_documents, micro_batch // 2):
        pairs = np.arange(first, min(first + micro_batch // 2, split.n_documents))
        yield _pair_batch(split, answers, pairs, (micro_batch, context))


def _answers(split: Split, context: int) -> tuple[np.ndarray, np.ndarray]:
    # The starts and lengths of the two conversations of each pair: (pairs, 2) each.
    tokens = split.take(np.arange(split.n_tokens))
    starts = np.flatnonzero(tokens == tokens[0])  # `<|endoftext|>` begins each
    if not split.has_pairs or len(starts) != 2 * split.n_documents:
        raise UserError(f"{split.folder} does not hold pairs of answers; make it with tritale prepare --task dpo")
    lengths = np.diff(starts, append=split.n_tokens)
    if lengths.max() > context:
        raise UserError(f"{split.folder} has a conversation of {lengths.max()} tokens, longer than the context of {context}")
    return starts.reshape(-1, 2), lengths.reshape(-1, 2)


def _pair_batch(split: Split, answers: tuple[np.ndarray, np.ndarray], pairs: np.ndarray, shape: tuple[int, int]) -> Batch:
    starts, lengths = (a[pairs].ravel() for a in answers)
    return _batch(split, starts, lengths, 0, shape, n_segments=2 * shape[0])  # at most as many segments of padding as of answers


def _random_order(seed: int, epoch: int, n: int) -> np.ndarray:
    # Sorted random words, not Generator.permutation: NumPy guarantees the same words in later versions.
    return np.argsort(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n), kind="stable")


def eval_batches(split: Split, *, context: int, micro_batch: int, document_mask: bool = True) -> Iterator[Batch]:
    """All documents in stored order. Each token of the split is a target exactly once; the `<|endoftext|>` that ends the last document
    replaces the one that begins the first.

    With `document_mask` no piece is cut at the border of a micro-batch. The rest is padded (target IGNORED, in separate segments), so the
    loss does not depend on `micro_batch`. Raises UserError if `context` or `micro_batch` is below 1."""
    if context < 1 or micro_batch < 1:
        raise UserError(f"context ({context}) and micro_batch ({micro_batch}) must be at least 1")
    micro_batch = min(micro_batch, -(-split.n_tokens // context))  # no more than the split fills
    n = micro_batch * context
    if document_mask:
        starts, lengths = _pieces(split, context)
    else:
        starts = np.arange(0, split.n_tokens, context)
        lengths = np.diff(starts, append=split.n_tokens)
    ends = np.cumsum(lengths)
    cuts = [0]  # the first piece of each micro-batch
    while cuts[-1] < len(ends):
        cuts.append(int(np.searchsorted(ends, starts[cuts[-1]] + n, side="right")))
    n_segments = int(np.diff(cuts).max()) + micro_batch if document_mask else None  # padding is at most micro_batch segments
    for i, j in pairwise(cuts):
        yield _batch(split, starts[i:j], lengths[i:j], 0, (micro_batch, context), n_segments)


def _pieces(split: Split, context: int) -> tuple[np.ndarray, np.ndarray]:
    # The starts of the pieces of at most `context` tokens, and their lengths: (pieces,) int64 each, in stored order.
    per_document = -(-split.lengths // context)
    first_piece = np.cumsum(per_document) - per_document
    nth_in_document = np.arange(per_document.sum()) - np.repeat(first_piece, per_document)
    starts = np.repeat(split.starts[:-1], per_document) + nth_in_document * context
    return starts, np.diff(starts, append=split.n_tokens)


def _cut(split: Split, starts: np.ndarray, lengths: np.ndarray, share: float, seed: int) -> np.ndarray:
    # The lengths, of a share of the pieces only up to the last emphasised token, if there is one.
    emphasised = np.flatnonzero(split.is_emphasised(np.arange(split.n_tokens)))
    ends = np.concatenate([[0], emphasised + 1])[np.searchsorted(emphasised, starts + lengths)]
    is_cut = np.random.Philox(key=np.array([seed, 2**64 - 1], np.uint64)).random_raw(len(starts)) < share * 2.0**64
    return np.where(is_cut & (ends > starts), ends - starts, lengths)


def _likely_segments(lengths: np.ndarray, n: int) -> int:
    # The number of segments that n tokens of pieces in random order exceed with a probability below 1e-18. The strict maximum (only the
    # shortest pieces) is a hundred times the usual number on real text, and attention would take time for each.
    # Chernoff: for every t > 0, P(k pieces take ≤ n tokens) ≤ exp(t n) E[exp(-t length)]^k. Drawing without replacement only lowers
    # it (Hoeffding 1963, theorem 4). Solved for k with the best t of a grid, plus two for the pieces cut at the borders.
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)
    shares = counts[values] / len(lengths)
    k = min(
        (t * n + np.log(1e18)) / (t * values[0] - np.log(shares @ np.exp(-t * (values - values[0])))) for t in np.geomspace(1e-4, 10, 100)
    )
    return min(int(np.ceil(k)) + 2, n)


def _positions(starts, lengths) -> np.ndarray:
    # The positions of the parts of a split that begin at `starts`, one after another.
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]))


def _weights(split: Split, starts, lengths, cut: int, emphasis: float) -> np.ndarray:
    # The weight of the target of each token of these parts, float32; 0 if it is not learnt.
    targets = _positions(starts, lengths) + 1
    weights = split.is_learnt(targets).astype(np.float32)
    if emphasis != 1:
        weights[split.is_emphasised(targets)] = emphasis
    if cut and split.learnt is not None:
        weights[: lengths[0]] = 0
    return weights


def _batch(split: Split, starts, lengths, cut: int, shape: tuple[int, int], n_segments: int | None, emphasis: float = 1.0) -> Batch:
    # These parts of the split, then padding.
    n, context = shape[0] * shape[1], shape[1]
    ends = np.cumsum(lengths)
    filled = int(ends[-1])
    positions = np.full(n, split.n_tokens)
    positions[:filled] = _positions(starts, lengths)
    tokens, targets = split.take(positions), split.take(positions + 1)
    targets[filled:] = IGNORED
    weights = None
    if split.learnt is not None:
        of_targets = np.zeros(n, np.float32)
        of_targets[:filled] = _weights(split, starts, lengths, cut, emphasis)
        targets[of_targets == 0] = IGNORED
        weights = torch.from_numpy(of_targets)[None] if emphasis != 1 else None
    if n_segments is None:
        return Batch(torch.from_numpy(tokens).view(shape), torch.from_numpy(targets).view(shape), None)
    borders = np.concatenate([[0], ends, np.arange(filled + context, n + context, context)]).clip(max=n)
    cu_seqlens = np.full(max(n_segments + 1, len(borders)), n, np.int32)
    cu_seqlens[: len(borders)] = borders
    return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None], torch.from_numpy(cu_seqlens), weights=weights)
