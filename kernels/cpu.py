"""The ops that are bound by memory on a CPU, by `cpu.c`: each tensor is read once and written once.

`torch.compile` fuses an op's definition with its neighbours, so a compiled model keeps it, except that the chunked loss makes its
softmax here. Dtypes other than fp32 and bf16, small tensors, torch.func's transforms and forward-mode AD use the definition too. A second
derivative is that of the definition.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from . import c_compiler, dispatch, reference
from .common import as_rows, contiguous_like, is_transformed, unit_stride
from .rotary import check_positions, position_stride

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-lm")
DTYPES = (torch.float32, torch.bfloat16)
SMALLEST = 1 << 15  # entries of a tensor: below it the definition takes as long, and nothing is compiled for it
PER_THREAD = 1 << 14  # entries, at least
PARTS = 32  # of the rows, whose sums of the weight's gradient are added in order

_ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_SIGNATURES = {
    "cross_entropy": "ppppppppp iiiii ff ii",
    "cross_entropy_backward": "pppppp iiiii ff ii",
    "rms_norm": "ppppp iiii ff ii",
    "rms_norm_backward": "pppppp iiiiii ff ii",
    "glu": "pppppp iiiiiiiii",
    "rope": "pppppppp iiiiiii f ii",
    "qk_norm_rope": "ppppppppp iiiiiii f ii",
    "qk_norm_rope_backward": "ppppppppppp iiiiiiii f ii",
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled `cpu.c`. None, after a warning, if it is not available."""
    lib = c_compiler.load(SOURCE, FLAGS)
    if isinstance(lib, str):
        warnings.warn(f"tritale.kernels: {lib}", stacklevel=4)
        return None
    for name, signature in _SIGNATURES.items():
        getattr(lib, name).argtypes = [_ARGUMENTS[kind] for kind in signature.replace(" ", "")]
        getattr(lib, name).restype = ctypes.c_int64 if name.startswith("cross_entropy") else None
    return lib


def is_available() -> bool:
    """Whether `cpu.c` is compiled on this machine, or can be."""
    return _library() is not None


def can_run(
    x: Tensor, *same: Tensor | None, small: Sequence[Tensor | None] = (), positions: Tensor | None = None, numbers: Sequence = ()
) -> bool:  # fmt: skip
    """Whether `cpu.c` can compute an op of x, tensors that must have its dtype, small ones (weights and tables), positions and options."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in DTYPES or x.numel() < SMALLEST:
        return False
    tensors = [t for t in (x, *same, *small, positions) if t is not None]
    return (
        dispatch.is_automatic()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device == x.device and t.layout == torch.strided for t in tensors)
        and not any(t.is_neg() or t._is_zerotensor() for t in tensors)
        and not (torch.is_grad_enabled() and any(t.is_inference() for t in tensors))  # those cannot be saved for backward
        and all(t is None or t.dtype == x.dtype for t in same)
        and all(t is None or t.dtype != torch.float64 for t in small)
        and (positions is None or (type(positions) is Tensor and positions.dtype in (torch.int32, torch.int64)))
        and all(isinstance(n, (int, float)) for n in numbers)
        and functorch.peek_interpreter_stack() is None
        and not is_transformed(*tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and _library() is not None
    )


def _call(name: str, x: Tensor, *arguments: Tensor | ctypes.Array | float | None) -> int | None:
    """Call a function of `cpu.c`, whose last arguments are whether x is bf16 and the number of threads."""
    n_thread = max(1, min(torch.get_num_threads(), x.numel() // PER_THREAD))
    values = (t.data_ptr() if isinstance(t, Tensor) else t for t in arguments)
    return getattr(_library(), name)(*values, x.dtype == torch.bfloat16, n_thread)


def by_definition(definition: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the inputs, by autograd."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # views, since one input may depend on another
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        outputs = definition(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def is_special(*grads: Tensor | None) -> bool:
    """Whether a gradient has no ordinary memory, as inside of vmap (is_grads_batched=True)."""
    is_odd = lambda g: functorch.is_legacy_batchedtensor(g) or g.is_neg() or g._is_zerotensor()
    return is_transformed(*grads) or any(g is not None and is_odd(g) for g in grads)


def needs_definition(*grads: Tensor | None) -> bool:
    """Whether backward must be differentiable (create_graph=True), or a gradient has no ordinary memory."""
    return torch.is_grad_enabled() or is_special(*grads)


def _as_fp32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor | None]:
    y, total = contiguous_like(x), None if residual is None else contiguous_like(residual)
    rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    stride = 0 if residual_rows is None else residual_rows.stride(0)
    _call("rms_norm", x, rows, residual_rows, _as_fp32(weight), y, total, *rows.shape, rows.stride(0), stride, eps, offset)
    return y, total


def _norm_gradients(ctx, dy: Tensor, dsum: Tensor | None, needs_dw: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the normed tensor and of the weight."""
    x, weight = ctx.saved_tensors
    if needs_definition(dy, dsum):
        dx, dw = by_definition(lambda x, w: reference.rms_norm(x, w, ctx.eps, offset=ctx.offset), (x, weight), (dy,))
        return dx if dsum is None else dsum if dx is None else dx + dsum, dw
    dx, rows, dy, dsum = contiguous_like(x), as_rows(x), as_rows(dy), None if dsum is None else as_rows(dsum)
    n_rows, width = rows.shape
    n_parts = min(PARTS, n_rows)
    dw = x.new_empty((n_parts, width), dtype=torch.float32) if needs_dw else None
    _call(
        "rms_norm_backward", x, dy, dsum, rows, _as_fp32(weight), dx, dw, n_rows, width, n_parts,
        dy.stride(0), 0 if dsum is None else dsum.stride(0), rows.stride(0), ctx.eps, ctx.offset,
    )  # fmt: skip
    return dx, None if dw is None else dw.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return _norm(x, None, weight, eps, offset)[0]

    @staticmethod
    def backward(ctx, *grads):
        return *_norm_gradients(ctx, grads[0], None, ctx.needs_input_grad[1]), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        y, total = _norm(x, residual, weight, eps, offset)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.offset = eps, offset
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx, *grads):
        dy, dsum = grads
        d, dw = (dsum, None) if dy is None else _norm_gradients(ctx, dy, dsum, ctx.needs_input_grad[2])
        return d, d, dw, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _AddRMSNorm.apply(x, residual, weight, eps, offset)


