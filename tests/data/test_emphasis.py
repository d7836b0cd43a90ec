"""Emphasised parts of answers: from the records' spans to the weights of targets, without a change of ids, order or splits. And the places
where tokens end."""

import json
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch

from tritale.cli.main import main
from tritale.data.batches import IGNORED, Batches
from tritale.data.chat import EMPHASIS, encode_chats, mark, without_marks
from tritale.data.shards import Split
from tritale.data.tokenizer import Tokenizer

LETTERS = "小兔公园笑说走高兴，。苹果abé𠮷"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = Random(1)
    return Tokenizer.train(["".join(rng.choices(LETTERS[:14], k=60)) for _ in range(300)], 500)


def test_tokens_with_an_emphasised_character_are_2_and_the_ids_do_not_change(tokenizer, seed):
    rng = Random(seed)
    for _ in range(300):
        answer = "".join(rng.choices(LETTERS, k=rng.randint(1, 40)))
        ends = [sorted(rng.choices(range(len(answer) + 1), k=2)) for _ in range(rng.randint(0, 4))]
        spans = [(begin, end) for begin, end in ends]
        chat = lambda content: [{"role": "user", "content": "写。"}, {"role": "assistant", "content": content}]
        borders = rng.choices(range(len(answer) + 1), k=rng.randint(0, 2))
        ((ids, flags),) = encode_chats(tokenizer, [chat(mark(answer, spans, borders))])
        ((plain_ids, learnt),) = encode_chats(tokenizer, [chat(mark(answer, borders=borders))])
        assert ids == plain_ids and [min(flag, 1) for flag in flags] == learnt
        at = 0
        for i, flag in zip(ids[learnt.index(1) : -2], flags[learnt.index(1) : -2], strict=True):
            of_bytes = [any(begin <= c < end for begin, end in spans) for c, x in enumerate(answer) for _ in x.encode()]
            n = len(tokenizer.token_bytes(i))
            assert flag == (2 if any(of_bytes[at : at + n]) else 1), (answer, spans)
            at += n
        assert at == len(answer.encode())


