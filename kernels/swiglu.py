"""SwiGLU and GeGLU: silu(gate) · up and gelu(gate) · up, of one packed tensor [gate | up] or of two.

    forward    h = a(g) · u
    backward   dg = dh · u · a'(g),   du = dh · a(g)
    silu       a = g σ(g),                a' = σ(g) (1 + g (1 − σ(g)))
    gelu       a = g σ(2 z), z = √(2/π) (g + 0.044715 g³)   (½ (1 + tanh z) = σ(2 z)),   a' = σ(2 z) + g σ(2 z) (1 − σ(2 z)) 2 z'

Bytes for n results of s bytes: forward 3 n s, backward 5 n s (a(g) is computed again, only the input is saved). About 10 and 20 FLOPs an
element: bound by memory. One kernel serves both passes (IS_BACKWARD); packed gate and up are halves of one row, so the gradient of the
packed tensor is written in place of two and no concatenation follows.
"""

import torch
from torch import Tensor

from . import cpu, reference
from .common import LOG2E, accumulator, as_rows, contiguous_like, no_second_derivative, refuse_transforms
from .dispatch import uses_triton
from .launch import cdiv, launch_options
from .triton_compat import jit, tl


@jit
def _glu(
    p_gate, p_up, p_dh, p_h, p_dgate, p_dup,  # (M, N)
    n_rows, N, stride_gate, stride_up, stride_dh,
    stride_d,  # of dgate and dup
    IS_GELU: tl.constexpr, IS_BACKWARD: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]  # [BLOCK_M, 1]
    o_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # [1, BLOCK_N]
    mask = (o_m < n_rows) & (o_n < N)
    b_g = tl.load(p_gate + o_m * stride_gate + o_n, mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
    b_u = tl.load(p_up + o_m * stride_up + o_n, mask=mask, other=0.0).to(ACC)
    if IS_GELU:
        b_s = 1.0 / (1.0 + tl.exp2((b_g + 0.044715 * b_g * b_g * b_g) * (-2.0 * 0.7978845608028654 * LOG2E)))
    else:
        b_s = 1.0 / (1.0 + tl.exp2(b_g * -LOG2E))
    if IS_BACKWARD:
        b_dh = tl.load(p_dh + o_m * stride_dh + o_n, mask=mask, other=0.0).to(ACC)
        if IS_GELU:
            b_slope = b_s + b_g * b_s * (1.0 - b_s) * (2.0 * 0.7978845608028654) * (1.0 + 3.0 * 0.044715 * b_g * b_g)
        else:
            b_slope = b_s * (1.0 + b_g * (1.0 - b_s))
        tl.store(p_dgate + o_m * stride_d + o_n, (b_dh * b_u * b_slope).to(p_dgate.dtype.element_ty), mask=mask)
        tl.store(p_dup + o_m * stride_d + o_n, (b_dh * b_g * b_s).to(p_dup.dtype.element_ty), mask=mask)
    else:
        tl.store(p_h + o_m * N + o_n, (b_g * b_s * b_u).to(p_h.dtype.element_ty), mask=mask)


def _halves(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return as_rows(gate_up), as_rows(up)
    rows = as_rows(gate_up)
    n = rows.shape[1] // 2
    return rows[:, :n], rows[:, n:]


def _empty_output(gate_up: Tensor, up: Tensor | None) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // (2 if up is None else 1)))


def _empty_gradients(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return contiguous_like(gate_up), gate_up.new_empty(0) if up is None else contiguous_like(up)


def _launch(
    gate: Tensor, up: Tensor, dh: Tensor | None, h: Tensor | None, dgate: Tensor | None, dup: Tensor | None, activation: str
) -> None:
    n_rows, width = gate.shape
    options = launch_options("glu", gate, width=width, is_backward=dh is not None)
    with torch.cuda.device_of(gate):
        _glu[cdiv(n_rows, options["BLOCK_M"]), cdiv(width, options["BLOCK_N"])](
            gate, up, dh, h, dgate, dup, n_rows, width,
            gate.stride(0), up.stride(0), 0 if dh is None else dh.stride(0), 0 if dgate is None else dgate.stride(0),
            IS_GELU=activation == "gelu", IS_BACKWARD=dh is not None,
            ACC=accumulator(gate, up), **options,
        )  # fmt: skip


@torch.library.custom_op("tritale::glu", mutates_args=())
def _glu_op(gate_up: Tensor, up: Tensor | None, activation: str) -> Tensor:
    h = _empty_output(gate_up, up)
    if h.numel():
        _launch(*_halves(gate_up, up), None, h, None, None, activation)
    return h


@torch.library.custom_op("tritale::glu_backward", mutates_args=())
def _glu_backward_op(dh: Tensor, gate_up: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(d gate_up, d up); the second is empty if gate and up are packed."""
    d, d_up = _empty_gradients(gate_up, up)
    if dh.numel():
        _launch(*_halves(gate_up, up), as_rows(dh), None, *_halves(d, None if up is None else d_up), activation)
    return d, d_up


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dh):
    gate_up, up = ctx.saved_tensors
    d, d_up = _glu_backward_op(dh, gate_up, up, ctx.activation)
    return d, None if up is None else d_up, None


_glu_op.register_fake(lambda gate_up, up, activation: _empty_output(gate_up, up))
_glu_backward_op.register_fake(lambda dh, gate_up, up, activation: _empty_gradients(gate_up, up))
_glu_op.register_autograd(_backward, setup_context=_save)
_glu_backward_op.register_autograd(no_second_derivative("swiglu or geglu"))


def _apply(gate_up: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if up is None and gate_up.shape[-1] % 2:
        raise ValueError(f"a packed [gate | up] needs an even last dimension; got {tuple(gate_up.shape)}")
    if up is not None and up.shape != gate_up.shape:
        raise ValueError(f"gate {tuple(gate_up.shape)} and up {tuple(up.shape)} must have one shape")
    if uses_triton(gate_up):
        refuse_transforms("swiglu" if activation == "silu" else "geglu", gate_up, up)
        return _glu_op(gate_up, up, activation)
    if cpu.can_run(gate_up, up):
        return cpu.glu(gate_up, up, activation)
    return (reference.swiglu if activation == "silu" else reference.geglu)(gate_up, up)


def swiglu(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up, of a packed (…, 2 N) [gate | up] or of two tensors (…, N): (…, N) in the gate's dtype (arXiv 2002.05202).

    Raises ValueError if the shapes do not match."""
    return _apply(gate_up, up, "silu")


def geglu(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """gelu(gate) · up with the tanh form of gelu, packed or separate as `swiglu`."""
    return _apply(gate_up, up, "gelu")
