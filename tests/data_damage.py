"""Every file of a prepared folder, damaged in many ways, for every command that reads it: python -m tests.data_damage [--part I/N]

A cell is one damaged file and one command: train, lr-find, sweep, plan, or prepare, which finds its finished folder. It passes if the
command refuses in one line, or if its result is that of the undamaged folder. train, lr-find and sweep must also refuse damage to the
shards and indexes that does not show in the result. It fails if there is a traceback, a hang (30 s of CPU time), or code from the file is
executed.

Damaged bytes: truncated, emptied, ten flipped bits, missing, replaced by that of another folder, by a pickle or by a folder. Damaged JSON:
other content, and each value missing or of a wrong type or size; in an index also under a right checksum.
"""

import argparse
import contextlib
import hashlib
import io
import json
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.damage_matrix import Damage, byte_damages, changed_json, digest, json_damages

# isort: split
from runs import command

from tritale.cli.main import main as tritale
from tritale.data.built_in import open_data
from tritale.data.shards import checksum
from tritale.stories.generator import story

SECONDS = 30
WRONG = (None, True, -1, 0, 1, 1.5, 2**70, "x", "../x", [], {}, [{}], {"file": "../x", "sha256": "", "tokens": 1})
OPTIONS = ("--text-key", "text", "--vocab-size", "400", "--val-documents", "10", "--workers", "1")