def _halves(packed: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
    return as_rows(packed).chunk(2, dim=-1) if up is None else (as_rows(packed), as_rows(up))


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, up, is_gelu):
        ctx.save_for_backward(gate_up, up)
        ctx.is_gelu = is_gelu
        gate, up_rows = _halves(gate_up, up)
        h = gate_up.new_empty((*gate_up.shape[:-1], gate.shape[1]))
        _call("glu", h, gate, up_rows, None, h, None, None, *gate.shape, gate.stride(0), up_rows.stride(0), 0, 0, is_gelu)
        return h

    @staticmethod
    def backward(ctx, *grads):
        gate_up, up = ctx.saved_tensors
        if needs_definition(*grads):
            return *by_definition(reference.geglu if ctx.is_gelu else reference.swiglu, (gate_up, up), grads), None
        dh, d, d_up = as_rows(grads[0]), contiguous_like(gate_up), None if up is None else contiguous_like(up)
        (gate, up_rows), (d_gate, d_up_rows) = _halves(gate_up, up), _halves(d, d_up)
        strides = (t.stride(0) for t in (gate, up_rows, dh, d_gate))
        _call("glu", dh, gate, up_rows, dh, None, d_gate, d_up_rows, *gate.shape, *strides, ctx.is_gelu)
        return d, d_up, None


