"""Every file of a checkpoint, damaged in many ways, given to every command that reads it: python -m tests.damage_matrix [--sample N]

A cell is one damaged file and one command: generate, export, average, or a training run that resumes. It passes if the command refuses in
one line, if it warns and uses an earlier checkpoint, or if it does not use the file and its result is that of the undamaged checkpoint. It
fails if there is a traceback, a hang (30 s), code from the file is executed, or the damage goes unnoticed.

Damaged bytes (truncated, emptied, ten flipped bits, missing, replaced) keep the checksums. Damaged values (wrong types, sizes, shapes,
dtypes, NaN) are valid files without checksums, as another tool may write them.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from runs import command, train  # noqa: E402

from tritale.cli.main import main as tritale  # noqa: E402

CHECKSUMS = "checksums.json"
SECONDS = 30
WRONG_VALUES = (None, "x", -1, 1.5, 10**9, [], {"a": 1})
# Files whose damage a command must notice. Others may be left unread.
MODEL = {"model.safetensors", "config.json", "tokenizer.json"}
MUST_NOTICE = {"generate": MODEL, "export": MODEL, "average": MODEL - {"tokenizer.json"}}  # average uses the newest tokenizer
MUST_NOTICE["resume"] = {"model.safetensors", "trainer/state.safetensors", "trainer/trainer.json"}


class Marker:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@dataclass(frozen=True)
class Damage:
    file: str
    name: str
    apply: Callable[[Path], object]  # changes the file at this path
    keeps_checksums: bool


def flip(position: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= 1 << position % 8
        path.write_bytes(content)

    return apply


def replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


def byte_damages(file: str, path: Path, other: Path, marker: Path) -> Iterator[Damage]:
    size = path.stat().st_size
    yield Damage(file, "truncated", lambda p: os.truncate(p, size // 2), True)
    yield Damage(file, "one byte short", lambda p: os.truncate(p, size - 1), True)
    yield Damage(file, "emptied", lambda p: p.write_bytes(b""), True)
    yield Damage(file, "missing", Path.unlink, True)
    yield Damage(file, "a folder", replace, True)
    yield Damage(file, "a pickle", lambda p: p.write_bytes(pickle.dumps(Marker(marker))), True)
    if path.read_bytes() != other.read_bytes():
        yield Damage(file, "that of another step", lambda p: shutil.copy(other, p), True)
    for i in range(10):
        position = (size - 1) * i // 9
        yield Damage(file, f"bit flipped at {position}", flip(position), True)


def changed_json(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return apply


def json_damages(file: str, path: Path) -> Iterator[Damage]:
    for content in ("{}", "[]", "null", "1", '"x"', "[" * 100_000, "\ufffe"):
        yield Damage(file, f"content {content[:5]}", lambda p, content=content: p.write_text(content, encoding="utf-8"), False)
    for key, old in json.loads(path.read_text(encoding="utf-8")).items():
        yield Damage(file, f"{key} missing", changed_json(lambda v, key=key: v.pop(key)), False)
        for new in WRONG_VALUES:
            if type(new) is not type(old) or new != old:
                yield Damage(file, f"{key} = {new!r}", changed_json(lambda v, key=key, new=new: v.update({key: new})), False)


def changed_tensors(change: Callable[[dict, str], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        largest = max(tensors, key=lambda name: tensors[name].numel())
        change(tensors, largest)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    return apply


def tensor_damages(file: str) -> Iterator[Damage]:
    changes: dict[str, Callable[[dict, str], object]] = {
        "a tensor missing": lambda t, name: t.pop(name),
        "a tensor too many": lambda t, name: t.update({f"{name}.more": t[name].clone()}),
        "no tensors": lambda t, name: t.clear() or t.update(x=torch.zeros(1)),
        "a tensor transposed": lambda t, name: t.update({name: t[name].T if t[name].ndim > 1 else t[name][None]}),
        "a row less": lambda t, name: t.update({name: t[name][1:]}),
        "flat": lambda t, name: t.update({name: t[name].flatten()}),
        "int8": lambda t, name: t.update({name: t[name].to(torch.int8)}),
        "fp64": lambda t, name: t.update({name: t[name].double()}),
        "NaN": lambda t, name: t.update({name: t[name] * torch.nan}),
        "infinite": lambda t, name: t.update({name: t[name] + torch.inf}),
    }
    for what, change in changes.items():
        yield Damage(file, what, changed_tensors(change), False)


def damages(checkpoint: Path, other: Path, marker: Path) -> list[Damage]:
    found: list[Damage] = []
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        file = path.relative_to(checkpoint).as_posix()
        found += byte_damages(file, path, other / file, marker)
        if path.suffix == ".json" and path.name != CHECKSUMS:
            found += json_damages(file, path)
        if path.suffix == ".safetensors":
            found += tensor_damages(file)
    return found


# ---- the commands: each returns its result as text --------------------------------------------------------------------------------------


def generate(run: Path, checkpoint: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tritale(["generate", "--model", str(checkpoint), "--prompt", "从前", "--max-new-tokens", "8", "--temperature", "0"])
    return out.getvalue()


def digest(folder: Path) -> str:
    return hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.pth")))
    ).hexdigest()


def export(run: Path, checkpoint: Path) -> str:
    tritale(["export", str(checkpoint), "--to", "litgpt", "--out", str(run / "exported")])
    return digest(run / "exported")


def average(run: Path, checkpoint: Path) -> str:
    tritale(["average", str(run), "--last", "2"])
    (averaged,) = run.glob("average-*")
    return digest(averaged)


def resume(run: Path, checkpoint: Path) -> str:
    for later in run.glob("step-*"):
        if later.name > checkpoint.name:
            shutil.rmtree(later)
    sys.argv = command(run)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(sys.argv[0], run_name="__main__")
    if "earlier checkpoint is used" in out.getvalue():
        sys.exit("warned, and used an earlier checkpoint")
    return digest(run / "step-00000006")


COMMANDS: dict[str, Callable[[Path, Path], str]] = {"generate": generate, "export": export, "average": average, "resume": resume}


class TookTooLong(BaseException):
    pass


def stop(*_) -> None:
    raise TookTooLong


def outcome(name: str, run: Path, checkpoint: Path) -> tuple[str, str]:
    """("refused", message), ("finished", result), ("traceback" or "hang", details) of one command."""
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "finished", COMMANDS[name](run, checkpoint)
    except SystemExit as error:
        message = str(error.code)
        is_message = isinstance(error.code, str) and len(message.strip().splitlines()) <= 3
        return ("refused" if is_message else "traceback"), message
    except TookTooLong:
        return "hang", f"more than {SECONDS} s"
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)


def verdict(name: str, damage: Damage, run: Path, expected: str, folder: Path, marker: Path) -> str | None:
    """What is wrong with this cell, or None."""
    copy = folder / "run"
    shutil.copytree(run, copy)
    try:
        checkpoint = copy / "step-00000003"
        damage.apply(checkpoint / damage.file)
        if not damage.keeps_checksums:
            for checksums in checkpoint.rglob(CHECKSUMS):
                checksums.unlink()
        status, details = outcome(name, copy, checkpoint)
        if marker.exists():
            marker.unlink()
            return "code executed"
        if status in ("traceback", "hang"):
            return f"{status}: {details.strip().splitlines()[-1][:200]}"
        if status == "refused":
            return None
        if details != expected:
            return "unnoticed, with another result"
        return "unnoticed" if damage.keeps_checksums and damage.file in MUST_NOTICE[name] else None
    finally:
        shutil.rmtree(copy)


def matrix(folder: Path, sample: int | None = None, seed: int = 0) -> tuple[int, list[str]]:
    """The number of cells (all, or `sample` of them drawn with `seed`) and the ones that fail, as lines."""
    run, marker = folder / "whole" / "run", folder / "marker"
    if not run.exists():
        train(run)
    (folder / "run").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "run")
    expected = {}
    for name in COMMANDS:
        copy = Path(shutil.copytree(run, folder / "run"))
        status, expected[name] = outcome(name, copy, copy / "step-00000003")
        assert status == "finished", expected[name]
        shutil.rmtree(copy)
    cells = [(name, d) for d in damages(run / "step-00000003", run / "step-00000006", marker) for name in COMMANDS]
    cells = random.Random(seed).sample(cells, sample) if sample else cells
    failures = []
    for name, damage in cells:
        if problem := verdict(name, damage, run, expected[name], folder, marker):
            failures.append(f"{name}: {damage.file}, {damage.name}: {problem}")
            print(failures[-1], flush=True)
    return len(cells), failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.damage_matrix", description="Damages every file of a checkpoint and runs every command."
    )
    parser.add_argument("--sample", type=int, help="only this many cells, drawn at random")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n, failures = matrix(Path(folder), arguments.sample, seed=random.randrange(2**32))
    print(f"{n:,} cells, {len(failures):,} failures")
    sys.exit(bool(failures))
