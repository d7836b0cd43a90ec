"""Compiles `native.c` for this machine (about a second), keeps the library in the user's cache and calls it through ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..model.gpt import GPT

SOURCE = Path(__file__).with_name("native.c")
# -ffp-contract=off: GCC fuses a · b + c in some loops only, and a sequence would depend on the others in the batch.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-lm")
DTYPES = (torch.float32, torch.bfloat16)


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "qkv", "attention_out", "gate_up", "mlp_out")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "width", "mlp_width", "vocab_size")),
        ("window", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "cos", "sin")),
        ("layers", ctypes.POINTER(_Layer)),
    ]


def _machine() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return platform.platform() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_library() -> ctypes.CDLL | str:
    """The compiled `native.c`, or a sentence for the user why it is not available."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C compiler (cc, gcc, clang) was found; generation on the CPU runs slower without one (Debian: apt install gcc)"
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _machine())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritale"
    try:
        # The content's hash is in the name: a truncated file, after a crash for example, would end the process.
        kept = folder.glob(f"native-{key}-*.so")
        path = next((p for p in kept if p.stem == f"native-{key}-{_digest(p)}"), None)
        if path is None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                built = Path(temporary) / "native.so"
                result = subprocess.run(
                    [compiler, str(SOURCE), "-o", str(built), *FLAGS], capture_output=True, text=True, encoding="utf-8", timeout=120,
                    env=os.environ | {"LC_ALL": "C"},
                )  # fmt: skip
                if result.returncode:
                    lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
                    why = next((line for line in lines if "error" in line), lines[0])
                    return f"{compiler} could not compile {SOURCE.name} ({why}); the slower PyTorch path runs"
                path = folder / f"native-{key}-{_digest(built)}.so"
                built.rename(path)
        lib = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{SOURCE.name} could not be compiled or loaded ({error}); the slower PyTorch path runs"
    lib.scratch_size.restype = ctypes.c_int64
    return lib


@functools.cache
def _library() -> ctypes.CDLL | str:
    return load_library()


def library() -> ctypes.CDLL:
    """The compiled `native.c`. Raises RuntimeError if it is not available."""
    found = _library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def problem() -> str | None:
    """Why `native.c` is not available on this machine, or None if it is."""
    found = _library()
    return found if isinstance(found, str) else None


def can_run(model: GPT) -> bool:
    """Whether `native.c` can run this model: on a CPU, in fp32 or bf16, if it compiles."""
    p = model.embedding
    return p.device.type == "cpu" and p.dtype in DTYPES and problem() is None


def argmax(logits: Tensor) -> Tensor:
    """The index of the first maximum of each row of logits (B, V), fp32 on the CPU, with any row stride: (B,) int64."""
    index, integer = torch.empty(len(logits), dtype=torch.int64), ctypes.c_int64
    library().argmax(
        ctypes.c_void_p(logits.data_ptr()), *map(integer, (*logits.shape, logits.stride(0))),
        ctypes.c_void_p(index.data_ptr()), integer(torch.get_num_threads()),
    )  # fmt: skip
    return index


class NativeForward:
    """The model's forward pass in `native.c`. It reads the model's own tensors, so it uses weights that are copied into them later, except
    norm weights that are not fp32."""

    def __init__(self, model: GPT):
        self._lib, self._keep, c = library(), [], model.config
        layers = (_Layer * c.n_layer)()
        for block, layer in zip(model.blocks, layers, strict=True):
            for name in ("qkv", "attention_out", "gate_up", "mlp_out"):
                setattr(layer, name, self._pointer(getattr(block, name).weight))
            for name in ("attention_norm", "mlp_norm", *(("q_norm", "k_norm") if c.qk_norm else ())):
                setattr(layer, name, self._pointer(getattr(block, name).float()))
        sizes = (c.n_layer, c.n_head, c.n_kv_head, c.head_dim, c.width, c.mlp_width, c.vocab_size, c.window or 0)
        pointers = (self._pointer(model.embedding), self._pointer(model.head))
        tables = (self._pointer(t.float()) for t in (model.norm, model.cos, model.sin))
        self._model = _Model(*sizes, model.embedding.dtype == torch.bfloat16, c.norm_eps, *pointers, *tables, layers)
        self._vocab_size, self._scratch, self._logits = c.vocab_size, torch.empty(0), torch.empty(0)

    def _pointer(self, t: Tensor) -> int:
        t = t.detach().contiguous()
        self._keep.append(t)  # keeps the memory of a copy alive
        return t.data_ptr()

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor, cache: Tensor, last: Tensor) -> Tensor:
        """Write the keys and values of `tokens` (n,) at `rows`, `positions` (n,) into `cache` (n_layer, 2, slots, capacity, H_kv, D) fp32,
        and return the logits (len(last), V) of the tokens at the ascending indices `last`. The next call overwrites the result.

        All index tensors are int64 on the CPU and must be in range."""
        n, n_last, n_thread = len(tokens), len(last), torch.get_num_threads()
        slots, capacity = cache.shape[2:4]
        needed = self._lib.scratch_size(ctypes.byref(self._model), *(ctypes.c_int64(i) for i in (n, capacity, n_thread)))
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        if self._logits.numel() < n_last * self._vocab_size:
            self._logits = torch.empty(n_last * self._vocab_size)
        pointer, integer = (lambda t: ctypes.c_void_p(t.data_ptr())), ctypes.c_int64
        self._lib.forward(
            ctypes.byref(self._model), integer(n), pointer(tokens), pointer(rows), pointer(positions), pointer(cache), integer(slots),
            integer(capacity), integer(n_last), pointer(last), pointer(self._logits), pointer(self._scratch), integer(n_thread),
        )  # fmt: skip
        return self._logits[: n_last * self._vocab_size].view(n_last, self._vocab_size)
