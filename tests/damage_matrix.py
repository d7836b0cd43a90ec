"""Every file of a run, damaged in many ways, given to every command that reads it: python -m tests.damage_matrix [--part I/N | --sample N]

A cell is one damaged file and one command: generate, serve, export, average, sweep, or a training run that resumes. It passes if the
command refuses in one line, if it warns and leaves the damaged checkpoint out, or if it does not use the file and its result is that of the
undamaged run. It fails if there is a traceback, a hang (30 s of CPU time, or 300 s), code from the file is executed, or the damage goes
unnoticed.

Damaged bytes (truncated, emptied, ten flipped bits, missing, replaced) keep the checksums. Damaged values (wrong types, sizes, shapes,
dtypes, NaN) are valid files with new checksums, as another tool may write them.
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
from unittest.mock import patch

import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from runs import command, train  # noqa: E402

from tritale.cli.main import main as tritale  # noqa: E402
from tritale.model.checkpoint import CHECKSUMS, write_checksums  # noqa: E402

CPU_SECONDS, SECONDS = 30, 300
TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, CPU_SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, SECONDS))
WRONG_VALUES = (None, "x", -1, 1.5, 10**9, [], {"a": 1})
# Other values that a run may have: nothing can notice them.
LEGAL = {"characters = 1000000000", "entropy_bits = None", "entropy_bits = 1.5", "entropy_bits = 1000000000", "config.log.prompts = []"}
EARLIER, NEWEST = "step-00000003", "step-00000006"  # generate, serve, export and resume use the earlier one


def model(step: str) -> set[str]:
    return {f"{step}/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")}


def split(name: str) -> set[str]:
    return {f"data/{name}/{file}" for file in ("index.json", "starts.bin", "tokens-00000.bin")}


TRAINER = {f"{EARLIER}/trainer/{name}" for name in ("trainer.json", "state.safetensors")}
# The folders whose files are damaged for a command, the files that it reads, whose values are damaged too, and those of them whose damaged
# bytes it must notice.
FOLDERS = {name: (f"{EARLIER}/",) for name in ("generate", "serve", "export")}
FOLDERS |= {"average": (EARLIER, NEWEST, "data"), "sweep": (EARLIER, NEWEST, "data"), "resume": (EARLIER, "data")}
OF_TOKENIZER = {f"{EARLIER}/{name}" for name in ("tokenizer_config.json", "generation_config.json")}
READS = {name: model(EARLIER) | OF_TOKENIZER for name in ("generate", "serve", "export")}
READS["average"] = model(EARLIER) | model(NEWEST) | {f"{NEWEST}/trainer/trainer.json"} | split("validation")
READS["sweep"] = READS["average"] | split("train")
DATA = {f"data/{name}" for name in ("recipe.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")}
READS["resume"] = model(EARLIER) | OF_TOKENIZER | TRAINER | split("train") | split("validation") | DATA
MUST_NOTICE = {name: model(EARLIER) for name in ("generate", "serve", "export")}
MUST_NOTICE["average"] = READS["average"] - {f"{EARLIER}/tokenizer.json", f"{NEWEST}/trainer/trainer.json"}
MUST_NOTICE["sweep"] = READS["sweep"] - {f"{NEWEST}/trainer/trainer.json"}
MUST_NOTICE["resume"] = {f"{EARLIER}/model.safetensors", *TRAINER} | split("train") | split("validation")


class Marker:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@dataclass(frozen=True)
class Damage:
    file: str  # relative to the run
    name: str
    apply: Callable[[Path], object]  # changes the file at this path
    is_of_bytes: bool  # and keeps the checksums


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
        before = value.get("sha256")
        change(value)
        if "shards" in value and value.get("sha256") == before:
            value.pop("sha256", None)  # the checksum of a split's index is in the index, and optional
        path.write_text(json.dumps(value), encoding="utf-8")

    return apply


def json_damages(file: str, path: Path) -> Iterator[Damage]:
    for content in ("{}", "[]", "null", "1", '"x"', "[" * 100_000, "\ufffe"):
        yield Damage(file, f"content {content[:5]}", lambda p, content=content: p.write_text(content, encoding="utf-8"), False)
    value = json.loads(path.read_text(encoding="utf-8"))
    groups = {(): value} | {(key,): inner for key, inner in value.items() if isinstance(inner, dict)}
    for names, group in groups.items():
        for key, old in group.items():
            at = ".".join((*names, key))
            yield Damage(file, f"{at} missing", changed_json(lambda v, n=names, k=key: group_of(v, n).pop(k)), False)
            for new in WRONG_VALUES:
                if (type(new) is not type(old) or new != old) and f"{at} = {new!r}" not in LEGAL:
                    change = changed_json(lambda v, n=names, k=key, new=new: group_of(v, n).update({k: new}))
                    yield Damage(file, f"{at} = {new!r}", change, False)


def group_of(value: dict, names: tuple[str, ...]) -> dict:
    return value[names[0]] if names else value


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


def damages(run: Path, marker: Path) -> list[Damage]:
    """The damages of each file of a run that a command reads."""
    found: list[Damage] = []
    other = {EARLIER: NEWEST, NEWEST: EARLIER, "data/train": "data/validation", "data/validation": "data/train"}
    for path in sorted(p for folder in (EARLIER, NEWEST, "data") for p in (run / folder).rglob("*") if p.is_file()):
        file = path.relative_to(run).as_posix()
        swapped = next((run / file.replace(a, b, 1) for a, b in other.items() if file.startswith(a)), path)
        found += byte_damages(file, path, swapped, marker)
        if path.suffix == ".json" and path.name != CHECKSUMS:
            found += json_damages(file, path)
        if path.suffix == ".safetensors":
            found += tensor_damages(file)
    return found


# ---- the commands: each returns its result as text --------------------------------------------------------------------------------------


def generate(run: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tritale(["generate", "--model", str(run / EARLIER), "--prompt", "从前", "--max-new-tokens", "8", "--temperature", "0"])
    return out.getvalue()


class Client:
    """Takes the place of the server, and sends it one request."""

    def __init__(self, app: FastAPI):
        self.client = TestClient(app, base_url="http://127.0.0.1")

    def run(self, sockets: list) -> None:
        request = {"model": EARLIER, "prompt": "从前", "max_tokens": 8, "temperature": 0}
        reply = self.client.post("/v1/completions", json=request).json()
        if "error" in reply:
            sys.exit(reply["error"]["message"])
        print(reply["choices"])


def serve(run: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, patch("tritale.serve.connections.make_server", Client):
        tritale(["serve", str(run / EARLIER), "--port", "0"])
    return out.getvalue().partition("\n")[2]  # without the address


def digest(folder: Path) -> str:
    return hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.pth")))
    ).hexdigest()


def export(run: Path) -> str:
    tritale(["export", str(run / EARLIER), "--to", "litgpt", "--out", str(run / "exported")])
    return digest(run / "exported")


def average(run: Path) -> str:
    tritale(["average", str(run), "--last", "2"])
    (averaged,) = run.glob("average-*")
    return digest(averaged)


def sweep(run: Path) -> str:
    tritale(["sweep", str(run), "--samples", "1", "--max-new-tokens", "4"])
    report = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
    if report["left_out"]:
        sys.exit(f"left out: {report['left_out']}")
    return json.dumps(report)


def resume(run: Path) -> str:
    shutil.rmtree(run / NEWEST)
    sys.argv = command(run)
    speed = patch("tritale.training.processes.matmul_flops", lambda device, precision: (1e9, "measured now"))  # saves half of the time
    with contextlib.redirect_stdout(io.StringIO()) as out, speed:
        runpy.run_path(sys.argv[0], run_name="__main__")
    if "and not used" in out.getvalue():
        sys.exit("warned, and used an earlier checkpoint")
    return digest(run / NEWEST)


COMMANDS: dict[str, Callable[[Path], str]] = {
    "generate": generate, "serve": serve, "export": export, "average": average, "sweep": sweep, "resume": resume,
}  # fmt: skip


class TookTooLong(BaseException):
    pass


def stop(*_) -> None:
    raise TookTooLong


def outcome(name: str, run: Path) -> tuple[str, str]:
    """("refused", message), ("finished", result), ("traceback" or "hang", details) of one command."""
    for number, timer, seconds in TIMERS:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "finished", COMMANDS[name](run)
    except SystemExit as error:
        message = str(error.code)
        is_message = isinstance(error.code, str) and len(message.strip().splitlines()) <= 3
        return ("refused" if is_message else "traceback"), message
    except TookTooLong:
        return "hang", f"more than {CPU_SECONDS} s of CPU time or {SECONDS} s"
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        for _, timer, _ in TIMERS:
            signal.setitimer(timer, 0)


def is_same_json(before: Path, after: Path) -> bool:
    """Whether both are JSON files with the same value. A split's index holds the checksum of its value, so white space does not matter."""
    with contextlib.suppress(OSError, ValueError):
        return before.suffix == ".json" and json.loads(before.read_bytes()) == json.loads(after.read_bytes())
    return False


