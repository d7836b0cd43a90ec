"""What all benchmarks share: times taken in turns, peak memory, fresh child processes, and the machine with its own rates."""

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tritale.common.files import atomic_file
from tritale.training.processes import has_bf16

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision() -> str | None:
    """The 16-bit dtype of this machine's matrix units. None if it has none: such a CPU emulates bf16 many times slower than fp32."""
    if has_bf16(device()):
        return "bf16"
    return "fp16" if device().type == "cuda" else None


# ---- memory -----------------------------------------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    """VmRSS or VmHWM (its peak since `reset_peak`) of this process, in bytes."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found, field
    return int(found[1]) * 1024


def reset_peak() -> int:
    """Return freed memory to the system, start a new peak, and return the bytes held now: allocated on a GPU, resident on a CPU."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def peak() -> int:
    """The most bytes held since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else _resident("VmHWM")


# ---- child processes --------------------------------------------------------------------------------------------------------------------

Job = TypeVar("Job", bound=Hashable)
PROCESS_DIED = "the process died (out of memory?)"


@dataclass
class Child:
    """A process and the pipe to it."""

    process: ForkServerProcess
    pipe: Connection
    first: Any = None  # its first answer

    def answer(self) -> Any:
        """The next object that the process sends, or {"failed": why} if it has died."""
        try:
            return self.pipe.recv()
        except EOFError:
            return {"failed": PROCESS_DIED}


def _context() -> ForkServerContext:
    """Children are forked from a process that has imported PyTorch and computed nothing: they start quickly and share no heap."""
    if sys.platform != "linux":
        raise RuntimeError(f"peak memory is read from /proc, which {sys.platform} does not have; run the benchmarks on Linux")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile workers in every child
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._inductor.compile_fx", "torch._dynamo", "tritale.model", "transformers.models.mistral"])
    return context


@contextlib.contextmanager
def fresh_processes(function: Callable, jobs: dict[Job, tuple], at_once: int, tick: Callable) -> Iterator[dict[Job, Child]]:
    """Run function(pipe, *arguments) of each job in a fresh process, and yield {job: child} when all have sent their first answer.

    No more than `at_once` processes work on their first answer at the same time. At the end each process is sent None and joined."""
    context, waiting, starting = _context(), list(jobs), []
    children: dict[Job, Child] = {}
    try:
        while waiting or starting:
            while waiting and len(starting) < at_once:
                job = waiting.pop(0)
                ours, theirs = context.Pipe()
                process = context.Process(target=function, args=(theirs, *jobs[job]), daemon=True)
                process.start()
                theirs.close()
                children[job] = Child(process, ours)
                starting.append(job)
            ready = wait([children[job].pipe for job in starting])
            for job in [job for job in starting if children[job].pipe in ready]:
                starting.remove(job)
                children[job].first = children[job].answer()
                tick()
        yield children
    finally:
        for child in children.values():
            with contextlib.suppress(OSError):
                child.pipe.send(None)
            child.process.join(30)
            if child.process.is_alive():
                child.process.terminate()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _call(pipe: Connection, function: Callable, *arguments) -> None:
    try:
        pipe.send(function(*arguments))
    except Exception as error:
        pipe.send({"failed": first_line(error)})


def each_in_a_fresh_process(function: Callable, jobs: list[tuple], at_once: int, tick: Callable) -> dict[tuple, Any]:
    """{job: function(*job)}, each computed by a process that does nothing else; {"failed": why} for one that raises or dies."""
    with fresh_processes(_call, {job: (function, *job) for job in jobs}, at_once, tick) as children:
        return {job: children[job].first for job in jobs}


# ---- time -------------------------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Times on the device: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self):
        # Larger than any L2 cache. Overwritten before each round, so that no round finds its inputs there, as in Triton's do_bench.
        self.flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda") if device().type == "cuda" else None

    def mark(self) -> Any:
        """A point in time: an event on a GPU, seconds on a CPU."""
        if self.flush is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        if self.flush is None:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def cold(self, head_start: float) -> None:
        """On a GPU: empty the caches, then wait `head_start` seconds on the device. Kernels queue up behind it; launches are not timed."""
        if self.flush is not None:
            self.flush.zero_()
            torch.cuda._sleep(int(2.5e9 * head_start))  # cycles; GPUs run at most at about 2.5 GHz


def as_list(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


Times = dict[str, list[float]]  # {"forward": seconds of each round, "backward": …, "both": …}
Call = tuple[Callable, list[Tensor], list[Tensor]]  # function, inputs, gradients of the outputs


def one_round(watch: Stopwatch, call: Call, head_start: float = 0.0) -> tuple[list[Tensor], list[Tensor], list]:
    """(outputs, gradients of the inputs that need one, marks before forward, between, after backward) of one call."""
    function, inputs, grads = call
    leaves = [t for t in inputs if t.requires_grad]
    watch.cold(head_start)
    start = watch.mark()
    outputs = function(*inputs)
    middle = watch.mark()
    outputs = as_list(outputs)
    found = torch.autograd.grad(outputs, leaves, grads)
    return outputs, list(found), [start, middle, watch.mark()]


def interleaved(calls: dict[str, Call], rounds: int, tick: Callable = lambda: None) -> dict[str, Times]:
    """Times of the calls, taken in turns, so that other load on the machine affects all alike. The order of each turn is drawn anew: a call
    is slower after one that leaves nothing of the inputs in the cache."""
    watch = Stopwatch()
    marks, head_starts = {name: [] for name in calls}, dict.fromkeys(calls, 0.0)
    for name, call in calls.items() if watch.flush is not None else ():
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            began = time.perf_counter()
            one_round(watch, call)  # returns when everything is launched
            head_starts[name] = 1.5 * (time.perf_counter() - began)
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            marks[name].append(one_round(watch, calls[name], head_starts[name])[2])
            tick()
    times = {}
    for name, triples in marks.items():
        forward = [watch.seconds(a, b) for a, b, _ in triples]
        backward = [watch.seconds(b, c) for _, b, c in triples]
        times[name] = {"forward": forward, "backward": backward, "both": [f + b for f, b in zip(forward, backward, strict=True)]}
    return times


def spread(values: list[float]) -> dict[str, Any]:
    """Median, fastest and slowest round."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


# ---- the machine ------------------------------------------------------------------------------------------------------------------------


def _best(function: Callable, rounds: int = 7) -> float:
    watch = Stopwatch()
    pairs = []
    for _ in range(rounds):
        start = watch.mark()
        function()
        pairs.append((start, watch.mark()))
    return min(watch.seconds(a, b) for a, b in pairs[1:])


def copy_rate() -> float:
    """Bytes/s, read and written, of a copy of a tensor too large for any cache: 256 MiB on a CPU, 1 GiB on a GPU."""
    source = torch.ones(2**30 if device().type == "cuda" else 2**28, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source))


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, 2048 wide on a CPU, 8192 on a GPU."""
    n = 8192 if device().type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, rounds=4)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def describe_machine() -> dict:
    """Name, versions, commit and date for the head of a results file. "slug" names the file."""
    is_gpu = device().type == "cuda"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if is_gpu else f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    is_changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {
        "name": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "device": device().type,
        "threads": threads,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "half_precision": half_precision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if is_changed else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_results(file: Path, machine: dict, rows: list[dict]) -> None:
    """One row a line, so that diff can compare two files."""
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with atomic_file(file) as temporary:
        temporary.write_text(
            f'{{"machine": {json.dumps(machine, indent=1, ensure_ascii=False)},\n"rows": [\n{body}\n]}}\n', encoding="utf-8"
        )
