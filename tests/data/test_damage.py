"""Damage to each file of a data folder is reported as one line: never silent, and never another exception."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data_damage import matrix
from tritale.common.errors import UserError
from tritale.data.built_in import open_data, write_built_in
from tritale.data.prepare.pipeline import Options, prepare
from tritale.data.shards import COUNTS
from tritale.stories.generator import story

FILES = ("train/index.json", "train/starts.bin", "train/tokens-00000.bin", "validation/index.json", "validation/starts.bin")
FILES += ("validation/tokens-00000.bin", "tokenizer/tokenizer.json")
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    10**9,
    10**30,
    0.5,
    float("nan"),
    "",
    "x",
    "../../x",
    [],
    [[]],
    [{}],
    {},
    {"file": "../x", "sha256": "", "tokens": 1},
)


def seal(index: dict) -> str:
    """The JSON of an index with the checksum of its content."""
    index = {key: value for key, value in index.items() if key != "sha256"}
    return json.dumps(index | {"sha256": hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """Two data folders of different stories."""
    folders = tmp_path_factory.mktemp("a") / "data", tmp_path_factory.mktemp("b") / "data"
    for seed, folder in enumerate(folders):
        write_built_in(folder, seed=seed, stories=40, validation_stories=10, vocab_size=300)
    return folders


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def damages(name: str, data: bytes, other: bytes, draw: random.Random) -> list[bytes | None]:
    """Contents in place of `data`, None for a missing file."""
    changed = [data[: len(data) // 2], data[:-1], b"", data + b"\0\0", other, None, *(flip(data, draw) for _ in range(10))]
    if name.endswith(".json"):
        changed += [b"[]", b"3", b"{}", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000]
        for key in (content := json.loads(data)):
            changed += [json.dumps(content | {key: value}).encode() for value in VALUES if value != content[key]]
            changed.append(json.dumps({k: v for k, v in content.items() if k != key}).encode())
    return changed


def content(folder: Path) -> tuple:
    """All that training reads."""
    tokenizer, *splits = open_data(folder)
    arrays = [([split.starts.tolist()], [shard.tolist() for shard in split.shards]) for split in splits]
    return tokenizer.to_json(), [
        vars(split) | {"folder": "", "starts": a, "shards": b} for split, (a, b) in zip(splits, arrays, strict=True)
    ]


def is_harmless(folder: Path, original: tuple) -> bool:
    """Whether the folder is refused with one line, or nothing that is read has changed (white space in JSON, for example)."""
    try:
        found = content(folder)
    except (UserError, FileNotFoundError) as error:
        return "\n" not in str(error).strip() and len(str(error)) < 1000
    return found == original


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_data_folder_is_reported(tmp_path, data, name, seed):
    folder = tmp_path / "data"
    shutil.copytree(data[0], folder)
    path, undamaged, before = folder / name, content(folder), (data[0] / name).read_bytes()
    for changed in damages(name, before, (data[1] / name).read_bytes(), random.Random(seed)):
        path.unlink(missing_ok=True)
        if changed is not None:
            path.write_bytes(changed)
        assert is_harmless(folder, undamaged), changed and changed[:400]


@pytest.mark.parametrize("key", sorted({"dtype", "vocab_size", "tokenizer_hash", "shards", "starts", "entropy_bits", *COUNTS}))
def test_a_wrong_value_under_a_right_checksum_is_reported(tmp_path, data, key):
    folder = tmp_path / "data"
    shutil.copytree(data[0], folder)
    path, undamaged = folder / "train" / "index.json", content(folder)
    index = json.loads(path.read_text(encoding="utf-8"))
    shard = index["shards"][0]
    values = [
        *VALUES,
        [shard, shard],
        [shard | {"tokens": 0}],
        [shard | {"tokens": 10**20}],
        [shard | {"file": "../../x"}],
        [shard | {"sha256": 0}],
    ]
    for value in values:
        is_possible = {"entropy_bits": value in (None, 0, 1, 0.5, 10**9, 10**30), "characters": value in (0, 1, 10**9)}.get(key, False)
        if is_possible and value is not True:  # nothing tells that it is wrong
            continue
        path.write_text(seal(index | {key: value}), encoding="utf-8")
        assert is_harmless(folder, undamaged), value


def test_damage_to_a_prepared_folder_is_refused_or_repaired_by_every_command(tmp_path, seed):
    _, failures = matrix(tmp_path, lambda cells: random.Random(seed).sample(cells, 40))
    assert not failures


@pytest.mark.parametrize("name", ["recipe.json", "prepare.json", "report.json"])
def test_damage_to_a_description_of_the_data_is_reported_or_mended(tmp_path, data, name, seed):
    out, jsonl = tmp_path / "data", tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps({"text": story(seed, i).text}) + "\n" for i in range(40)), encoding="utf-8")
    sizes: dict = {"seed": 0, "stories": 40, "validation_stories": 10, "vocab_size": 300}
    make: Callable[[], object] = lambda: write_built_in(out, **sizes)
    if name != "recipe.json":
        make = lambda: prepare([str(jsonl)], out, Options(tokenizer=str(data[0] / "tokenizer")), workers=1)
    make()
    undamaged, before = content(out), (out / name).read_bytes()
    draw = random.Random(seed)
    for changed in [before[:50], b"", b"[]", b"3", b"{}", b"[" * 100_000, *(flip(before, draw) for _ in range(10))]:
        (out / name).write_bytes(changed)
        try:
            make()
        except UserError as error:
            assert "\n" not in str(error) and re.search("; (delete|choose|move)", str(error)), error
        assert content(out) == undamaged