def glu(gate_up: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return _GLU.apply(gate_up, up, activation == "gelu")


def cross_entropy(
    logits: Tensor,  # (N, V), with adjacent columns
    targets: Tensor,  # (N,) int32 or int64
    rows: Sequence[Tensor],  # loss, nll, top, log_total, (N,) fp32, which are written
    correct: Tensor | None,  # (N,) bool, is written
    *, ignore_index: int, label_smoothing: float, z_loss: float, gradient: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """The results of each row, as `cross_entropy.py` defines them, and the gradient of loss · scale (N,), which may overwrite the logits.

    Raises IndexError for a target that is not in 0 … V − 1."""
    targets = targets.long().contiguous()
    wrong = _call(
        "cross_entropy", logits, logits, targets, None if scale is None else scale.float().contiguous(), *rows, correct, gradient,
        *logits.shape, logits.stride(0), 0 if gradient is None else gradient.stride(0), ignore_index, label_smoothing, z_loss,
    )  # fmt: skip
    _check_targets(wrong, targets, logits)


def _check_targets(wrong: int | None, targets: Tensor, logits: Tensor) -> None:
    if wrong:
        raise IndexError(f"target {int(targets[wrong - 1])} is outside of 0 … {logits.shape[1] - 1}, and it is not ignore_index")


def cross_entropy_backward(
    logits: Tensor, targets: Tensor, top: Tensor, log_total: Tensor, scale: Tensor, gradient: Tensor, *, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """The gradient of loss · scale, from what `cross_entropy` wrote. Raises IndexError if wrong targets have been written there."""
    targets = targets.long().contiguous()
    wrong = _call(
        "cross_entropy_backward", logits, logits, targets, scale.float().contiguous(), top, log_total, gradient,
        *logits.shape, logits.stride(0), gradient.stride(0), ignore_index, label_smoothing, z_loss,
    )  # fmt: skip
    _check_targets(wrong, targets, logits)


def _integers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _tables(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In fp32 and int64. Raises ValueError for positions that cos does not have: in backward they may have been overwritten."""
    if positions is not None:
        check_positions(positions, cos)
    return cos.float().contiguous(), sin.float().contiguous(), None if positions is None else positions.long()


def _rotate(q: Tensor, k: Tensor, outputs: tuple[Tensor, Tensor], cos, sin, positions, sign: float) -> None:
    n_batch, n_tokens, n_head, head_dim = q.shape
    half = cos.shape[1]
    strides = _integers(*(n for t in (q, k, *outputs) for n in t.stride()[:3]))
    _call(
        "rope", q, q, k, *outputs, *_tables(cos, sin, positions), strides, n_batch, n_tokens, n_head, k.shape[2], half,
        head_dim - 2 * half, position_stride(positions), sign,
    )  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, sign):
        ctx.save_for_backward(cos, sin, positions)
        ctx.sign = sign
        outputs = contiguous_like(q), contiguous_like(k)
        _rotate(unit_stride(q), unit_stride(k), outputs, cos, sin, positions, sign)
        ctx.mark_non_differentiable(*(t for t, is_needed in zip(outputs, ctx.needs_input_grad, strict=False) if not is_needed))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        (dq, dk), (cos, sin, positions) = grads, ctx.saved_tensors
        if is_special(dq, dk):
            return *reference.rope(dq, dk, cos, -ctx.sign * sin, positions=positions), *(None,) * 4
        return *_Rope.apply(dq, dk, cos, sin, positions, -ctx.sign), *(None,) * 4


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    return _Rope.apply(q, k, cos.detach(), sin.detach(), positions, 1.0)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """Overwrites q and k, whose last dimensions have adjacent entries."""
    _rotate(q, k, (q, k), cos, sin, positions, 1.0)
    torch.autograd.graph.increment_version((q, k))


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, positions, n_head, n_kv_head, eps):
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions)
        ctx.heads, ctx.eps = (n_head, n_kv_head), eps
        n_batch, n_tokens, _ = qkv.shape
        head_dim, half, qkv = q_weight.shape[0], cos.shape[1], unit_stride(qkv)
        q, k, v = (qkv.new_empty((n_batch, n_tokens, n, head_dim)) for n in (n_head, n_kv_head, n_kv_head))
        _call(
            "qk_norm_rope", qkv, qkv, torch.stack((q_weight, k_weight)).float(), *_tables(cos, sin, positions), q, k, v,
            _integers(*qkv.stride()[:2]), n_batch, n_tokens, n_head, n_kv_head, half, head_dim - 2 * half, position_stride(positions), eps,
        )  # fmt: skip
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(v)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        qkv, q_weight, k_weight, cos, sin, positions = ctx.saved_tensors
        n_head, n_kv_head = ctx.heads
        if needs_definition(*grads):
            options = {"n_head": n_head, "n_kv_head": n_kv_head, "eps": ctx.eps, "positions": positions}
            definition = lambda x, wq, wk: reference.qk_norm_rope(x, wq, wk, cos, sin, **options)
            return *by_definition(definition, (qkv, q_weight, k_weight), grads), *(None,) * 6
        qkv, grads = unit_stride(qkv), [unit_stride(g) for g in grads]
        n_batch, n_tokens, _ = qkv.shape
        head_dim, half, dqkv = q_weight.shape[0], cos.shape[1], contiguous_like(qkv)
        n_parts = min(PARTS, n_batch * n_tokens)
        dw = qkv.new_empty((n_parts, 3, head_dim), dtype=torch.float32)
        strides = _integers(*(n for t in grads for n in t.stride()[:3]), *qkv.stride()[:2])
        _call(
            "qk_norm_rope_backward", qkv, *grads, qkv, torch.stack((q_weight, k_weight)).float(), *_tables(cos, sin, positions), dqkv, dw,
            strides, n_batch, n_tokens, n_head, n_kv_head, half, head_dim - 2 * half, n_parts, position_stride(positions), ctx.eps,
        )  # fmt: skip
        dwq, dwk = dw[:, :2].sum(0)
        return dqkv, dwq.to(q_weight.dtype, copy=True), dwk.to(k_weight.dtype, copy=True), *(None,) * 6


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_head: int, n_kv_head: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _QKNormRope.apply(qkv, q_weight, k_weight, cos.detach(), sin.detach(), positions, n_head, n_kv_head, eps)
