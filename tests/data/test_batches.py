import random
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch

from tritale.data.batches import IGNORED, Batch, Batches, eval_batches
from tritale.data.shards import Split, write_split
from tritale.data.tokenizer import Tokenizer

CONTEXT, MICRO, GLOBAL = 16, 4, 16


class CountingTokenizer:
    """A text is its number of tokens; every token but `<|endoftext|>` (0) has an id of its own, in stored order."""

    hash = "of-the-test"
    vocab_size = 2**20

    def __init__(self):
        self.next_id = 0

    def encode_batch(self, texts, bos):
        documents = []
        for text in texts:
            documents.append([0, *range(self.next_id + 1, self.next_id + len(text))])
            self.next_id += len(text)
        return documents


def make_split(folder, lengths) -> Split:
    return write_split(folder, ("x" * int(n) for n in lengths), cast(Tokenizer, CountingTokenizer()), max_shard_tokens=1000)


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return seed


@pytest.fixture
def split(tmp_path, seed) -> Split:
    """Documents shorter and longer than the context, so that token i is i where it begins no document."""
    return make_split(tmp_path / "train", np.random.default_rng(seed).integers(1, 3 * CONTEXT, 200))


def make_batches(split, seed=1, **changes) -> Batches:
    options: dict = {"context": CONTEXT, "micro_batch": MICRO, "global_batch": GLOBAL, "seed": seed} | changes
    return Batches(split, **options)


def epoch(batches, number=0):
    steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
    return [batch for step in steps for batch in batches.step(step)]


def borders(batch: Batch) -> torch.Tensor:
    assert batch.cu_seqlens is not None
    return batch.cu_seqlens


def segments(batch: Batch):
    """(tokens, targets) of each segment."""
    ends, n = borders(batch).tolist(), batch.tokens.numel()
    assert ends[0] == 0 and all(a < b or a == b == n for a, b in pairwise([*ends, n]))
    return [(batch.tokens[0, a:b].tolist(), batch.targets[0, a:b].tolist()) for a, b in pairwise(ends) if a < b]


def positions_of(tokens, targets):
    """Stored positions of a segment, from the tokens that tell them; None for the lone `<|endoftext|>` of an empty document."""
    if tokens[-1]:
        return list(range(tokens[-1] - len(tokens) + 1, tokens[-1] + 1))
    return [targets[0] - 1] if targets[0] else None


