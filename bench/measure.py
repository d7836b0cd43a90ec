"""What all benchmarks share: interleaved times, peak memory, the machine and its own rates, and fresh child processes."""

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import Tensor

from tritale.common.files import atomic_file
from tritale.training.processes import has_bf16

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision() -> str | None:
    """The 16-bit dtype this machine's matrix units take, None where it has none (a CPU imitates bf16 many times slower than fp32)."""
    if has_bf16(device()):
        return "bf16"
    return "fp16" if device().type == "cuda" else None


# ---- memory -----------------------------------------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    """VmRSS or VmHWM (its peak since `forget_peak`) of this process, in bytes."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024


def forget_peak() -> int:
    """Give freed memory back, start a new peak, and return the bytes held now: allocated on a GPU, resident on a CPU."""
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
    """Most bytes held since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else _resident("VmHWM")


def children() -> multiprocessing.context.BaseContext:
    """Fresh processes, forked from one that has imported PyTorch and computed nothing: they start in a moment and share no heap."""
    if sys.platform != "linux":
        raise RuntimeError(f"peak memory is read from /proc, which {sys.platform} does not have; run the benchmarks on Linux")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compile workers in every child
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._inductor.compile_fx", "torch._dynamo", "tritale.model", "transformers.models.mistral"])
    return context


DIED = "the process died (out of memory?)"


def _call(pipe, function: Callable, job: tuple) -> None:
    try:
        pipe.send(function(*job))
    except Exception as error:
        pipe.send({"failed": in_a_line(error)})


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def each_in_a_fresh_process(function: Callable, jobs: list[tuple], at_once: int, tick: Callable) -> dict[tuple, object]:
    """{job: function(*job)}, each computed by a process that does nothing else; {"failed": why} for one that raises or dies."""
    context, waiting, running, results = children(), list(jobs), {}, {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            ours, theirs = context.Pipe()
            process = context.Process(target=_call, args=(theirs, function, job), daemon=True)
            process.start()
            theirs.close()
            running[ours] = job, process
        for pipe in wait(list(running)):
            job, process = running.pop(pipe)
            try:
                results[job] = pipe.recv()
            except EOFError:
                results[job] = {"failed": DIED}
            process.join()
            tick()
    return results


# ---- time -------------------------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Times on the device: events in its queue on a GPU, the wall clock on a CPU."""

    def __init__(self):
        self.is_cuda = device().type == "cuda"
        # Larger than any L2 cache; written before each GPU round, so that no round finds its inputs there, as Triton's do_bench does.
        self.flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda") if self.is_cuda else None

    def mark(self) -> "torch.cuda.Event | float":
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        if not self.is_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def cold(self) -> None:
        if self.is_cuda:
            self.flush.zero_()
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the kernels queue up: they are timed, not their launches


Times = dict[str, list[float]]  # {"forward": seconds of each round, "backward": …, "both": …}


def one_round(watch: Stopwatch, function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list]:
    """(outputs, gradients of the inputs that need one, marks before forward, between, after backward) of one call."""
    leaves = [t for t in inputs if t.requires_grad]
    watch.cold()
    start = watch.mark()
    outputs = function(*inputs)
    middle = watch.mark()
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    found = torch.autograd.grad(outputs, leaves, grads)
    return outputs, list(found), [start, middle, watch.mark()]


def interleaved(calls: dict[str, tuple], rounds: int, tick: Callable = lambda: None) -> dict[str, Times]:
    """Times of the calls (function, inputs, gradients of the outputs) in turns, A B C A B C …, so that whatever else the machine does hurts
    all alike."""
    watch = Stopwatch()
    marks = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            marks[name].append(one_round(watch, *call)[2])
            tick()
    times = {}
    for name, triples in marks.items():
        forward = [watch.seconds(a, b) for a, b, _ in triples]
        backward = [watch.seconds(b, c) for _, b, c in triples]
        times[name] = {"forward": forward, "backward": backward, "both": [f + b for f, b in zip(forward, backward, strict=True)]}
    return times


def spread(values: list[float]) -> dict[str, float | int]:
    """Median, fastest and slowest of the rounds."""
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
    """Bytes/s read and written by a copy of a tensor that no cache holds: 256 MiB on a CPU, 1 GiB on a GPU."""
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
    """Name, versions, commit and date, for the head of a results file; "slug" names the file."""
    is_gpu = device().type == "cuda"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if is_gpu else f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    simd = torch.backends.cpu.get_cpu_capability()
    is_changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {
        "name": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "device": device().type,
        "threads": threads,
        "simd": simd,
        "half_precision": half_precision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if is_changed else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_results(file: Path, machine: dict, rows: list[dict]) -> None:
    """One row a line, so that two files can be compared line by line; written aside, synced, renamed."""
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with atomic_file(file) as aside:
        aside.write_text(f'{{"machine": {json.dumps(machine, indent=1, ensure_ascii=False)},\n"rows": [\n{body}\n]}}\n', encoding="utf-8")
