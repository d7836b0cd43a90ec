"""Damaged checkpoints, data and JSON: sweep and average name the file in one line, leave the checkpoint out, or give the same result."""

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import pytest

from tritale.cli.main import main
from tritale.model.checkpoint import write_checksums

# The files that the commands read.
FILES = [
    *(f"step-0000000{step}/{name}" for step in (3, 6) for name in ("config.json", "model.safetensors", "tokenizer.json")),
    "step-00000006/trainer/trainer.json",
    *(f"data/{split}/{name}" for split in ("train", "validation") for name in ("index.json", "starts.bin", "tokens-00000.bin")),
]


def damages(path: Path, rng: random.Random) -> dict[str, bytes | None]:
    """The damaged contents of a file by name; None: it is missing."""
    content = path.read_bytes()
    found: dict[str, bytes | None] = {"missing": None, "empty": b"", "cut": content[: len(content) // 2], "zeros": bytes(len(content))}
    flipped = bytearray(content)
    at = rng.randrange(len(content))
    flipped[at] ^= 1 << rng.randrange(8)
    found[f"bit of byte {at}"] = bytes(flipped)
    if path.suffix == ".json":
        values = json.loads(content)
        values = values["config"] if "config" in values else values
        key = rng.choice(list(values))
        for wrong in (None, -1, 10**30, "x", [], {}):
            if values[key] != wrong:
                changed = json.loads(content)
                (changed["config"] if "config" in changed else changed)[key] = wrong
                found[f"{key} {wrong!r}"] = json.dumps(changed).encode()
        found["array"], found["deep"] = b"[1]", b"[" * 100_000
    return found


def run(arguments: list[str]) -> str | None:
    """The message of a command that stops, or None. Any other exception than SystemExit fails the test."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            return str(end.code)
    return None


@pytest.fixture(scope="module")
def checked_run(tiny_run, tmp_path_factory):
    """A copy of the tiny run whose checkpoints have checksums."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("damage") / "run")
    for step in folder.glob("step-*"):
        write_checksums(step)
        write_checksums(step / "trainer")
    return folder


@pytest.mark.parametrize("command", ["sweep", "average"])
def test_damage_is_named_or_left_out_or_without_effect(command, checked_run, tmp_path, seed):
    rng, folder = random.Random(seed), tmp_path / "run"
    arguments = {
        "sweep": ["sweep", str(folder), "--samples", "1", "--max-new-tokens", "4", "--overwrite"],
        "average": ["average", str(folder), "--last", "2"],
    }[command]

    def result() -> tuple[str | None, dict | bytes | None]:
        message = run(arguments)
        if message is not None:
            return message, None
        if command == "sweep":
            return None, json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return None, (folder / "average-00000006-last2" / "model.safetensors").read_bytes()

    shutil.copytree(checked_run, folder)
    message, expected = result()
    assert message is None
    for file in FILES:
        for name, content in damages(checked_run / file, rng).items():
            shutil.rmtree(folder)
            shutil.copytree(checked_run, folder)
            (folder / file).unlink()
            if content is not None:
                (folder / file).write_bytes(content)
            message, found = result()
            where = f"{file}, {name}: {message}"
            if message is not None:
                assert message.startswith(f"tritale {command}: ") and "\n" not in message, where
            elif isinstance(found, dict) and found["left_out"]:
                assert file.partition("/")[0] in found["left_out"], where
            else:
                assert found == expected, where