def test_order_is_a_pure_function_of_seed_epoch_and_step(split, seed):
    batches, again = make_batches(split, seed), make_batches(split, seed)
    steps = list(range(3 * batches.steps_per_epoch))
    expected = {step: list(batches.step(step)) for step in steps}
    random.Random(seed).shuffle(steps)
    for step in steps:
        for a, b in zip(expected[step], again.step(step), strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and torch.equal(borders(a), borders(b))
    first = lambda batches, step: next(batches.step(step)).tokens
    assert not torch.equal(first(batches, 0), first(batches, batches.steps_per_epoch))  # another epoch
    assert not torch.equal(first(batches, 0), first(make_batches(split, seed + 1), 0))  # another seed


def test_order_stays_the_same_in_later_versions(tmp_path):
    batch = next(make_batches(make_split(tmp_path / "a", range(1, 40)), seed=5, micro_batch=1, global_batch=1).step(100))
    assert batch.tokens.tolist() == [[*range(582, 593), 0, *range(172, 176)]]


def test_epoch_covers_each_token_at_most_once_and_all_but_the_tail(split, seed):
    batches = make_batches(split, seed)
    assert batches.tokens_per_step == GLOBAL * CONTEXT
    assert batches.steps_per_epoch == split.n_tokens // (GLOBAL * CONTEXT)
    for number in range(2):
        tokens = torch.cat([batch.tokens.flatten() for batch in epoch(batches, number)])
        assert len(tokens) == batches.steps_per_epoch * batches.tokens_per_step > split.n_tokens - batches.tokens_per_step
        inside = tokens[tokens > 0]
        assert len(inside.unique()) == len(inside)
        assert (tokens == 0).sum() <= split.n_documents


def test_segments_are_pieces_of_one_document_and_at_most_context_long(split, seed):
    document_of = np.repeat(np.arange(split.n_documents), split.lengths)
    n_cut = 0
    for batch in epoch(make_batches(split, seed)):
        for i, (tokens, targets) in enumerate(segments(batch)):
            assert len(tokens) <= CONTEXT
            positions = positions_of(tokens, targets)
            if positions is None:
                continue
            assert split.take(np.array(positions)).tolist() == tokens
            assert len(set(document_of[positions])) == 1
            whole = (positions[0] - split.starts[document_of[positions[0]]]) % CONTEXT == 0
            assert whole or i == 0  # only the border of a micro-batch cuts a piece
            n_cut += not whole
    assert n_cut > 0


def test_short_documents_are_not_cut_but_by_the_border_of_a_micro_batch(tmp_path, seed):
    split = make_split(tmp_path / "short", np.random.default_rng(seed).integers(2, CONTEXT + 1, 300))
    for batch in epoch(make_batches(split, seed)):
        assert all(tokens[0] == 0 for tokens, _ in segments(batch)[1:])
        assert all(targets[-1] == 0 for _, targets in segments(batch)[:-1])


def test_target_is_the_token_stored_after(split, seed):
    for batch in epoch(make_batches(split, seed)):
        for tokens, targets in segments(batch):
            positions = positions_of(tokens, targets)
            expected = [0] if positions is None else split.take(np.array(positions) + 1).tolist()
            assert targets == expected


def test_rows_without_a_document_mask_are_the_same_stream(split, seed):
    for rows, flat in zip(epoch(make_batches(split, seed, document_mask=False)), epoch(make_batches(split, seed)), strict=True):
        assert rows.cu_seqlens is None and rows.tokens.shape == rows.targets.shape == (MICRO, CONTEXT)
        assert torch.equal(rows.tokens.flatten(), flat.tokens[0]) and torch.equal(rows.targets.flatten(), flat.targets[0])


def test_shapes_and_dtypes_never_change(split, seed):
    batches = make_batches(split, seed)
    found = [batch for number in range(5) for batch in epoch(batches, number)]
    assert {(b.tokens.shape, b.targets.shape, b.tokens.dtype, b.targets.dtype) for b in found} == {
        ((1, MICRO * CONTEXT), (1, MICRO * CONTEXT), torch.int64, torch.int64)
    }
    assert len({borders(b).shape for b in found}) == 1 and {borders(b).dtype for b in found} == {torch.int32}


def test_a_micro_batch_with_more_segments_than_likely_is_still_whole(split, seed):
    batches, narrow = make_batches(split, seed), make_batches(split, seed)
    narrow._n_segments = 1
    for a, b in zip(epoch(batches), epoch(narrow), strict=True):
        assert segments(a) == segments(b)


def test_segment_bound_is_close_to_what_occurs(tmp_path, seed):
    lengths = np.random.default_rng(seed).integers(30, 400, 3000)
    batches = make_batches(make_split(tmp_path / "a", lengths), seed, context=128, micro_batch=16, global_batch=16)
    most = max(len(segments(batch)) for batch in epoch(batches))
    assert most < len(borders(epoch(batches)[0])) - 1 < 2.5 * most


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_step_is_the_same_on_any_number_of_processes(split, seed, world_size, document_mask):
    alone = make_batches(split, seed, document_mask=document_mask)
    ranks = [make_batches(split, seed, document_mask=document_mask, rank=r, world_size=world_size) for r in range(world_size)]
    assert {r.micro_batches_per_step * world_size for r in ranks} == {alone.micro_batches_per_step} == {GLOBAL // MICRO}
    assert {(r.steps_per_epoch, r.tokens_per_step) for r in ranks} == {(alone.steps_per_epoch, alone.tokens_per_step)}
    for step in (0, 1, alone.steps_per_epoch, 2 * alone.steps_per_epoch + 1):
        dealt = [batch for turn in zip(*(r.step(step) for r in ranks), strict=True) for batch in turn]
        for ours, theirs in zip(alone.step(step), dealt, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.targets, theirs.targets)
            assert document_mask is False or torch.equal(borders(ours), borders(theirs))


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 1000, 10**9])
def test_eval_counts_every_token_once_in_stored_order(split, micro_batch, document_mask):
    batches = list(eval_batches(split, context=CONTEXT, micro_batch=micro_batch, document_mask=document_mask))
    tokens, targets = (torch.cat([getattr(b, name).flatten() for b in batches]) for name in ("tokens", "targets"))
    real = targets != IGNORED
    stored = torch.from_numpy(split.take(np.arange(split.n_tokens + 1)))
    assert torch.equal(tokens[real], stored[:-1]) and torch.equal(targets[real], stored[1:])
    assert targets[real][-1] == 0  # the end of the last story
    rows = min(micro_batch, -(-split.n_tokens // CONTEXT))
    shape = (1, rows * CONTEXT) if document_mask else (rows, CONTEXT)
    assert {b.tokens.shape for b in batches} == {b.targets.shape for b in batches} == {shape}


@pytest.mark.parametrize("micro_batch", [1, 4, 1000])
def test_eval_segments_do_not_depend_on_the_micro_batch(split, micro_batch):
    batches = list(eval_batches(split, context=CONTEXT, micro_batch=micro_batch))
    found = [segment for batch in batches for segment in segments(batch)]
    assert all(len(tokens) <= CONTEXT for tokens, _ in found)  # padding as well
    assert len({borders(b).shape for b in batches}) == 1
    real = [tokens for tokens, targets in found if IGNORED not in targets]
    assert all(set(targets) == {IGNORED} for _, targets in found if IGNORED in targets)
    documents = (split.document(i).tolist() for i in range(split.n_documents))
    expected = [ids[i : i + CONTEXT] for ids in documents for i in range(0, len(ids), CONTEXT)]
    assert len(real) == len(expected) and all(a == b for a, b in zip(real, expected, strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"micro_batch": 32, "global_batch": 512, "world_size": 3},
            r"micro_batch \(32\) × processes \(3\) must divide global_batch \(512\); try global_batch 480 or 576",
        ),
        ({"micro_batch": 8, "global_batch": 4}, r"must divide global_batch \(4\); try global_batch 8$"),
        ({"global_batch": 4000}, r"less than one step of global_batch \(4000\) × context \(16\) = 64,000; lower global_batch to \d+"),
        ({"context": 10**6}, "lower micro_batch or context, or add stories"),
        ({"context": 0}, r"context \(0\) must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank \(2\) must be from 0 to 1"),
        ({"seed": -1}, r"seed \(-1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_a_way_out(split, changes, message):
    with pytest.raises(ValueError, match=message):
        make_batches(split, **changes)


def test_the_global_batch_that_the_error_proposes_works(split):
    with pytest.raises(ValueError) as error:
        make_batches(split, global_batch=4000, world_size=2)
    proposed = int(str(error.value).split("lower global_batch to ")[1].split()[0])
    assert make_batches(split, global_batch=proposed, world_size=2).steps_per_epoch == 1


def test_negative_steps_and_sizes_are_refused(split):
    with pytest.raises(ValueError, match=r"step \(-1\)"):
        make_batches(split).step(-1)
    with pytest.raises(ValueError, match=r"micro_batch \(0\) must be at least 1"):
        next(eval_batches(split, context=CONTEXT, micro_batch=0))
