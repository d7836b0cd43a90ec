"""The resident memory of a long run: python -m tests.resident [--steps 5000]

Trains a tiny model of one layer with a validation and a checkpoint every 50 steps, samples /proc/PID/statm (Linux) from outside, and
prints the median around steps of the run. Ends with status 1 if that of the last steps is not within 2 % of that around step 500.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.disturbed import logged, start

OPTIONS = {"train__validate_every": 50, "train__checkpoint_every": 50, "log__every": 10, "train__global_batch": 1}


def samples(run: subprocess.Popen, out_dir: Path) -> list[tuple[int, float]]:
    """(last logged step, resident MiB) of a running process, ten times a second."""
    found = []
    while run.poll() is None:
        pages = Path(f"/proc/{run.pid}/statm").read_text(encoding="utf-8").split()
        if len(pages) > 1:
            step = max((line["step"] for line in logged(out_dir)), default=0)
            found.append((step, int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20))
        time.sleep(0.1)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the resident memory of a long run")
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the run is ended too
    with tempfile.TemporaryDirectory() as folder:
        run = start(Path(folder) / "run", 1, train__max_steps=steps, **OPTIONS)
        try:
            found = samples(run, Path(folder) / "run")
        finally:
            run.kill()
        if run.returncode:
            sys.exit(run.communicate()[1])
    width = max(1, steps // 100)

    def median(step: int) -> float:
        """Of the samples within `width` steps."""
        return statistics.median(mib for at, mib in found if abs(at - step) <= width)

    for step in range(width, steps, 10 * width):
        print(f"step {step:6,}: {median(step):.1f} MiB")
    first, last = median(500), median(steps - width)
    print(f"step 500: {first:.1f} MiB, end: {last:.1f} MiB, {last / first - 1:+.2%}")
    sys.exit(abs(last / first - 1) > 0.02)
