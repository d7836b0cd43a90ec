import hashlib
import json
import random
import shutil
from typing import cast

import numpy as np
import pytest

from tritale.common.errors import UserError
from tritale.data.shards import Split, SplitWriter, evenly, open_at, write_split
from tritale.data.tokenizer import Tokenizer


class CharTokenizer:
    """Code points as ids: shards of any vocabulary size without training."""

    hash = "of-the-test"

    def __init__(self, vocab_size: int = 0x4000):
        self.vocab_size = vocab_size

    def encode_batch(self, texts, bos):
        return [[0] * bos + [ord(c) % self.vocab_size for c in text] for text in texts]


def char_tokenizer(vocab_size: int = 0x4000) -> Tokenizer:
    return cast(Tokenizer, CharTokenizer(vocab_size))


def draw_texts(n: int = 50) -> list[str]:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    draw = random.Random(seed)
    return ["".join(chr(draw.randint(1, 0x3FFF)) for _ in range(draw.randint(0, 30))) for _ in range(n)]


@pytest.fixture
def split(tmp_path) -> Split:
    return write_split(tmp_path / "train", draw_texts(), char_tokenizer(), max_shard_tokens=200)


@pytest.mark.parametrize("max_shard_tokens", [1, 100, 2**27])
def test_documents_come_back(tmp_path, max_shard_tokens):
    texts = draw_texts()
    write_split(tmp_path / "a", iter(texts), char_tokenizer(), max_shard_tokens=max_shard_tokens)
    split = Split.open(tmp_path / "a")
    expected = char_tokenizer().encode_batch(texts, bos=True)
    assert [split.document(i).tolist() for i in range(split.n_documents)] == expected
    assert split.lengths.tolist() == [len(ids) for ids in expected]
    assert (split.n_tokens, split.n_documents, split.characters) == (sum(map(len, expected)), len(texts), sum(map(len, texts)))
    assert (split.vocab_size, split.tokenizer_hash, split.entropy_bits) == (0x4000, "of-the-test", None)
    if max_shard_tokens == 1:
        assert len(split.shards) == len(texts)  # a document is never cut
    if max_shard_tokens == 100:
        assert len(split.shards) > 1 and max(map(len, split.shards)) <= 100


def test_take_reads_across_shards_and_ends_with_the_end_of_the_text(split):
    whole = np.concatenate([*split.shards, [0]]).astype(np.int64)
    positions = np.random.default_rng().integers(0, split.n_tokens + 1, 1000)
    assert len(split.shards) > 2
    assert np.array_equal(split.take(positions), whole[positions])
    assert split.take(np.array([split.n_tokens])).tolist() == [0]


def test_texts_are_read_in_turns_and_keep_their_order(tmp_path):
    n_read = n_encoded = 0

    def texts():
        nonlocal n_read
        for n_read in range(1, 2501):
            yield chr(n_read)

    class Watched(CharTokenizer):
        def encode_batch(self, texts, bos):
            nonlocal n_encoded
            n_encoded += len(texts)
            assert n_read == n_encoded and len(texts) <= 1024
            return super().encode_batch(texts, bos)

    split = write_split(tmp_path / "a", texts(), cast(Tokenizer, Watched()))
    assert split.take(split.starts[:-1] + 1).tolist() == list(range(1, 2501))


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    split = write_split(tmp_path / "a", [chr(top)], char_tokenizer(vocab_size))
    assert split.shards[0].dtype == dtype and split.document(0).tolist() == [0, top]
    assert (tmp_path / "a" / "tokens-00000.bin").read_bytes() == np.array([0, top], f"<u{np.dtype(dtype).itemsize}").tobytes()


def test_the_entropy_is_kept(tmp_path):
    assert write_split(tmp_path / "b", ["x"], char_tokenizer(), entropy_bits=3.0).entropy_bits == 3.0


