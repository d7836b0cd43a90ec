"""Conversations: their ids, which of them are learnt, their preparation, and their batches."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tritale.common.errors import UserError
from tritale.data.batches import IGNORED, Batches, PairBatches, eval_batches, pair_batches
from tritale.data.built_in import open_data
from tritale.data.chat import chat_prompt, chat_text, encode_chats, parse_chat, prompt_ids
from tritale.data.prepare import conversations
from tritale.data.prepare.conversations import ChatFields
from tritale.data.prepare.pipeline import Options, prepare
from tritale.data.shards import Split, with_replay, write_split
from tritale.data.tokenizer import Tokenizer
from tritale.stories.generator import story

CONTEXT = 96


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer.train([story(1, i).text for i in range(300)], 1000)
    tokenizer.is_chat = True
    tokenizer.save(folder, context=CONTEXT)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def draw_chats(n: int, *, turns: int = 2) -> list[list[dict[str, str]]]:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    piece = lambda: story(2, rng.randrange(10**6)).text[rng.randrange(8) :][: rng.randint(1, 16)].strip() or "好"
    roles = [["system"], []][rng.randrange(2)] + ["user", "assistant"] * (turns // 2)
    return [[{"role": role, "content": piece()} for role in roles] for _ in range(n)]


def samples(n: int) -> list[dict]:
    return [{"messages": chat} for chat in draw_chats(n)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(folder: Path, rows: list[dict], tokenizer_folder: Path, *, task: str = "sft", **options) -> tuple[Split, Split]:
    fields = ChatFields(tokenizer=str(tokenizer_folder), context=CONTEXT, task=task)
    source = write_jsonl(folder / "samples.jsonl", rows)
    prepare([str(source)], folder / "out", Options(fields=fields, tokenizer=str(tokenizer_folder), **options), workers=1)
    return open_data(folder / "out")[1:]


# --- ids and which are learnt ------------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_apply_chat_template(tokenizer, tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    unusual = [{"role": "user", "content": "\n\n 你好\n"}, {"role": "assistant", "content": " 龘，hello \n 好。\n\n"}]
    for chat in [*draw_chats(20, turns=4), unusual]:
        ids = theirs.apply_chat_template(chat, return_dict=False)
        assert encode_chats(tokenizer, [chat])[0][0] == ids
        assert theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False) == prompt_ids(tokenizer, chat[:1])
        assert theirs.decode(ids) == "<|endoftext|>" + chat_text(chat)
        assert chat_prompt(chat) == chat_text(chat) + "<|im_start|>assistant\n"


def test_the_answers_and_their_ends_are_learnt(tokenizer):
    chats = draw_chats(10, turns=4)
    for chat, (ids, learnt) in zip(chats, encode_chats(tokenizer, chats), strict=True):
        runs, end = [], False
        for i, flag in zip(ids, learnt, strict=True):
            if flag and not end:
                runs.append([])
            if flag:
                runs[-1].append(i)
            end = bool(flag)
        assert [run.pop() for run in runs] == [tokenizer.im_end_id] * 2
        assert [tokenizer.decode(run) for run in runs] == [m["content"] for m in chat if m["role"] == "assistant"]
        assert parse_chat(chat_text(chat)) == chat


# --- prepare -----------------------------------------------------------------------------------------------------------------------------


def test_prepare_keeps_every_conversation_with_its_mask(tokenizer, tokenizer_folder, tmp_path):
    rows = samples(80)
    splits = prepared(tmp_path, rows, tokenizer_folder, max_shard_tokens=400)
    assert len(splits[0].shards) > 1
    found = {}
    for split in splits:
        for i in range(split.n_documents):
            at = np.arange(split.starts[i], split.starts[i + 1])
            found[tuple(split.take(at).tolist())] = split.is_learnt(at).astype(int).tolist()
    assert found == {tuple(ids): learnt for ids, learnt in encode_chats(tokenizer, [row["messages"] for row in rows])}
    assert sum(split.characters for split in splits) == sum(
        len(row["messages"][-1]["content"]) for row in {str(r): r for r in rows}.values()
    )
    assert json.loads((tmp_path / "out/train/index.json").read_text())["version"] == 2
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").is_chat


def test_the_length_of_a_conversation_is_counted_once(tokenizer_folder, tmp_path, monkeypatch):
    """Its input is read twice; a conversation that is too long is left out both times."""
    counted = []
    monkeypatch.setattr(conversations, "encode_chats", lambda tokenizer, chats: counted.append(chats) or encode_chats(tokenizer, chats))
    rows = [*samples(40), {"messages": [{"role": "user", "content": "写"}, {"role": "assistant", "content": "好的，" * CONTEXT}]}]
    splits = prepared(tmp_path, rows, tokenizer_folder, skip_errors=True)
    n_different = len({chat_text(row["messages"]) for row in rows})
    assert len(counted) == n_different and sum(split.n_documents for split in splits) == n_different - 1


def test_damage_to_which_tokens_are_learnt_is_named(tokenizer_folder, tmp_path):
    prepared(tmp_path, samples(30), tokenizer_folder)
    path = tmp_path / "out" / "train" / "learnt-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([1 - whole[0]]) + whole[1:])
    with pytest.raises(UserError, match=r"learnt-00000\.bin is damaged: its sha256"):
        Split.open(path.parent)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"learnt-00000\.bin has \S+ bytes instead of"):
        Split.open(path.parent)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"learnt-00000\.bin is missing"):
        Split.open(path.parent)


def test_alpaca_and_the_fields_of_stories_become_messages(tokenizer, tokenizer_folder, tmp_path):
    rows = [
        {"instruction": "写一个故事。", "input": "小兔", "output": "从前有一只小兔。"},
        {"instruction": "写一个故事。", "output": "从前有一只小猫。"},
        {"特点": "对话", "词汇": ["苹果", "高兴"], "故事": "从前有一只小狗。"},
        {"词汇": "苹果", "摘要": "", "随机句子": "它笑了。", "故事": "从前有一只小熊。"},
    ]
    splits = prepared(tmp_path, rows, tokenizer_folder, val_documents=1)
    texts = {tokenizer.decode(split.document(i).tolist()) for split in splits for i in range(split.n_documents)}
    assert texts == {
        "user\n写一个故事。\n小兔\nassistant\n从前有一只小兔。\n",
        "user\n写一个故事。\nassistant\n从前有一只小猫。\n",
        "user\n写一个故事。\n特点：对话\n词汇：苹果，高兴\nassistant\n从前有一只小狗。\n",
        "user\n写一个故事。\n词汇：苹果\n随机句子：它笑了。\nassistant\n从前有一只小熊。\n",
    }


def test_an_answer_is_in_one_split_whatever_was_asked(tokenizer_folder, tmp_path):
    answers = [chat[-1] for chat in draw_chats(40)]
    rows = [{"messages": [{"role": "user", "content": f"第{k}次，写一个故事。"}, answer]} for k in range(4) for answer in answers]
    splits = prepared(tmp_path, rows, tokenizer_folder, val_fraction=0.3)

    def answers_of(split: Split) -> set[tuple]:
        parts = [np.arange(a, b) for a, b in pairwise(split.starts)]
        return {tuple(split.take(at)[split.is_learnt(at)]) for at in parts}

    train, validation = map(answers_of, splits)
    assert train and validation and not train & validation


GOOD = {"messages": [{"role": "user", "content": "写。"}, {"role": "assistant", "content": "从前。"}]}


def with_answer(content: object, role: str = "assistant") -> dict:
    return {"messages": [GOOD["messages"][0], {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (with_answer(" \n"), "an empty response: message 2"),
        (with_answer("从前有一只小兔。" * 40), "longer than the context of 96 tokens: "),
        (with_answer("从前。", "teacher"), "message 2 has the role 'teacher'; the roles are system, user, assistant"),
        (with_answer("从前。", "user"), "a conversation without an answer"),
        (with_answer(None), "message 2 has no role and content"),
        (with_answer("从前。<|im_end|>"), "message 2 contains <|im_start|>, <|im_end|>"),
        (with_answer("从前\x1a小兔"), "U+001A or U+0016, which separate"),
        ({"messages": []}, "messages is not a list"),
        ({"instruction": "写。"}, "no text under 'output'; keys there: instruction"),
        ({"词汇": "苹果"}, "no text under '故事'"),
        ({"故事": "从前。"}, "no requirement"),
        ({"text": "从前。"}, "no conversation; it needs messages; instruction and output; or 故事"),
    ],
)
def test_a_bad_sample_is_named_by_file_and_line(row, message, tokenizer_folder, tmp_path):
    rows = [GOOD, *samples(3), row]
    with pytest.raises(UserError, match=r"samples\.jsonl:5: ") as caught:
        prepared(tmp_path, rows, tokenizer_folder)
    assert message in str(caught.value)
    splits = prepared(tmp_path, rows, tokenizer_folder, skip_errors=True, val_documents=1)
    assert sum(split.n_documents for split in splits) == len({str(r) for r in rows}) - 1


# --- batches -----------------------------------------------------------------------------------------------------------------------------


def test_only_answers_are_targets_and_the_rest_of_a_cut_one_is_not(tokenizer, tokenizer_folder, tmp_path):
    split, _ = prepared(tmp_path, samples(150), tokenizer_folder)
    batches = Batches(split, context=CONTEXT, micro_batch=2, global_batch=4, seed=7)
    whole = {tuple(split.document(i).tolist()): i for i in range(split.n_documents)}
    n_cut = n_learnt = 0
    for step in range(batches.steps_per_epoch):
        for batch in batches.step(step):
            tokens, targets = batch.tokens[0], batch.targets[0]
            assert batch.cu_seqlens is not None
            borders = batch.cu_seqlens.unique().tolist()
            for begin, end in pairwise(borders):
                part = tokens[begin:end].tolist()
                if part[0] != tokenizer.eot_id:  # the rest of one that was cut
                    assert (targets[begin:end] == IGNORED).all()
                    n_cut += 1
                    continue
                (document,) = [i for ids, i in whole.items() if list(ids[: len(part)]) == part][:1]
                at = np.arange(split.starts[document], split.starts[document] + len(part)) + 1
                expected = np.where(split.is_learnt(at), split.take(at), IGNORED)
                assert targets[begin:end].tolist() == expected.tolist()
        found = sum(int((batch.targets != IGNORED).sum()) for batch in batches.step(step))
        assert batches.n_targets(step) == found
        n_learnt += found
    assert n_cut and n_learnt
    for rank in (0, 1):  # the divisor is that of all processes
        parts = Batches(split, context=CONTEXT, micro_batch=2, global_batch=4, seed=7, rank=rank, world_size=2)
        assert parts.n_targets(3) == batches.n_targets(3)
    with pytest.raises(UserError, match=r"data\.document_mask true"):
        Batches(split, context=CONTEXT, micro_batch=2, global_batch=4, seed=7, document_mask=False)
    with pytest.raises(UserError, match=f"conversations longer than the context of {int(split.lengths.max()) - 1} tokens"):
        Batches(split, context=int(split.lengths.max()) - 1, micro_batch=2, global_batch=4, seed=7)


def test_validation_counts_each_answer_once(tokenizer, tokenizer_folder, tmp_path):
    split, _ = prepared(tmp_path, samples(60), tokenizer_folder)
    targets = torch.cat([batch.targets[0] for batch in eval_batches(split, context=CONTEXT, micro_batch=2)])
    learnt = split.take(np.arange(split.n_tokens))[split.is_learnt(np.arange(split.n_tokens))]
    assert targets[targets != IGNORED].tolist() == learnt.tolist()


def test_replay_is_the_share_asked_for_and_all_of_it_is_learnt(tokenizer, tokenizer_folder, tmp_path):
    split, _ = prepared(tmp_path, samples(150), tokenizer_folder)
    plain = write_split(tmp_path / "plain", (story(3, i).text for i in range(300)), tokenizer)
    mixed = with_replay(split, plain, 0.25)
    n_replayed = mixed.n_tokens - split.n_tokens
    assert n_replayed == pytest.approx(0.25 * mixed.n_tokens, rel=0.15)  # ten documents
    at = np.arange(mixed.n_tokens)
    assert (mixed.is_learnt(at)[: split.n_tokens] == split.is_learnt(at[: split.n_tokens])).all() and mixed.is_learnt(at)[
        split.n_tokens :
    ].all()
    documents = {tuple(mixed.document(i)) for i in range(split.n_documents, mixed.n_documents)}
    assert documents and documents <= {tuple(plain.document(i)) for i in range(plain.n_documents)}
    Batches(mixed, context=CONTEXT, micro_batch=2, global_batch=4, seed=7)  # stories longer than the context are cut, as in pre-training


# --- pairs -------------------------------------------------------------------------------------------------------------------------------


def pairs(n: int) -> list[dict]:
    chats, others = draw_chats(n), draw_chats(n)
    rows = [
        {"prompt": chat[:-1], "chosen": chat[-1]["content"], "rejected": [other[-1]]} for chat, other in zip(chats, others, strict=True)
    ]
    return [row for row in rows if row["chosen"] != row["rejected"][0]["content"]]


def test_pairs_stay_together_and_carry_their_reference(tokenizer, tokenizer_folder, tmp_path):
    rows = pairs(60)
    split, _ = prepared(tmp_path, rows, tokenizer_folder, task="dpo")
    both = [[[*row["prompt"], {"role": "assistant", "content": row["chosen"]}], [*row["prompt"], *row["rejected"]]] for row in rows]
    expected = {tuple(tuple(ids) for ids, _ in encode_chats(tokenizer, chats)) for chats in both}
    reference = torch.arange(2.0 * split.n_documents).view(-1, 2)
    batches = PairBatches(split, reference, context=CONTEXT, micro_batch=6, global_batch=12, seed=3, rank=0, world_size=1)
    stored = pair_batches(split, context=CONTEXT, micro_batch=6)

    def answers(batch, i: int) -> tuple:
        borders = batch.cu_seqlens[2 * i : 2 * i + 3].tolist()
        return tuple(tuple(batch.tokens[0, a:b].tolist()) for a, b in pairwise(borders))

    order = [answers(batch, i) for batch in stored for i in range(3)][: split.n_documents]
    assert set(order) <= expected
    seen = []
    for step in range(batches.steps_per_epoch):
        for batch in batches.step(step):
            for i in range(3):
                assert batch.reference is not None
                assert answers(batch, i) == order[int(batch.reference[i, 0]) // 2]
                seen.append(int(batch.reference[i, 0]) // 2)
    assert len(set(seen)) == len(seen) == batches.steps_per_epoch * 6
    with pytest.raises(UserError, match="set objective dpo"):
        Batches(split, context=CONTEXT, micro_batch=2, global_batch=4, seed=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "从前。"}, "a pair of equal answers"),
        ({"rejected": ""}, "an empty response"),
        ({"chosen": 3}, "no text under 'chosen'"),
    ],
)
def test_a_bad_pair_is_named_by_file_and_line(change, message, tokenizer_folder, tmp_path):
    rows = [*pairs(4)[:3], {"prompt": "写。", "chosen": "从前。", "rejected": "后来。"} | change]
    with pytest.raises(UserError, match=rf"samples\.jsonl:4: .*{message}"):
        prepared(tmp_path, rows, tokenizer_folder, task="dpo")