def printed(arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tritale(arguments)
    return out.getvalue()


def flags(base: Path) -> list[str]:
    """The options of a tiny run in out/ on data/."""
    return command(base / "out", data__source=base / "data")[1:]


def train(base: Path) -> str:
    sys.argv = ["train.py", *flags(base)]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(command(base)[0], run_name="__main__")
    return digest(base / "out" / "step-00000006")


def lr_find(base: Path) -> str:
    arguments = ["lr-find", *flags(base), "--steps", "20", "--log.every", "100"]
    return "".join(line for line in printed(arguments).splitlines(True) if line.startswith(("first loss", "lowest", "suggestion")))


def sweep(base: Path) -> str:
    printed(["sweep", str(base / "run"), "--overwrite", "--every", "2", "--samples", "1", "--max-new-tokens", "4"])
    return (base / "run" / "sweep.json").read_text(encoding="utf-8")


def plan(base: Path) -> str:
    measured = ("matrix products", "memory", "disk")
    return "".join(line for line in printed(["plan", *flags(base), "--no-measure"]).splitlines(True) if not line.startswith(measured))


def prepare(base: Path) -> str:
    printed(["prepare", "--input", str(base / "a.jsonl"), "--out", str(base / "data"), *OPTIONS])
    # Without the page, which may be deleted. In JSON files a change without meaning (white space) may stay; a checksum may be missing.
    left_out = ("report.html", "prepare.json", "tokenizer.json", "index.json")
    files = [p for p in sorted((base / "data").rglob("*")) if p.is_file() and p.name not in left_out]
    tokenizer, *splits = open_data(base / "data")
    facts = [(s.n_tokens, s.n_documents, s.characters, s.entropy_bits, s.vocab_size) for s in splits]
    return f"{tokenizer.hash} {facts}" + "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in files)


def outcome(name: str, base: Path) -> tuple[str, str]:
    """("refused", message), ("finished", result) or ("traceback", details) of one command."""
    signal.signal(signal.SIGPROF, lambda *_: sys.exit(f"a hang\n(more than {SECONDS} s of CPU time)"))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "finished", COMMANDS[name](base)
    except SystemExit as error:
        return "refused", str(error.code)
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


COMMANDS: dict[str, Callable[[Path], str]] = {"train": train, "lr-find": lr_find, "sweep": sweep, "plan": plan, "prepare": prepare}


def sealed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def change_and_seal(index: dict) -> None:
        del index["sha256"]
        change(index)
        index["sha256"] = checksum(index)

    return changed_json(change_and_seal)


def index_damages(file: str, path: Path) -> Iterator[Damage]:
    index = json.loads(path.read_text(encoding="utf-8"))
    for key, old in index.items():
        for new in WRONG if key != "sha256" else ():
            # Any number of characters and any entropy is possible.
            is_possible = new in {"characters": (0, 1), "entropy_bits": (None, 0, 1, 1.5, 2**70)}.get(key, ()) and new is not True
            if (type(new) is not type(old) or new != old) and not is_possible:
                yield Damage(file, f"{key} = {new!r}, sealed", sealed(lambda v, key=key, new=new: v.update({key: new})), True)
    for key in index["shards"][0]:
        for new in WRONG if key != "documents" else ():  # which is not read
            yield Damage(file, f"shards[0].{key} = {new!r}", sealed(lambda v, key=key, new=new: v["shards"][0].update({key: new})), True)
    yield Damage(file, "a shard twice", sealed(lambda v: v["shards"].append(v["shards"][0])), True)


def damages(data: Path, other: Path, marker: Path) -> list[Damage]:
    found: list[Damage] = []
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        file = path.relative_to(data).as_posix()
        found += byte_damages(file, path, other / file, marker)
        if path.suffix == ".json":
            found += json_damages(file, path)
        if path.name == "index.json":
            found += index_damages(file, path)
    return found


def verdict(name: str, damage: Damage, base: Path, expected: str) -> str | None:
    """What is wrong with this cell, or None."""
    restore(base)
    damage.apply(base / "data" / damage.file)
    status, details = outcome(name, base)
    if (base / "marker").exists():
        (base / "marker").unlink()
        return "code executed"
    if status == "traceback" or (status == "refused" and len(details.strip().splitlines()) != 1):
        return f"{status}: {details}"
    if status == "refused":
        return None
    must_refuse = name in ("train", "lr-find", "sweep") and damage.file.partition("/")[0] in ("train", "validation")
    # An index without a checksum may be of an earlier version.
    must_refuse &= damage.name != "sha256 missing" and not is_same_json(base / "whole" / damage.file, base / "data" / damage.file)
    return "unnoticed, with another result" if details != expected else "unnoticed" if must_refuse else None


def is_same_json(before: Path, after: Path) -> bool:
    """Whether both are JSON files with the same value, and differ in white space alone."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return before.suffix == ".json" and json.loads(before.read_bytes()) == json.loads(after.read_bytes())
    return False


def restore(base: Path) -> None:
    """The undamaged data, and no output of an earlier command."""
    for name in ("data", "out"):
        shutil.rmtree(base / name, ignore_errors=True)
    shutil.copytree(base / "whole", base / "data")


def matrix(base: Path, choose: Callable[[list], list]) -> tuple[int, list[str]]:
    """The number of chosen cells, and those that fail, as lines."""
    for number, name in enumerate(("other", "data")):
        texts = [story(number, i).text for i in range(80)]
        (base / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        printed(["prepare", "--input", str(base / "a.jsonl"), "--out", str(base / name), *OPTIONS])
    shutil.copytree(base / "data", base / "whole")
    train(base)
    (base / "out").rename(base / "run")
    expected = {}
    for name in COMMANDS:
        restore(base)
        status, expected[name] = outcome(name, base)
        assert status == "finished" and expected[name], (name, expected[name])
    cells = choose([(name, damage) for damage in damages(base / "whole", base / "other", base / "marker") for name in COMMANDS])
    failures = []
    for name, damage in cells:
        if problem := verdict(name, damage, base, expected[name]):
            failures.append(f"{name}: {damage.file}, {damage.name}: {problem}")
            print(failures[-1], flush=True)
    return len(cells), failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.data_damage", description="Damages every file of a data folder and runs every command."
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only the cells I, I + N, I + 2 N, …")
    i, n = map(int, parser.parse_args().part.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        n_cells, failures = matrix(Path(folder), lambda cells: cells[i - 1 :: n])
    print(f"{n_cells:,} cells, {len(failures):,} failures")
    sys.exit(bool(failures))