def test_a_token_ends_at_each_border_and_the_text_stays(tokenizer, seed):
    rng = Random(seed)
    n_other = 0
    for _ in range(200):
        answer = "".join(rng.choices(LETTERS, k=rng.randint(1, 40)))
        borders = rng.choices(range(len(answer) + 1), k=rng.randint(0, 4))
        marked = mark(answer, [(0, len(answer) // 2)], borders)
        assert without_marks(marked) == answer
        ((ids, flags),) = encode_chats(tokenizer, [[{"role": "user", "content": "写。"}, {"role": "assistant", "content": marked}]])
        content = [i for i, flag in zip(ids, flags, strict=True) if flag][:-1]
        parts = [answer[a:b] for a, b in pairwise([0, *sorted(borders), len(answer)])]
        assert content == [i for part in parts for i in tokenizer.encode(part)]
        n_other += content != tokenizer.encode(answer)
    assert n_other > 20


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    """A prepared folder of conversations, half of them with emphasis, and the answer of each with its spans."""
    folder = tmp_path_factory.mktemp("emphasis")
    tokenizer.save(folder / "tokenizer")
    rng, records = Random(2), []
    for i in range(400):
        answer = "".join(rng.choices(LETTERS[:14], k=30)).strip()
        begin = rng.randrange(20)
        records.append({"instruction": f"写第{i}个。", "output": answer, "emphasis": [[begin, begin + 4]] if i % 2 else []})
    (folder / "chats.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    main(["prepare", "--task", "sft", "--input", str(folder / "chats.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--context", "128",
          "--workers", "1", "--out", str(folder / "data")])  # fmt: skip
    return folder / "data", {r["output"]: r["emphasis"] for r in records}


def test_prepare_keeps_the_spans_of_each_record(prepared, tokenizer):
    folder, spans = prepared
    split = Split.open(folder / "train")
    for i in range(split.n_documents):
        ids, places = split.document(i), np.arange(split.starts[i], split.starts[i + 1])
        answer = tokenizer.decode(ids[split.is_learnt(places)].tolist())
        marked = tokenizer.decode(ids[split.is_emphasised(places)].tolist())
        assert EMPHASIS not in answer
        ((begin, end),) = spans[answer] or [(0, 0)]
        assert answer[begin:end] in marked and bool(marked) == bool(spans[answer])
        assert len(marked) <= end - begin + 14  # tokens overlap its ends


def test_emphasis_multiplies_the_weight_of_its_targets_and_of_no_other(prepared):
    split = Split.open(prepared[0] / "train")
    options: dict = {"context": 128, "micro_batch": 2, "global_batch": 4, "seed": 3}
    plain, weighted = Batches(split, **options), Batches(split, **options, emphasis=8.0)
    for step in range(4):
        total, n_emphasised, n_learnt = 0.0, 0, 0
        for a, b in zip(plain.step(step), weighted.step(step), strict=True):
            assert torch.equal(a.targets, b.targets) and a.weights is None and b.weights is not None
            assert set(b.weights.unique().tolist()) == {0.0, 1.0, 8.0}
            assert torch.equal(b.weights == 0, b.targets == IGNORED)
            total, n_emphasised = total + float(b.weights.sum()), n_emphasised + int((b.weights == 8).sum())
            n_learnt += int((b.targets != IGNORED).sum())
        assert weighted.n_targets(step) == total == n_learnt + 7 * n_emphasised and plain.n_targets(step) == n_learnt


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("emphasis", value, "an emphasis that is not [[begin, end], …]") for value in ([[3]], [[0, 99]], [[-1, 2]], "0-3", [[0, 1.5]])]
    + [("borders", value, "borders that are not [i, …]") for value in ([[3]], [99], [-1], "3", [1.5], [True])],
)
def test_places_outside_of_the_answer_are_named_by_file_and_line(tokenizer, tmp_path, key, value, expected):
    tokenizer.save(tmp_path / "tokenizer")
    record = {"instruction": "写。", "output": "小兔笑。", key: value}
    (tmp_path / "chats.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["prepare", "--task", "sft", "--input", str(tmp_path / "chats.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"),
              "--context", "64", "--workers", "1", "--out", str(tmp_path / "data")])  # fmt: skip
    assert f"chats.jsonl:1: {expected}" in str(caught.value)


def test_a_share_of_the_conversations_ends_after_its_last_emphasised_token(prepared):
    split = Split.open(prepared[0] / "train")
    of = [split.document(i).tolist() for i in range(split.n_documents)]
    last = [np.flatnonzero(split.is_emphasised(np.arange(a, b))) for a, b in pairwise(split.starts)]
    cut = {tuple(ids[: found[-1] + 1]) for ids, found in zip(of, last, strict=True) if len(found)}
    whole = set(map(tuple, of))
    for share in (0.5, 1.0):
        batches = Batches(split, context=128, micro_batch=2, global_batch=2, seed=4, cut_share=share)
        n_cut = n_whole = 0
        for step in range(batches.steps_per_epoch):
            (batch,) = batches.step(step)
            assert batch.cu_seqlens is not None
            bounds = batch.cu_seqlens.unique().tolist()
            for begin, end in list(pairwise(bounds))[1:-1]:  # the first and the last may be cut by the micro-batch
                ids = tuple(batch.tokens[0, begin:end].tolist())
                assert ids in cut or ids in whole
                n_cut, n_whole = n_cut + (ids in cut), n_whole + (ids in whole)
        assert n_cut > 10 and n_whole > 10, (share, n_cut, n_whole)
        expected = share / 2  # half of the records have emphasis
        assert abs(n_cut / (n_cut + n_whole) - expected) < 0.15
    assert batches.steps_per_epoch < Batches(split, context=128, micro_batch=2, global_batch=2, seed=4).steps_per_epoch
