# A constexpr decides which branches of a kernel exist.
# pyright: reportPossiblyUnboundVariable=false
"""RMSNorm, alone or with the residual addition before it, forward and backward.

    forward    r = residual + x  (or x alone),   y = r · ρ · (offset + w),   ρ = 1 / sqrt(mean(r²) + eps)
    backward   g = dy · (offset + w),   dr = ρ · (g − r · ρ² · mean(g · r)) + d residual_out,   dw = Σ_rows dy · r · ρ

Bytes for M rows of N elements of s bytes: forward 2 M N s (4 M N s with the residual), backward 3 M N s (4 M N s). About 4 and 10 FLOPs an
element: bound by memory. Rows stay in registers between the two uses, ρ is not stored but computed again (a sum over what is loaded
anyway). Several narrow rows share a program. dw has no atomics: a persistent grid keeps one partial sum per program in registers, fp32,
written once, (programs, N), and summed at the end; so it is the same in every run.

Rows wider than the registers can hold (BLOCK_N < N) take two kernels: sums over each row, then the same kernel with a grid over columns.
"""

import torch
from torch import Tensor

from . import cpu, reference
from .common import accumulator, all_like, as_rows, contiguous_like, no_second_derivative, refuse_transforms, wide_dtype
from .dispatch import uses_triton
from .launch import cdiv, launch_options, sm_count
from .triton_compat import jit, tl


@jit
def _rms_norm_fwd(
    p_x, p_residual,  # (M, N)
    p_w,  # (N,)
    p_y, p_sum,  # (M, N) normed, and residual + x
    p_sums,  # (M, 2) from _rms_norm_sums, if a row is wider than a block
    n_rows, stride_x, stride_residual,
    N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_m, m_n = o_m < n_rows, o_n < N
    mask = m_m[:, None] & m_n[None, :]
    b_x = tl.load(p_x + o_m[:, None] * stride_x + o_n[None, :], mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
    if HAS_RESIDUAL:
        b_x += tl.load(p_residual + o_m[:, None] * stride_residual + o_n[None, :], mask=mask, other=0.0).to(ACC)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_m[:, None] * N + o_n[None, :], b_sum, mask=mask)
        b_x = b_sum.to(ACC)  # normalise the rounded sum, which is also what the next layer gets
    if BLOCK_N >= N:
        b_square = tl.sum(b_x * b_x, axis=1)  # [BLOCK_M]
    else:
        b_square = tl.load(p_sums + 2 * o_m, mask=m_m, other=1.0)
    b_y = b_x * tl.rsqrt(b_square / N + EPS)[:, None]
    if HAS_WEIGHT:
        b_w = tl.load(p_w + o_n, mask=m_n, other=0.0).to(ACC) + OFFSET
        b_y *= b_w[None, :]
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=mask)