def verdict(name: str, damage: Damage, run: Path, expected: str, folder: Path, marker: Path) -> str | None:
    """What is wrong with this cell, or None."""
    copy = folder / "run"
    shutil.copytree(run, copy)
    try:
        damage.apply(copy / damage.file)
        if not damage.is_of_bytes:
            for checksums in copy.glob(f"{damage.file.partition('/')[0]}/**/{CHECKSUMS}"):
                write_checksums(checksums.parent)
        status, details = outcome(name, copy)
        if marker.exists():
            marker.unlink()
            return "code executed"
        if status in ("traceback", "hang"):
            return f"{status}: {details.strip().splitlines()[-1][:200]}"
        if status == "refused":
            return None
        if details != expected:
            return "unnoticed, with another result"
        must_notice = damage.is_of_bytes and damage.file in MUST_NOTICE[name] and not is_same_json(run / damage.file, copy / damage.file)
        return "unnoticed" if must_notice else None
    finally:
        shutil.rmtree(copy)


def is_cell(name: str, damage: Damage) -> bool:
    return damage.file in READS[name] or (damage.is_of_bytes and damage.file.startswith(FOLDERS[name]))


def matrix(folder: Path, choose: Callable[[list], list]) -> tuple[int, list[str]]:
    """The number of the chosen cells, and those that fail, as lines."""
    run, marker = folder / "whole" / "run", folder / "marker"
    train(run)
    expected = {}
    for name in COMMANDS:
        copy = Path(shutil.copytree(run, folder / "run"))
        status, expected[name] = outcome(name, copy)
        assert status == "finished", expected[name]
        shutil.rmtree(copy)
    cells = choose([(name, d) for d in damages(run, marker) for name in COMMANDS if is_cell(name, d)])
    failures = []
    for name, damage in cells:
        if problem := verdict(name, damage, run, expected[name], folder, marker):
            failures.append(f"{name}: {damage.file}, {damage.name}: {problem}")
            print(failures[-1], flush=True)
    return len(cells), failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.damage_matrix", description="Damages every file of a run and runs every command."
    )
    parser.add_argument("--sample", type=int, help="only this many cells, drawn at random")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only the cells I, I + N, I + 2 N, …")
    arguments = parser.parse_args()
    i, n = map(int, arguments.part.split("/"))
    choose = lambda cells: random.sample(cells, arguments.sample) if arguments.sample else cells[i - 1 :: n]
    with tempfile.TemporaryDirectory() as folder:
        n_cells, failures = matrix(Path(folder), choose)
    print(f"{n_cells:,} cells, {len(failures):,} failures")
    sys.exit(bool(failures))
