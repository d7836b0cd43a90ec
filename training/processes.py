"""The processes of a run and their devices: the process group, precision, speed and memory."""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from ..common.errors import UserError, one_line
from ..kernels.dispatch import launcher_missing

# Dense bf16 tensor-core TFLOP/s with fp32 accumulation, from NVIDIA's data sheets. The first whose words are in a GPU's name counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362,
    "B200": 2250, "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209,
}  # fmt: skip


@dataclass(frozen=True)
class Processes:
    """This process and the number of all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> Processes:
    """Join the process group that the launcher sets in the environment, if there is more than one process: nccl on GPUs, gloo on CPUs.

    Raises UserError if there are more processes than GPUs, or if a GPU's kernels cannot be launched; ConnectionError if the processes
    cannot connect."""
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= (count := torch.cuda.device_count()):
            raise UserError(
                f"process {local + 1} has no GPU: this machine has {count}; start torchrun with --nproc-per-node {count} or fewer"
            )
        if reason := launcher_missing():
            raise UserError(reason)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_heap()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if world_size > 1:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        except RuntimeError as error:
            raise ConnectionError(f"process {rank} could not connect to the other processes: {one_line(error)}") from None
    return Processes(rank, world_size, device)


def ending_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP (the terminal was closed) where it exists and is not ignored, as by nohup."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [n for name in names if (n := getattr(signal, name, None)) is not None and signal.getsignal(n) != signal.SIG_IGN]


def exit_status(number: int) -> int:
    """The exit status of a run that a signal has ended in order: 130 after Ctrl-C, 0 after another one."""
    return 130 if number == signal.SIGINT else 0


class Stop:
    """Ends a run on SIGTERM, SIGHUP or Ctrl-C: within the context, `is_due` says after which step, the same one in all processes.

    Outside of `deferred` a signal raises KeyboardInterrupt or SystemExit at once, since there is nothing to save. A second Ctrl-C always
    ends the process at once, by the operating system; what is being written then is left under a temporary name.

    Raises ConnectionError in place of the body's error if that says that another process of the run has ended."""

    def __init__(self):
        self.is_training = False
        self._signal, self._agreed = 0, 0
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Stop":
        is_main = threading.current_thread() is threading.main_thread()  # only there Python handles signals
        self._before = {number: signal.signal(number, self._handle) for number in ending_signals() if is_main}
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # of the main memory
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        try:
            if error and has_lost_another(error):
                self._wait_for_launcher()
                raise ConnectionError("another process of the run has ended") from None
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _wait_for_launcher(self) -> None:
        """The launcher ends this process by SIGTERM and prints the one message. The signal may have come before the error."""
        if self._signal:
            sys.exit(1)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(60)

    def _handle(self, number: int, frame: object) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.is_training:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\nfinishing the step and writing a checkpoint; Ctrl-C again ends at once\n")  # and shows the cursor

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Training: a signal only makes `is_due` true."""
        self.is_training = True
        try:
            yield
        finally:
            self.is_training = False

    def is_due(self) -> bool:
        """Whether the run ends after this step. All processes call it once a step. They exchange what they know in the background of the
        next step, so with several processes it is true a step later."""
        if self._group is None:
            self._agreed = self._signal
        else:
            if self._exchange:
                self._exchange[0].wait()
                self._agreed = int(self._exchange[1])
            known = torch.tensor(self._signal)
            self._exchange = cast(dist.Work, dist.all_reduce(known, dist.ReduceOp.MAX, group=self._group, async_op=True)), known
        return bool(self._agreed)

    @property
    def status(self) -> int:
        return exit_status(self._agreed)


def end_with_parent() -> None:
    """End this process soon after its parent, the launcher, has ended. Otherwise the ranks would continue after `kill -9` of it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.write(2, b"train.py: the launcher has ended, so this process ends\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def has_lost_another(error: BaseException) -> bool:
    """Whether the error says that another process of the run has ended. Gloo raises a RuntimeError without a class of its own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


@torch.no_grad()
def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes the main process's values."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def check_same(device: torch.device, values: dict[str, object]) -> None:
    """Raises UserError in all processes if a value is not the same in all: they have other options, or read other files."""
    if not dist.is_initialized():
        return
    digests = [int(hashlib.sha256(str(v).encode()).hexdigest()[:15], 16) for v in values.values()]
    extremes = torch.tensor([digests, [-d for d in digests]], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    pairs = zip(values, *extremes.tolist(), strict=True)
    wrong = [f"{name} (process {dist.get_rank()}: {values[name]})" for name, most, least in pairs if most != -least]
    if wrong:
        raise UserError(
            f"the processes differ in {', '.join(wrong)}; start them with the same options, and keep out_dir and the data in folders that "
            "all machines share"
        )


def barrier() -> None:
    """Wait until all processes have reached this point."""
    if dist.is_initialized():
        dist.barrier()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_heap() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel. A training step frees and allocates the same large buffers, and
    page faults would cost 12–17 % of a step on two cores (docs/log.md). Does nothing on other systems."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
            mallopt(m_top_pad, 2**28)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(name: str, device: torch.device) -> str:
    """bf16, fp16 or fp32. "auto" is bf16 if the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU.

    Raises UserError for fp16 on a CPU."""
    if name == "auto":
        return "bf16" if has_bf16(device) else ("fp16" if device.type == "cuda" else "fp32")
    if name == "fp16" and device.type != "cuda":
        raise UserError("train.precision fp16 needs a GPU; choose auto, bf16 or fp32")
    return name


def autocast(device: torch.device, precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    """A function that returns a new context for the forward pass: autocast to bf16 or fp16, or no autocast for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def cpp_compiler_missing() -> str | None:
    """The reason why torch.compile cannot work for this CPU, or None if it works."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # Inductor's InvalidCxxCompiler, or an error of its search
        return str(error).splitlines()[0]
    return None


def trust_vector_instructions() -> None:
    """Let Inductor use the vector instructions that the CPU reports. Otherwise it compiles and loads a library for each kind of them, which
    is a quarter of the quick start's compilation. A compiler that takes PyTorch's headers takes them all."""
    from torch._inductor import config

    if sys.platform == "linux" and config.cpp.vec_isa_ok is None:
        config.cpp.vec_isa_ok = True


def data_sheet_tflops(name: str) -> int | None:
    """The entry of PEAK_TFLOPS for a GPU of this name. Laptop versions and parts of a GPU (MIG) share a name with a faster one, and have
    none."""
    if "Laptop" in name or "MIG" in name:
        return None
    return next((tflops for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def matmul_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of matrix products in this precision, source of the figure).

    The source is the data sheet for a known GPU, else the best of 6 measured products of 1024³ (8192³ on a GPU)."""
    if device.type == "cuda" and precision != "fp32" and (tflops := data_sheet_tflops(torch.cuda.get_device_name(device))):
        return tflops * 1e12, "data sheet"
    n = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    best = float("inf")
    for _ in range(6):
        start_time = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start_time)
    return 2 * n**3 / best, "measured now"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: the free memory of the GPU or the machine, or of the container if that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no cgroup version 2, or "max": no limit
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8") for name in ("max", "current", "stat"))
        cache = dict(line.split() for line in stat.splitlines())["inactive_file"]  # the kernel frees it on demand
        free = min(free, int(limit) - int(used) + int(cache))
    return free


def cublas_workspace(device: torch.device) -> int:
    """Bytes that PyTorch allocates for cuBLAS on each stream, unless CUBLAS_WORKSPACE_CONFIG is set. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return 32 << 20 if major >= 9 else 8320 << 10


def has_fast_attention(device: torch.device, precision: str) -> bool:
    """Whether attention's Triton kernels have tensor cores for this precision. Otherwise PyTorch's attention runs, except for packed
    documents and soft caps."""
    return precision != "fp32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":  # ru_maxrss would include the memory of the process that started this one
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
