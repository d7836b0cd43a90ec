import random
from itertools import chain

import numpy as np
import pytest

from tritale.data.piece_encoder import PieceEncoder
from tritale.data.stories import story
from tritale.data.tokenizer import Tokenizer

SPECIAL = [*list("  \t\n\r\u3000\xa0一二三的，。……——！！ab1２Ⅷ²é😀😀'<>|"), "\r\n", "  ", " a", "́", "\u200d", "<|endoftext|>", "<0x41>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([story(3, i).text for i in range(200)] + ["hello world, it is 12 o'clock", "１２３"], 1200)


def draw_texts(draw: random.Random) -> list[str]:
    rare = [chr(draw.choice([draw.randrange(0x3000), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(40)]
    texts = ["".join(draw.choices(SPECIAL + rare, k=draw.randrange(40))) for _ in range(draw.randrange(1, 30))]
    return [*texts, story(draw.randrange(2**30), 0).text, ""]


def test_ids_are_those_of_the_library(tokenizer, seed):
    draw, encoder = random.Random(seed), PieceEncoder(tokenizer)
    for _ in range(150):
        texts = draw_texts(draw)
        ids, lengths = encoder.encode(texts)
        expected = tokenizer.encode_batch(texts, bos=True)
        assert lengths.tolist() == [len(i) for i in expected]
        assert ids.tolist() == list(chain.from_iterable(expected)) and ids.dtype == np.uint16


def test_a_full_cache_changes_nothing(tokenizer, seed, monkeypatch):
    monkeypatch.setattr("tritale.data.piece_encoder.MAX_CACHED", 5)
    draw, encoder = random.Random(seed), PieceEncoder(tokenizer)
    for _ in range(20):
        texts = draw_texts(draw)
        assert encoder.encode(texts)[0].tolist() == list(chain.from_iterable(tokenizer.encode_batch(texts, bos=True)))


def test_a_tokenizer_that_cuts_otherwise_is_encoded_by_the_library(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    other = path.read_text(encoding="utf-8").replace(r"\\p{N}|(", r"\\p{N}+|(", 1)
    path.write_text(other, encoding="utf-8")
    changed = Tokenizer.load(tmp_path)
    assert changed.hash != tokenizer.hash and not PieceEncoder(changed)._is_by_pieces
    ids, lengths = PieceEncoder(changed).encode(["1212 一", ""])
    assert ids.tolist() == list(chain.from_iterable(changed.encode_batch(["1212 一", ""], bos=True))) and lengths[1] == 1