@jit
def _rms_norm_bwd(
    p_dy, p_dsum,  # (M, N) gradients of the normed tensor and of the residual
    p_x,  # (M, N) what was normed
    p_w,  # (N,)
    p_dx,  # (M, N)
    p_dw,  # (programs, N) partial sums
    p_sums,  # (M, 2)
    n_rows, stride_dy, stride_dsum, stride_x,
    N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEEDS_DW: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < N
    if HAS_WEIGHT:
        b_w = tl.load(p_w + o_n, mask=m_n, other=0.0).to(ACC) + OFFSET
    if NEEDS_DW:
        b_dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(tl.program_id(0) * BLOCK_M, n_rows, tl.num_programs(0) * BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        m_m = o_m < n_rows
        mask = m_m[:, None] & m_n[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_x + o_n[None, :], mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
        b_dy = tl.load(p_dy + o_m[:, None] * stride_dy + o_n[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_WEIGHT:
            b_g = b_dy * b_w[None, :]
        else:
            b_g = b_dy
        if BLOCK_N >= N:
            b_square, b_dot = tl.sum(b_x * b_x, axis=1), tl.sum(b_g * b_x, axis=1)  # [BLOCK_M]
        else:
            b_square = tl.load(p_sums + 2 * o_m, mask=m_m, other=1.0)
            b_dot = tl.load(p_sums + 2 * o_m + 1, mask=m_m, other=0.0)
        b_rstd = tl.rsqrt(b_square / N + EPS)
        b_unit = b_x * b_rstd[:, None]
        b_dx = b_rstd[:, None] * (b_g - b_unit * (b_dot * b_rstd / N)[:, None])
        if HAS_DSUM:
            b_dx += tl.load(p_dsum + o_m[:, None] * stride_dsum + o_n[None, :], mask=mask, other=0.0).to(ACC)
        if NEEDS_DW:
            b_dw += b_dy * b_unit
        tl.store(p_dx + o_m[:, None] * N + o_n[None, :], b_dx.to(p_dx.dtype.element_ty), mask=mask)
    if NEEDS_DW:
        tl.store(p_dw + tl.program_id(0).to(tl.int64) * N + o_n, tl.sum(b_dw, axis=0), mask=m_n)


@jit
def _rms_norm_sums(
    p_x, p_residual, p_dy,  # (M, N)
    p_w,  # (N,)
    p_sums,  # (M, 2): Σ r², Σ dy (offset + w) r
    stride_x, stride_residual, stride_dy,
    N: tl.constexpr, OFFSET: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DY: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SUM: tl.constexpr,  # dtype that residual + x is rounded to
    ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b_square, b_dot = tl.zeros((BLOCK_N,), dtype=ACC), tl.zeros((BLOCK_N,), dtype=ACC)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_x = tl.load(p_x + row * stride_x + o_n, mask=m_n, other=0.0).to(ACC)
        if HAS_RESIDUAL:
            b_x += tl.load(p_residual + row * stride_residual + o_n, mask=m_n, other=0.0).to(ACC)
            b_x = b_x.to(SUM).to(ACC)
        b_square += b_x * b_x
        if HAS_DY:
            b_g = tl.load(p_dy + row * stride_dy + o_n, mask=m_n, other=0.0).to(ACC)
            if HAS_WEIGHT:
                b_g *= tl.load(p_w + o_n, mask=m_n, other=0.0).to(ACC) + OFFSET
            b_dot += b_g * b_x
    tl.store(p_sums + 2 * row, tl.sum(b_square, axis=0))
    if HAS_DY:
        tl.store(p_sums + 2 * row + 1, tl.sum(b_dot, axis=0))


_TRITON_DTYPE = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor | None]:
    y = contiguous_like(x)
    total = None if residual is None else contiguous_like(residual)
    if x.numel() == 0:
        return y, total
    normed = x if residual is None else residual
    weight = None if weight is None else weight.contiguous()
    rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    n_rows, width = rows.shape
    options = launch_options("rms_norm_fwd", x, width=width, itemsize=x.element_size())
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    flags = {"N": width, "OFFSET": offset, "HAS_WEIGHT": weight is not None, "HAS_RESIDUAL": residual is not None}
    flags["ACC"] = accumulator(x, residual, weight)
    stride_residual = 0 if residual_rows is None else residual_rows.stride(0)
    with torch.cuda.device_of(x):
        sums = None
        if block_n < width:
            sums = x.new_empty((n_rows, 2), dtype=wide_dtype(normed))
            _rms_norm_sums[(n_rows,)](
                rows, residual_rows, None, weight, sums, rows.stride(0), stride_residual, 0,
                HAS_DY=False, SUM=getattr(tl, _TRITON_DTYPE[normed.dtype]), **flags, **launch_options("rms_norm_sums", x),
            )  # fmt: skip
        _rms_norm_fwd[cdiv(n_rows, block_m), cdiv(width, block_n)](
            rows, residual_rows, weight, y, total, sums, n_rows, rows.stride(0), stride_residual, EPS=eps, **flags, **options
        )  # fmt: skip
    return y, total


@torch.library.custom_op("tritale::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return _forward(x, None, weight, eps, offset)[0]


@torch.library.custom_op("tritale::add_rms_norm", mutates_args=())
def _add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, total = _forward(x, residual, weight, eps, offset)
    assert total is not None
    return y, total


@torch.library.custom_op("tritale::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float, needs_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = contiguous_like(x)
    wide = wide_dtype(x, dy)
    if x.numel() == 0:
        return dx, x.new_zeros(0, dtype=wide) if weight is None or not needs_dw else torch.zeros_like(weight)
    rows, dy_rows, dsum_rows = as_rows(x), as_rows(dy), None if dsum is None else as_rows(dsum)
    weight = None if weight is None else weight.contiguous()
    n_rows, width = rows.shape
    options = launch_options("rms_norm_bwd", x, width=width, itemsize=x.element_size())
    n_programs = min(sm_count(x) * options.pop("PER_SM"), cdiv(n_rows, options["BLOCK_M"]))
    dw = x.new_empty((n_programs, width) if needs_dw else 0, dtype=wide)
    flags = {"N": width, "OFFSET": offset, "HAS_WEIGHT": weight is not None, "ACC": accumulator(x, dy, weight)}
    with torch.cuda.device_of(x):
        sums = None
        if options["BLOCK_N"] < width:
            sums = x.new_empty((n_rows, 2), dtype=wide)
            _rms_norm_sums[(n_rows,)](
                rows, None, dy_rows, weight, sums, rows.stride(0), 0, dy_rows.stride(0),
                HAS_RESIDUAL=False, HAS_DY=True, SUM=tl.float32, **flags, **launch_options("rms_norm_sums", x),
            )  # fmt: skip
        _rms_norm_bwd[n_programs, cdiv(width, options["BLOCK_N"])](
            dy_rows, dsum_rows, rows, weight, dx, dw, sums, n_rows,
            dy_rows.stride(0), 0 if dsum_rows is None else dsum_rows.stride(0), rows.stride(0),
            EPS=eps, HAS_DSUM=dsum is not None, NEEDS_DW=needs_dw, **flags, **options,
        )  # fmt: skip
    return dx, dw if weight is None or not needs_dw else dw.sum(0).to(weight.dtype)


@_rms_norm_backward_op.register_fake
def _(dy, dsum, x, weight, eps, offset, needs_dw):
    return contiguous_like(x), x.new_empty(x.shape[-1] if needs_dw else 0, dtype=weight.dtype if needs_dw else wide_dtype(x, dy))


_rms_norm_backward_op.register_autograd(no_second_derivative("rms_norm"))


def _save(ctx, inputs, output):
    *_, weight, ctx.eps, ctx.offset = inputs
    normed = inputs[0] if isinstance(output, Tensor) else output[1]
    ctx.save_for_backward(normed, weight)
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dsum: Tensor | None, needs_dw: bool) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    if dy is None:  # nothing came through the norm
        return dsum, None
    dx, dw = _rms_norm_backward_op(dy, dsum, x, weight, ctx.eps, ctx.offset, needs_dw)
    return dx, dw if needs_dw else None


def _rms_norm_autograd(ctx, dy):
    return *_gradients(ctx, dy, None, ctx.needs_input_grad[1]), None, None


def _add_rms_norm_autograd(ctx, dy, dsum):
    d, dw = _gradients(ctx, dy, dsum, ctx.needs_input_grad[2])
    return None if d is None else d.to(ctx.dtype), d, dw, None, None


_rms_norm_op.register_fake(lambda x, *_: contiguous_like(x))
_add_rms_norm_op.register_fake(lambda x, residual, *_: all_like(x, residual))
_rms_norm_op.register_autograd(_rms_norm_autograd, setup_context=_save)
_add_rms_norm_op.register_autograd(_add_rms_norm_autograd, setup_context=_save)


def _check(x: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not match x {tuple(x.shape)}: ({x.shape[-1]},) expected, or None")


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · (offset + weight) over the last dimension, x: (…, N), weight: (N,) of any float dtype, or None.

    Sums are fp32 (fp64 for fp64), y has x's dtype; `offset=1` is Gemma's form. Source: arXiv 1910.07467.
    Raises ValueError if the weight's shape does not match."""
    _check(x, weight)
    if not uses_triton(x):
        if cpu.can_run(x, small=(weight,), numbers=(eps, offset)):
            return cpu.rms_norm(x, weight, eps, offset)
        return reference.rms_norm(x, weight, eps, offset=offset)
    refuse_transforms("rms_norm", x, weight)
    return _rms_norm_op(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(r), r) with r = residual + x, in one kernel: x and residual (…, N); r has the residual's dtype, the normed tensor x's.

    Raises ValueError if the shapes do not match."""
    _check(x, weight)
    if x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape")
    if not uses_triton(x):
        if cpu.can_run(x, residual, small=(weight,), numbers=(eps, offset)):
            return cpu.add_rms_norm(x, residual, weight, eps, offset)
        return reference.add_rms_norm(x, residual, weight, eps, offset=offset)
    refuse_transforms("add_rms_norm", x, residual, weight)
    return _add_rms_norm_op(x, residual, weight, eps, offset)
