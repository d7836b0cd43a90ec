import json
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritale.common.errors import UserError
from tritale.data.tokenizer import FIXED_TOKENS, SPECIAL_TOKENS, Tokenizer

WORDS = "小熊 兔子 狐狸 森林 河边 妈妈 苹果 星星 月亮 一起 快乐 伤心 找到 回家 朋友 慢慢 突然 明天 从前 因为 所以 喜欢 帮助 看见".split()


def make_texts(seed: int, n: int = 400) -> list[str]:
    draw = random.Random(seed)
    ends = ["。", "！", "……", "：“好。”", "。\n\n　　"]
    clause = lambda: "".join(draw.choices(WORDS, k=draw.randint(2, 5)))
    return ["，".join(clause() for _ in range(draw.randint(2, 6))) + draw.choice(ends) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(make_texts(7), 500)


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return seed


anything = st.one_of(st.text(), st.lists(st.sampled_from([*WORDS, *FIXED_TOKENS, " ", "  ", "\n", "\t", "。", "🎉", "龘"])).map("".join))


@settings(max_examples=300)
@given(anything)
@example("<0x41><0xE4>")
@example("<|endoftext|>小熊<|pad|><|im_start|>")
@example("  从前，\r\n\t \u3000\u3000小熊  ")
@example("\u0301e\u0301\u200d👩‍👩‍👧🏽 龘𠮷 \x00\ufffd")
def test_every_string_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text  # special tokens are dropped


@settings(deadline=None)
@given(anything)
def test_no_text_gives_a_special_token(tokenizer, text):
    assert all(i >= len(SPECIAL_TOKENS) for i in tokenizer.encode(text))
    assert tokenizer.encode(text, bos=True) == [tokenizer.eot_id, *tokenizer.encode(text)]


def test_text_full_of_byte_names_teaches_no_byte_token():
    tokenizer = Tokenizer.train(["<0x41><0x42><|endoftext|>"] * 50, 400)
    ids = tokenizer.encode("<0x41><|endoftext|>")
    assert tokenizer.decode(ids) == "<0x41><|endoftext|>" and min(ids) >= len(FIXED_TOKENS)


def test_batch_equals_one_by_one(tokenizer, seed):
    texts = [*make_texts(seed, 50), "", "龘"]
    for bos in (False, True):
        assert tokenizer.encode_batch(texts, bos=bos) == [tokenizer.encode(text, bos=bos) for text in texts]


def test_layout_of_the_ids(tokenizer):
    ids = tokenizer._backend.get_vocab()
    assert [ids[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (tokenizer.eot_id, tokenizer.pad_id) == (0, 3)
    assert [ids[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(4, 260))
    assert sorted(ids.values()) == list(range(tokenizer.vocab_size))


def test_entries_are_readable_and_stay_inside_a_clause():
    texts = make_texts(7)
    entries = [entry for entry in Tokenizer.train(texts, 600)._backend.get_vocab() if entry not in FIXED_TOKENS]
    assert all(any(entry in text for text in texts) for entry in entries)  # pieces of the text itself, not of a byte alphabet
    assert not [entry for entry in entries if set(entry) & set("，。！…：“”\n") and len(set(entry)) > 1]
    assert {"小熊", "森林", "……"} <= set(entries)


def test_entries_have_at_most_eight_characters():
    entries = Tokenizer.train(["一二三四五六七八"] * 50 + ["一二三四五六七八九"] * 20, 400)._backend.get_vocab().keys() - set(FIXED_TOKENS)
    assert max(map(len, entries)) == 8


def test_rare_characters_become_bytes_and_lend_no_merge():
    texts = [*make_texts(7), "月龘亮"]
    tokenizer = Tokenizer.train(texts, 400)
    assert "龘" not in tokenizer._backend.get_vocab()
    assert len(tokenizer.encode("龘")) == 3
    pairs = ["甲丙"] * 40 + [f"甲{chr(0x9000 + i)}乙" for i in range(40)] + ["乙丁"] * 40 + ["天地。" * 50_000]
    entries = Tokenizer.train(pairs, 330)._backend.get_vocab()
    assert chr(0x9000) not in entries and "甲丙" in entries
    assert "甲乙" not in entries  # 40 times, but only with something between


def test_characters_leave_room_for_words():
    tokenizer = Tokenizer.train(["".join(map(chr, range(0x4E00, 0x4E00 + 300)))] * 3, len(FIXED_TOKENS) + 99)
    assert sum(len(entry) == 1 for entry in tokenizer._backend.get_vocab()) == 66 + 1  # 66 characters, and the line end
    assert tokenizer.vocab_size == len(FIXED_TOKENS) + 99


def test_vocabulary_has_the_size_asked_for_or_what_the_text_supports():
    texts = make_texts(7)
    assert Tokenizer.train(texts, 400).vocab_size == 400
    small = Tokenizer.train(texts[:20], 5000)
    assert len(FIXED_TOKENS) < small.vocab_size < 1000
    assert max(small._backend.get_vocab().values()) == small.vocab_size - 1


def test_training_is_deterministic_across_processes(tokenizer):
    code = "import json, sys; from tritale.data.tokenizer import Tokenizer; print(Tokenizer.train(json.load(sys.stdin), 500).hash)"
    run = lambda: subprocess.run([sys.executable, "-c", code], input=json.dumps(make_texts(7)), capture_output=True, text=True, check=True)
    assert {tokenizer.hash} == {run().stdout.strip() for _ in range(2)}
    assert Tokenizer.train(make_texts(8), 500).hash != tokenizer.hash


def test_save_and_load(tokenizer, tmp_path, seed):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    texts = [*make_texts(seed, 20), "<|endoftext|>龘"]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (loaded.hash, loaded.vocab_size) == (tokenizer.hash, tokenizer.vocab_size)
    path = tmp_path / "new" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # other white space
    assert Tokenizer.load(tmp_path / "new").hash == tokenizer.hash


@pytest.mark.parametrize("model_type", [None, "mistral", "qwen3"])
def test_transformers_gives_the_same_ids(tokenizer, tmp_path, seed, model_type):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    tokenizer.save(tmp_path)
    if model_type:  # as in a checkpoint: transformers picks some tokenizer classes by the model
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": tokenizer.vocab_size}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.is_fast and len(theirs) == tokenizer.vocab_size
    for text in [*make_texts(seed, 20), "", "龘 🎉  a 12.5\n\n　　完", " can't  ! "]:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text, bos=True)
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert theirs("<|im_start|>", add_special_tokens=False).input_ids == [1]
    assert theirs(["小熊", ""], padding=True).input_ids[1][0] == tokenizer.pad_id
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").hash == tokenizer.hash


def test_incomplete_bytes_become_replacement_characters_and_spare_their_neighbours(tokenizer):
    ids = tokenizer.encode("小熊龘")
    assert tokenizer.decode(ids[:-1]) == "小熊\ufffd"
    assert tokenizer.decode([*ids, ids[-1], *tokenizer.encode("好")]) == "小熊龘\ufffd好"


def test_stats():
    texts = make_texts(7)
    tokenizer = Tokenizer.train(texts, 500)
    stats = tokenizer.stats(["小熊龘", "小熊龘"])
    assert stats.chars_per_token == pytest.approx(6 / 8) and stats.byte_fallback_share == pytest.approx(6 / 8)
    counts = Counter(i < 260 for ids in tokenizer.encode_batch(texts) for i in ids)
    assert tokenizer.stats(iter(texts)).chars_per_token == pytest.approx(sum(map(len, texts)) / counts.total())
    with pytest.raises(ValueError, match="no text to measure"):
        tokenizer.stats([""])


def test_errors_name_the_value_and_the_next_step(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size \(1000000000\) must be at most 1048576"):
        Tokenizer.train(["小兔"], 10**9)
    with pytest.raises(ValueError, match=r"vocab_size \(200\) must be at least 262.*try 8192"):
        Tokenizer.train(["小熊"], 200)
    with pytest.raises(ValueError, match="2 texts, 0 characters"):
        Tokenizer.train(["", ""], 500)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing; train"):
        Tokenizer.load(tmp_path)
    for bad in (500, -1):
        with pytest.raises(ValueError, match=rf"id {bad} .* 0 to 499"):
            tokenizer.decode([bad])
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["小熊", text])):
        with pytest.raises(ValueError, match=r"character 2 of the text \('\\u718a\\udcff'\) is not valid Unicode; give the text as UTF-8"):
            encode("熊\udcff")
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[:1000])
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)
    path.write_text(whole.replace("<|im_end|>", "<|end|>"))
    with pytest.raises(ValueError, match=r"'<\|end\|>' at id 2 instead of '<\|im_end\|>'"):
        Tokenizer.load(tmp_path)


