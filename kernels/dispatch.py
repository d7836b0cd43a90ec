"""Which implementation an op runs: Triton for CUDA and ROCm tensors, PyTorch for all others.

`TRITON_INTERPRET=1` in the environment sends CPU tensors through the Triton kernels too (Triton's interpreter, for tests). The choice is
made in Python before the op, from the device of its input; `backend(...)` overrides it.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
_forced = "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one implementation: "auto" (by device), "triton" or "torch".

    Raises ValueError for another name, or for "triton" if Triton is not installed."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "triton" and not has_triton():
        raise ValueError("backend 'triton' needs the package triton (Linux only): pip install triton, or use 'torch'")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_automatic() -> bool:
    """Whether no `backend` is forced."""
    return _forced == "auto"


def launcher_missing() -> str | None:
    """What Triton lacks to build the small C modules that launch its kernels, with the remedy. None if it has all, or is not installed."""
    if not has_triton():
        return None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "Triton needs a C compiler to launch its kernels: on Debian apt install gcc, or set CC to the path of one"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton needs Python's headers to launch its kernels: on Debian apt install python3-dev"
    return None


def interprets() -> bool:
    """Whether Triton kernels run on CPU tensors in this process, through the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def uses_triton(x: Tensor) -> bool:
    """Whether an op on x runs its Triton kernel."""
    if _forced == "torch":
        return False
    if x.is_cuda:
        return _forced == "triton" or has_triton()
    if _forced == "triton" and not interprets():
        raise ValueError(
            f"backend 'triton' cannot run on a {x.device.type} tensor; move it to a GPU, or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels on the CPU (slow, for tests)"
        )
    return interprets()


def is_readable(x: Tensor) -> bool:
    """Whether reading x's values does not synchronise with a device, so that an op can check them. torch.compile has no values."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu"


def check_documents(cu_seqlens: Tensor, n_batch: int, n_tokens: int) -> None:
    """Raise ValueError if cu_seqlens cannot be the bounds of documents in a batch of this shape; values are checked on the CPU only."""
    if n_batch != 1 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} for a batch of ({n_batch}, {n_tokens}) tokens: (documents + 1,) expected, and the batch "
            "flattened to B = 1"
        )
    if is_readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != n_tokens or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens {bounds} must rise from 0 to the number of tokens, {n_tokens}; a last entry may be repeated")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype if it is on (fp64 stays fp64), as PyTorch's matrix products do; otherwise unchanged."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
