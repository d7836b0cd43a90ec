"""Calls `native.c` through ctypes."""

import ctypes
import functools
import time
from collections import defaultdict, deque
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..kernels import c_compiler
from ..kernels.reference import COLDEST
from ..model.gpt import GPT

SOURCE = Path(__file__).with_name("native.c")
# -ffp-contract=off: GCC fuses a · b + c in some loops only, and a sequence would depend on the others in the batch.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-lm")
DTYPES = (torch.float32, torch.bfloat16)
TRY = 5  # passes
WORTH = 1.1  # how many times as fast all threads must be


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "qkv", "attention_out", "gate_up", "mlp_out")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "width", "mlp_width", "vocab_size", "context")),
        ("window", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "cos", "sin")),
        ("layers", ctypes.POINTER(_Layer)),
    ]


def load_library() -> ctypes.CDLL | str:
    """The compiled `native.c`, or a sentence for the user why it is not available."""
    lib = c_compiler.load(SOURCE, FLAGS)
    if isinstance(lib, str):
        return lib
    lib.scratch_size.restype = lib.struct_sizes.restype = ctypes.c_int64
    lib.forward.restype = ctypes.c_char_p
    if lib.struct_sizes() != 10000 * ctypes.sizeof(_Model) + ctypes.sizeof(_Layer):
        return f"{SOURCE.name} and native.py describe different structs; the slower PyTorch path runs"
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


class ThreadChoice:
    """One thread or all for passes of about one size, whichever is faster at present.

    On an idle machine that is usually all threads. If other processes use its processors, a pass waits for the thread that does not run. So
    the other number is tried for a few passes as soon as the present one has run 30 times as long as the last try took. Medians count: most
    passes of one thread are not interrupted, most passes of several are."""

    def __init__(self, n_thread: int):
        self.n_thread = n_thread
        self._seconds = {1: deque[float](maxlen=TRY), n_thread: deque[float](maxlen=TRY)}
        self._left, self._wait = 0, 0.0  # passes left of a try; seconds until the next

    def record(self, seconds: float) -> None:
        """Choose the number of threads of the next pass. The last one took `seconds`."""
        self._seconds[self.n_thread].append(seconds)
        self._wait += 30 * seconds if self._left else -seconds
        if self._left > 1:
            self._left -= 1
        elif self._left:
            self._left = 0
            self.n_thread = min(self._seconds, key=lambda n: median(self._seconds[n]) * (1 if n == 1 else WORTH))
        elif self._wait <= 0 and len(self._seconds) > 1:
            self._left, self._wait = TRY, 0.0
            self.n_thread = next(n for n in self._seconds if n != self.n_thread)