CHANGES = {
    "an id beyond the others": lambda t: t["model"]["vocab"].update({"小熊": 99_999}),
    "an id twice": lambda t: t["model"]["vocab"].update({"小熊": 300}),
    "an id below 0": lambda t: t["model"]["vocab"].update({"小熊": -1}),
    "a special token with another id": lambda t: t["post_processor"]["special_tokens"]["<|endoftext|>"].update(ids=[40_000]),
    "no special token in front": lambda t: t.update(post_processor=None),
    "another added token": lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 90_000, "content": "<x>"}),
    "no added tokens": lambda t: t.update(added_tokens=[]),
    "a normaliser": lambda t: t.update(normalizer={"type": "Lowercase"}),
    "no pre-tokenizer": lambda t: t.update(pre_tokenizer=None),
    "another pre-tokenizer": lambda t: t["pre_tokenizer"]["pattern"].update(Regex="."),
    "no byte fallback": lambda t: t["model"].update(byte_fallback=False),
    "dropout": lambda t: t["model"].update(dropout=0.5),
    "no decoder": lambda t: t.update(decoder=None),
    "a merge of unknown entries": lambda t: t["model"]["merges"].append(["龘", "龘"]),
    "no merges": lambda t: t["model"].update(merges=None),
    "an empty vocabulary": lambda t: t["model"].update(vocab={}),
    "no model": lambda t: t.pop("model"),
    "another model": lambda t: t["model"].update(type="WordPiece"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_was_changed_is_refused(tmp_path, tokenizer, change):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["小熊"] = content["model"]["vocab"].get("小熊", 499)
    CHANGES[change](content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json .*; (restore|make|train)"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_a_subword_prefix_is_refused_before_it_ends_the_process(key, tmp_path):
    Tokenizer.train(["从前有一只小兔"] * 3, 300).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"][key] = "x"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="subword prefix or suffix"):
        Tokenizer.load(tmp_path)
