"""A trace of a few training steps by torch.profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

TRACE = "profile.json.gz"
SKIPPED = 2  # steps before the trace: the first compiles
WARM_UP = 1  # step under the profiler that is not recorded


@contextmanager
def profiled(steps: int, out_dir: Path, start_step: int, report: Callable[[str], None]) -> Iterator[Callable[[], object]]:
    """Yield a function to call after each training step. It records `steps` steps to out_dir/profile.json.gz, and reports how to open it.

    With 0 steps nothing is recorded, and nothing is slowed down."""
    if not steps:
        yield lambda: None
        return
    is_written, path = False, out_dir / TRACE

    def write(profiler: profile) -> None:
        nonlocal is_written
        profiler.export_chrome_trace(str(path))
        first, last = start_step + SKIPPED + WARM_UP + 1, start_step + profiler.step_num
        report(f"profile of steps {first} to {last}: {path}; open it at https://ui.perfetto.dev or chrome://tracing")
        is_written = True

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if not is_written:
        report(f"no profile: the run ended before step {start_step + SKIPPED + WARM_UP + 1}, the first that is recorded")
