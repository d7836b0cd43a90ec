"""Rotary embedding of q and k in one launch.

    (a, b) → (a cos − b sin, b cos + a sin)      backward: the same with −sin, by the same kernel (CONJUGATE)

a and b are entries i and i + R/2 of a head (half-split) or 2i and 2i + 1 (interleaved), R = 2 · cos.shape[-1] ≤ D; the rest of the head is
copied, or in place left alone. Bytes: q and k read once and written once, 2 (H + H_kv) D s per token; 6 FLOPs per pair: bound by memory.
cos and sin, (T, R/2), are read once for HEADS heads and stay in cache. A program takes BLOCK_T tokens of a sequence and HEADS heads of q or
of k, so that positions, cos and sin serve several heads. R is a constexpr, or the mask of a half of 24 would hide the alignment and loads
would become 16-bit.
"""

import math

import torch
from torch import Tensor

from . import cpu, reference
from .common import accumulator, all_like, refuse_transforms, unit_stride
from .dispatch import uses_triton
from .launch import cdiv, launch_options, power_of_two
from .rotary import position_stride, token_positions
from .triton_compat import jit, tl


@jit
def _rope_heads(
    p_x, p_y, b_cos, b_sin, first, o_t, m_t, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    HALF: tl.constexpr, REST: tl.constexpr, IS_INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads first … first + HEADS of the tokens o_t."""
    o_b = tl.program_id(0).to(tl.int64)
    o_x, o_y = o_t * stride_xt, o_t * stride_yt  # [BLOCK_T, 1]
    p_x += o_b * stride_xb + first.to(tl.int64) * stride_xh
    p_y += o_b * stride_yb + first.to(tl.int64) * stride_yh
    o_d, o_2d, o_c = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, 2 * BLOCK_HALF)[None, :], 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    for _ in tl.static_range(HEADS):  # pyright: ignore[reportGeneralTypeIssues]
        if IS_INTERLEAVED:
            m_2d = m_t & (o_2d < 2 * HALF)
            b_x = tl.load(p_x + (o_x + o_2d), mask=m_2d, other=0.0).to(ACC)  # [BLOCK_T, 2 BLOCK_HALF]
            b_a, b_b = tl.split(tl.reshape(b_x, (BLOCK_T, BLOCK_HALF, 2)))
            b_y = tl.reshape(tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin), (BLOCK_T, 2 * BLOCK_HALF))
            tl.store(p_y + (o_y + o_2d), b_y.to(p_y.dtype.element_ty), mask=m_2d)
        else:
            m_d = m_t & (o_d < HALF)
            p_a, p_b = p_x + (o_x + o_d), p_y + (o_y + o_d)
            b_a = tl.load(p_a, mask=m_d, other=0.0).to(ACC)  # [BLOCK_T, BLOCK_HALF]
            b_b = tl.load(p_a + HALF, mask=m_d, other=0.0).to(ACC)
            tl.store(p_b, (b_a * b_cos - b_b * b_sin).to(p_y.dtype.element_ty), mask=m_d)
            tl.store(p_b + HALF, (b_b * b_cos + b_a * b_sin).to(p_y.dtype.element_ty), mask=m_d)
        if REST > 0:
            m_c = m_t & (o_c < 2 * HALF + REST)
            tl.store(p_y + (o_y + o_c), tl.load(p_x + (o_x + o_c), mask=m_c, other=0.0), mask=m_c)
        p_x += stride_xh
        p_y += stride_yh


@jit
def _rope(
    p_q, p_k,  # (B, T, H, D) and (B, T, H_KV, D)
    p_cos, p_sin,  # (T_max, HALF)
    p_positions,  # (B or 1, T) or None
    p_q_out, p_k_out, n_tokens,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_qob, stride_qot, stride_qoh, stride_kob, stride_kot, stride_koh, stride_p,
    H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, ACC: tl.constexpr,
    HEADS: tl.constexpr,  # divides the heads of q and of k
    BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    o_t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]  # [BLOCK_T, 1]
    m_t = o_t < n_tokens
    o_position = o_t
    if p_positions is not None:
        o_position = tl.load(p_positions + tl.program_id(0).to(tl.int64) * stride_p + o_t, mask=m_t, other=0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_HALF)[None, :]
    m_cs = m_t & (o_d < HALF)
    b_cos = tl.load(p_cos + o_position * HALF + o_d, mask=m_cs, other=0.0).to(ACC)  # [BLOCK_T, BLOCK_HALF]
    b_sin = tl.load(p_sin + o_position * HALF + o_d, mask=m_cs, other=0.0).to(ACC)
    if CONJUGATE:
        b_sin = -b_sin
    first = tl.program_id(2) * HEADS
    if first < H:  # two calls, not one with chosen pointers: those would lose what is known of their alignment
        _rope_heads(
            p_q, p_q_out, b_cos, b_sin, first, o_t, m_t, stride_qb, stride_qt, stride_qh, stride_qob, stride_qot, stride_qoh,
            HALF, REST, IS_INTERLEAVED, ACC, HEADS, BLOCK_T, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _rope_heads(
            p_k, p_k_out, b_cos, b_sin, first - H, o_t, m_t, stride_kb, stride_kt, stride_kh, stride_kob, stride_kot, stride_koh,
            HALF, REST, IS_INTERLEAVED, ACC, HEADS, BLOCK_T, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def _launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, conjugate: bool, is_inplace: bool = False,
) -> None:  # fmt: skip
    n_batch, n_tokens, n_head, head_dim = q.shape
    half, n_kv_head = cos.shape[-1], k.shape[2]
    rest = 0 if is_inplace else head_dim - 2 * half
    if q.numel() + k.numel() == 0:
        return
    options = launch_options("rope", q, half=half)
    n_heads = math.gcd(n_head, n_kv_head)
    n_heads = max(n for n in range(1, options.pop("MOST_HEADS") + 1) if n_heads % n == 0)
    grid = (n_batch, cdiv(n_tokens, options["BLOCK_T"]), (n_head + n_kv_head) // n_heads)
    cos, sin = cos.contiguous(), sin.contiguous()
    with torch.cuda.device_of(q):
        _rope[grid](
            q, k, cos, sin, positions, q_out, k_out, n_tokens,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], position_stride(positions),
            H=n_head, HALF=half, REST=rest, IS_INTERLEAVED=interleaved, CONJUGATE=conjugate,
            ACC=accumulator(q, k, cos), HEADS=n_heads, BLOCK_HALF=power_of_two(half), BLOCK_REST=power_of_two(rest), **options,
        )  # fmt: skip


@torch.library.custom_op("tritale::rope", mutates_args=())
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = all_like(q, k)
    _launch(unit_stride(q), unit_stride(k), q_out, k_out, cos, sin, positions, interleaved, conjugate)
    return q_out, k_out


@torch.library.custom_op("tritale::rope_", mutates_args=("q", "k"))
def _rope_inplace_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> None:
    _launch(q, k, q, k, cos, sin, positions, interleaved, False, is_inplace=True)


def _save(ctx, inputs, output):
    _, _, *tensors, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk):
    return *_rope_op(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate), None, None, None, None, None


_rope_op.register_fake(lambda q, k, *_: all_like(q, k))
_rope_op.register_autograd(_backward, setup_context=_save)


def _check_inplace(*tensors: Tensor) -> None:
    for x in tensors:
        extent = 1  # of the inner dimensions in memory; a dimension that steps less far overlaps itself
        for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
            if size > 1 and stride < extent and x.numel():
                raise ValueError(
                    f"inplace=True, but entries of a tensor {tuple(x.shape)} of strides {x.stride()} share memory (is it expanded?); "
                    "give a copy, x.clone(), or inplace=False"
                )
            extent += stride * (size - 1)


def rope(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H_kv, D)
    cos: Tensor,  # (T_max, rotary_dim / 2)
    sin: Tensor,  # (T_max, rotary_dim / 2)
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,  # (T,), (1, T) or (B, T) int
    cu_seqlens: Tensor | None = None,  # (documents + 1,) int32
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (arXiv 2104.09864) of the first rotary_dim entries of each head, in half-split or interleaved pairs.

    Positions count from 0, restart at each document with `cu_seqlens` (B = 1), or are given. `inplace=True` overwrites q and k and
    returns them, if they need no gradient; otherwise it has no effect. cos and sin get no gradient.
    Raises ValueError if the shapes do not match, positions are given twice, cos is too short for them (the values of `positions` and
    `cu_seqlens` are checked on the CPU only; on a GPU reading past cos is undefined), or a tensor to overwrite overlaps itself."""
    is_fitting = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1]
    if not is_fitting or cos.dim() != 2 or 2 * cos.shape[-1] > q.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: (B, T, H, D), (B, T, H_kv, D) and "
            "twice (T_max, at most D / 2) expected"
        )
    positions = token_positions(q.shape[0], q.shape[1], cos, positions, cu_seqlens)
    inplace = inplace and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    if inplace and not torch.compiler.is_compiling():  # there strides may be symbols, and results are copied back, which checks them
        _check_inplace(q, k)
    if not uses_triton(q):
        if not interleaved and cpu.can_run(q, k, small=(cos, sin), positions=positions):
            if not inplace:
                return cpu.rope(q, k, cos, sin, positions)
            if q.stride(-1) == k.stride(-1) == 1 and q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():  # no overlap
                cpu.rope_(q, k, cos, sin, positions)
                return q, k
        return reference.rope(q, k, cos.detach(), sin.detach(), interleaved=interleaved, positions=positions, inplace=inplace)
    refuse_transforms("rope", q, k)
    if inplace and q.stride(-1) == k.stride(-1) == 1:
        _rope_inplace_op(q, k, cos, sin, positions, interleaved)
        return q, k
    q_out, k_out = _rope_op(q, k, cos, sin, positions, interleaved, False)
    return (q.copy_(q_out), k.copy_(k_out)) if inplace else (q_out, k_out)