def _check_logits(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or logits.device.type != "cpu" or logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits are {_describe(logits)}; they must be 2-d fp32 on the CPU with stride 1 along the last axis")


def argmax(logits: Tensor) -> Tensor:
    """The index of the first maximum of each row of logits (B, V), fp32 on the CPU, with any row stride: (B,) int64."""
    _check_logits(logits)
    index, integer = torch.empty(len(logits), dtype=torch.int64), ctypes.c_int64
    n_thread = max(1, min(torch.get_num_threads(), logits.numel() >> 18))  # 0.1 ms of work for each
    library().argmax(
        ctypes.c_void_p(logits.data_ptr()), *map(integer, (*logits.shape, logits.stride(0))),
        ctypes.c_void_p(index.data_ptr()), integer(n_thread),
    )  # fmt: skip
    return index


def draw(logits: Tensor, u: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What `sampling.draw(*candidates(…), u)` chooses, up to rounding: (B,) int64, -1 for a row that is not finite.

    logits (B, V) as in `argmax`, u (B, 1) fp64. Raises ValueError unless 1 ≤ top_k < V."""
    _check_logits(logits)
    (n, vocab_size), integer = logits.shape, ctypes.c_int64
    if not 1 <= top_k < vocab_size or vocab_size >= 2**32:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to {vocab_size - 1}, one less than the columns of the logits")
    if u.dtype != torch.float64 or u.device.type != "cpu" or u.shape != (n, 1) or not u.is_contiguous():
        raise ValueError(f"u is {_describe(u)}; it must be contiguous fp64 on the CPU, one number per row")
    chosen, kept = torch.empty(n, dtype=torch.int64), torch.empty(vocab_size, dtype=torch.int64)
    scores, heap = torch.empty(vocab_size), torch.empty(top_k)
    library().draw(
        ctypes.c_void_p(logits.data_ptr()), *map(integer, (n, vocab_size, logits.stride(0))), ctypes.c_float(max(temperature, COLDEST)),
        integer(top_k), ctypes.c_double(top_p), ctypes.c_double(min_p),
        *(ctypes.c_void_p(t.data_ptr()) for t in (u, chosen, scores, heap, kept)),
    )  # fmt: skip
    return chosen


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device} with strides {t.stride()}"


class NativeForward:
    """The model's forward pass in `native.c`. It reads the model's own tensors, so it uses weights that are copied into them later, except
    norm weights that are not fp32."""

    def __init__(self, model: GPT):
        self._lib, self._keep, c = library(), [], model.config
        dtype, heads, fp32 = model.embedding.dtype, c.n_head * c.head_dim, torch.float32
        matrices = {
            "qkv": (heads + 2 * c.n_kv_head * c.head_dim, c.width), "attention_out": (c.width, heads),
            "gate_up": (2 * c.mlp_width, c.width), "mlp_out": (c.width, c.mlp_width),
        }  # fmt: skip
        norms = {"attention_norm": c.width, "mlp_norm": c.width} | (dict.fromkeys(("q_norm", "k_norm"), c.head_dim) if c.qk_norm else {})
        layers = (_Layer * c.n_layer)()
        for block, layer in zip(model.blocks, layers, strict=True):
            for name, shape in matrices.items():
                setattr(layer, name, self._pointer(getattr(block, name).weight, dtype, *shape))
            for name, size in norms.items():
                setattr(layer, name, self._pointer(getattr(block, name), fp32, size))
        sizes = (c.n_layer, c.n_head, c.n_kv_head, c.head_dim, c.width, c.mlp_width, c.vocab_size, c.context, c.window or 0)
        pointers = (self._pointer(t, dtype, c.vocab_size, c.width) for t in (model.embedding, model.head))
        tables = [self._pointer(t, fp32, c.context, c.head_dim // 2) for t in (model.cos, model.sin)]
        tables = [self._pointer(model.norm, fp32, c.width), *tables]
        self._model = _Model(*sizes, dtype == torch.bfloat16, c.norm_eps, *pointers, *tables, layers)
        # By the number of bits of the number of tokens.
        self._threads: dict[int, ThreadChoice] = defaultdict(lambda: ThreadChoice(torch.get_num_threads()))
        self._cache_shape = (c.n_layer, 2, c.n_kv_head, c.head_dim)
        self._vocab_size, self._scratch, self._logits = c.vocab_size, torch.empty(0), torch.empty(0)

    def _pointer(self, t: Tensor, dtype: torch.dtype, *shape: int) -> int:
        """The address of a tensor, or of a copy in the dtype. Raises ValueError for another shape or device."""
        if t.shape != shape or t.device.type != "cpu":
            raise ValueError(f"a tensor of the model is {_describe(t)}; its config needs {shape} on the CPU")
        t = t.detach().to(dtype).contiguous()
        self._keep.append(t)  # keeps the memory of a copy alive
        return t.data_ptr()

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor, cache: Tensor, last: Tensor) -> Tensor:
        """Write the keys and values of `tokens` (n,) at `rows`, `positions` (n,) into `cache` (n_layer, 2, slots, capacity, H_kv, D) fp32,
        and return the logits (len(last), V) of the tokens at the ascending indices `last`. The next call overwrites the result.

        The index tensors are int64 on the CPU. Raises ValueError if one is out of range or a tensor has another form."""
        n, n_last = len(tokens), len(last)
        threads = self._threads[n.bit_length()]
        n_thread = threads.n_thread
        for name, t in {"tokens": tokens, "rows": rows, "positions": positions, "last": last}.items():
            if t.dtype != torch.int64 or t.device.type != "cpu" or t.shape != (n_last if name == "last" else n,) or not t.is_contiguous():
                raise ValueError(f"{name} is {_describe(t)}; it must be contiguous int64 on the CPU, one number per token")
        if (
            cache.ndim != 6 or (*cache.shape[:2], *cache.shape[4:]) != self._cache_shape
            or cache.dtype != torch.float32 or cache.device.type != "cpu" or not cache.is_contiguous()
        ):  # fmt: skip
            raise ValueError(
                f"the cache is {_describe(cache)}; it must be contiguous fp32 on the CPU, (n_layer, 2, slots, capacity, H_kv, D)"
            )
        slots, capacity = cache.shape[2:4]
        needed = self._lib.scratch_size(ctypes.byref(self._model), *(ctypes.c_int64(i) for i in (n, capacity, n_thread)))
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        if self._logits.numel() < n_last * self._vocab_size:
            self._logits = torch.empty(n_last * self._vocab_size)
        pointer, integer = (lambda t: ctypes.c_void_p(t.data_ptr())), ctypes.c_int64
        began = time.perf_counter()
        problem = self._lib.forward(
            ctypes.byref(self._model), integer(n), pointer(tokens), pointer(rows), pointer(positions), pointer(cache), integer(slots),
            integer(capacity), integer(n_last), pointer(last), pointer(self._logits), pointer(self._scratch), integer(n_thread),
        )  # fmt: skip
        if problem:
            limits = f"vocab_size {self._vocab_size}, {slots} rows of {capacity} positions, {n} tokens"
            raise ValueError(f"native.c: {problem.decode()} out of range ({limits})")
        threads.record(time.perf_counter() - began)
        return self._logits[: n_last * self._vocab_size].view(n_last, self._vocab_size)