def test_index_holds_the_checksums_of_the_files(split):
    index = json.loads((split.folder / "index.json").read_text())
    for entry in [*index["shards"], index["starts"]]:
        assert hashlib.sha256((split.folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert sum(shard["documents"] for shard in index["shards"]) == index["documents"] == split.n_documents


@pytest.mark.parametrize("name", ["tokens-00001.bin", "starts.bin"])
def test_damage_to_a_file_is_named(split, name):
    path = split.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    for verify in (True, False):
        with pytest.raises(ValueError, match=f"{name} has {len(whole) - 8:,} bytes instead of {len(whole):,}"):
            Split.open(split.folder, verify=verify)
    altered = bytearray(whole)
    altered[random.randrange(len(whole) - 8)] ^= 1  # not in the last start, whose disagreement shows without the checksum
    path.write_bytes(altered)
    Split.open(split.folder, verify=False)
    found, expected = hashlib.sha256(altered).hexdigest(), hashlib.sha256(whole).hexdigest()
    with pytest.raises(ValueError, match=f"{name} is damaged: its sha256 is {found} instead of {expected}"):
        Split.open(split.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        Split.open(split.folder)


def seal(index: dict) -> str:
    """The JSON of an index with the checksum of its content."""
    index = {key: value for key, value in index.items() if key != "sha256"}
    return json.dumps(index | {"sha256": hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, "has version 3 of the format, this tritale reads versions up to 2; update tritale"),
        ({"version": 2}, "is damaged: shards is"),  # without the files that version 2 has
        ({"version": 0}, "has version 0 of the format, this tritale reads versions up to 2; delete the folder"),
        ({"version": None}, "is not the index of a token split"),
        ({"version": True}, "is not the index of a token split"),
        ({"format": "other"}, "is not the index of a token split"),
        ({"documents": 0}, "holds 0 documents"),
        ({"dtype": "object"}, "damaged: dtype is 'object'"),
        ({"shards": None}, "damaged: shards is 'None'"),
        ({"tokens": 12345}, "has contradictory numbers of tokens"),
        ({"vocab_size": 5}, "has the token id .* but its vocabulary has 5 entries"),
        ({"more": 1}, "does not match its checksum"),
    ],
)
def test_damage_to_the_index_is_named(split, change, message):
    path = split.folder / "index.json"
    path.write_text(seal(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Split.open(split.folder)


def test_an_index_without_a_checksum_is_read_and_one_with_another_content_is_not(split):
    path = split.folder / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"characters": index["characters"] + 1}))
    with pytest.raises(UserError, match="does not match its checksum; delete the folder"):
        Split.open(split.folder, verify=False)
    path.write_text(json.dumps(index | {"sha256": None}))
    with pytest.raises(UserError, match="does not match its checksum"):
        Split.open(split.folder)
    del index["sha256"]
    path.write_text(json.dumps(index))
    assert Split.open(split.folder).n_tokens == split.n_tokens


def test_starts_out_of_order_are_damage(split):
    starts = split.starts.copy()
    starts[3], starts[4] = starts[4], starts[3]
    starts.tofile(split.folder / "starts.bin")
    index = json.loads((split.folder / "index.json").read_text())
    index["starts"]["sha256"] = hashlib.sha256(starts.tobytes()).hexdigest()
    (split.folder / "index.json").write_text(seal(index))
    with pytest.raises(UserError, match=r"starts\.bin is damaged"):
        Split.open(split.folder)


def test_index_that_is_cut_off_or_missing_is_no_split(split):
    path = split.folder / "index.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON .*; delete the folder"):
        Split.open(split.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no finished token split; make the data again"):
        Split.open(split.folder)


def test_a_writer_that_fails_leaves_the_old_split_and_nothing_else(split):
    before = split.take(np.arange(split.n_tokens))

    def texts():
        yield from draw_texts(3000)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_split(split.folder, texts(), char_tokenizer())
    assert np.array_equal(Split.open(split.folder).take(np.arange(split.n_tokens)), before)
    assert [path.name for path in split.folder.parent.iterdir()] == ["train"]


def test_leftovers_of_a_killed_writer_are_no_split_and_do_not_disturb_the_next(split):
    aside = split.folder.with_name("train.partial")
    shutil.copytree(split.folder, aside)
    (aside / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished token split"):
        Split.open(aside)
    assert write_split(split.folder, ["new"], char_tokenizer()).n_documents == 1  # replaces the old one
    assert Split.open(split.folder).document(0).tolist() == [0, *map(ord, "new")]
    assert sorted(path.name for path in split.folder.iterdir()) == ["index.json", "starts.bin", "tokens-00000.bin"]
    assert not aside.exists()


def test_a_folder_that_is_not_a_split_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a token split, so it is not overwritten"):
        write_split(tmp_path, ["x"], char_tokenizer())
    assert (tmp_path / "thesis.txt").exists()


def test_no_documents_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no documents to write"):
        write_split(tmp_path / "a", [], char_tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_writer_goes_on_from_its_last_commit_to_the_same_bytes(tmp_path):
    texts = draw_texts(60)
    whole = write_split(tmp_path / "whole", texts, char_tokenizer(), max_shard_tokens=200)

    def add(writer, some):
        ids = char_tokenizer().encode_batch(some, bos=True)
        writer.add(
            np.concatenate([np.zeros(0), *ids]).astype(writer.dtype), np.array([len(i) for i in ids]), characters=sum(map(len, some))
        )

    cut = random.randrange(60)
    writer = SplitWriter(tmp_path / "a", char_tokenizer(), max_shard_tokens=200)
    add(writer, texts[:cut])
    state = json.loads(json.dumps(writer.commit()))
    add(writer, draw_texts(40))  # lost with the process
    writer.commit()
    again = SplitWriter(tmp_path / "a", char_tokenizer(), max_shard_tokens=200, state=state)
    add(again, texts[cut:])
    again.finish()
    for path in whole.folder.iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "a").iterdir())) == len(list(whole.folder.iterdir()))


def test_what_was_written_after_the_last_commit_is_cut_off(tmp_path):
    path = tmp_path / "documents.bin"
    path.write_bytes(b"committed, and more")
    with open_at(path, 9) as file:
        file.write(b"!")
    assert path.read_bytes() == b"committed!"
    with pytest.raises(UserError, match=r"documents\.bin has 10 bytes instead of at least 11"):
        open_at(path, 11)


def test_evenly_takes_first_last_and_no_more_than_asked():
    assert list(evenly(5, 9)) == [0, 1, 2, 3, 4]
    assert list(evenly(101, 3)) == [0, 50, 100]
