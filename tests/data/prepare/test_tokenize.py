import random
import sys
from itertools import chain

import numpy as np
import pytest

from tritale.data.prepare.tokenize import BulkEncoder
from tritale.data.tokenizer import Tokenizer
from tritale.stories.generator import story

SPECIAL = [*list("  \t\n\r\u3000\xa0一二三的，。……——！！ab1２Ⅷ²é😀😀'<>|"), "\r\n", "  ", " a", "́", "\u200d", "<|endoftext|>", "<0x41>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([story(3, i).text for i in range(200)] + ["hello world, it is 12 o'clock", "１２３"], 1200)


def draw_texts(draw: random.Random) -> list[str]:
    rare = [chr(draw.choice([draw.randrange(0x3000), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(40)]
    texts = ["".join(draw.choices(SPECIAL + rare, k=draw.randrange(40))) for _ in range(draw.randrange(1, 30))]
    return [*texts, story(draw.randrange(2**30), 0).text, ""]


def agrees(encoder: BulkEncoder, tokenizer: Tokenizer, draw: random.Random) -> None:
    texts = draw_texts(draw)
    ids, lengths = encoder.encode(texts)
    expected = tokenizer.encode_batch(texts, bos=True)
    assert lengths.tolist() == [len(i) for i in expected]
    assert ids.tolist() == list(chain.from_iterable(expected)) and ids.dtype == np.uint16


def test_ids_are_those_of_tokenizers(tokenizer, seed):
    pytest.importorskip("fastokens", reason="fastokens is not installed (pip install fastokens)")
    draw, encoder = random.Random(seed), BulkEncoder(tokenizer)
    assert not encoder.is_fallback
    for _ in range(300):
        agrees(encoder, tokenizer, draw)


@pytest.mark.parametrize("mark", ["！", "\0", "……", "=", "\n"])
def test_long_runs_of_a_mark_are_encoded(tokenizer, mark):
    texts = ["从前。", "小兔大喊：“救命" + mark * 8000 + "”", "完。"]
    ids, lengths = BulkEncoder(tokenizer).encode(texts)
    expected = tokenizer.encode_batch(texts, bos=True)
    assert ids.tolist() == list(chain.from_iterable(expected)) and lengths.tolist() == [len(i) for i in expected]


def test_without_fastokens_tokenizers_does_it(tokenizer, seed, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    encoder = BulkEncoder(tokenizer)
    assert encoder.is_fallback
    for _ in range(20):
        agrees(encoder, tokenizer, random.Random(seed))
