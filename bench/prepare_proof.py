"""The memory of `tritale prepare`, and a check that a killed run resumes to the same bytes:

    python -m bench.make_stories out/corpus --megabytes 2000
    python -m bench.prepare_proof 'out/corpus/*.jsonl' out/proof --text-key story_zh --kills 3

Runs it without interruption, then again with SIGKILL at random moments, and compares the sha256 of every file. The memory is the largest
sum of the resident sets of all its processes, measured ten times a second (shared pages count once for each process).
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tritale.common.files import sha256_of


def resident(process: psutil.Process) -> int:
    """Bytes of a process, 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def run(command: list[str], kill_after: float | None = None) -> tuple[float, int]:
    """(seconds, peak bytes)"""
    began, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(map(resident, [process, *process.children(recursive=True)])))
        if kill_after is not None and time.perf_counter() - began > kill_after:
            process.kill()
        time.sleep(0.1)
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - began, peak


def digests(folder: Path) -> dict[str, str]:
    files = [path for part in ("tokenizer", "train", "validation") for path in sorted((folder / part).iterdir())]
    return {f"{path.parent.name}/{path.name}": sha256_of(path) for path in files}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input")
    p.add_argument("out", type=Path)
    p.add_argument("--text-key", default="text")
    p.add_argument("--kills", type=int, default=3)
    p.add_argument("--seed", type=int, default=None)
    p.add_argument("--dedup", default="exact")
    args = p.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists, and existing data would not be made again; choose a new folder, or delete it")
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    draw = random.Random(seed)
    options = ["--input", args.input, "--text-key", args.text_key, "--dedup", args.dedup]
    prepare = [sys.executable, "-m", "tritale.cli.main", "prepare", *options]
    seconds, peak = run([*prepare, "--out", str(args.out / "whole")])
    print(f"seed {seed}; without interruption: {seconds:.0f} s, peak {peak / 2**20:.0f} MiB of all processes together", flush=True)
    for i in range(args.kills):
        after, most = run([*prepare, "--out", str(args.out / "killed")], kill_after=draw.uniform(0, seconds / args.kills))
        print(f"kill {i + 1} after {after:.0f} s, peak {most / 2**20:.0f} MiB", flush=True)
    seconds, peak = run([*prepare, "--out", str(args.out / "killed")])
    print(f"the rest: {seconds:.0f} s, peak {peak / 2**20:.0f} MiB")
    whole, killed = digests(args.out / "whole"), digests(args.out / "killed")
    if whole != killed:
        sys.exit(f"the files differ: {sorted(name for name in whole if whole[name] != killed.get(name))}")
    print(f"{len(whole)} files with the same sha256")


if __name__ == "__main__":
    main()
