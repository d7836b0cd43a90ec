"""Rotary embedding of q and k in one launch.

    (a, b) → (a cos − b sin, b cos + a sin)      backward: the same with −sin, by the same kernel (CONJUGATE)

a and b are entries i and i + R/2 of a head (half-split) or 2i and 2i + 1 (interleaved), R = 2 · cos.shape[-1] ≤ D; the rest of the head is
copied, or in place left alone. Bytes: q and k read once and written once, 2 (H + H_kv) D s a token; 6 FLOPs a pair: memory decides. cos
and sin, (T, R/2), are read once a head but stay in cache. A program takes BLOCK_R heads, of any tokens, so that no lane idles at 6 or 12
heads; R is a constexpr, or the mask of a half of 24 would hide the alignment and loads would become 16-bit.
"""

import torch
from torch import Tensor

from . import reference
from .dispatch import check_documents, forbid_double_backward, is_readable, uses_triton
from .launch import launch_options, power_of_two
from .triton_compat import jit, tl, triton


@jit
def _row_offsets(o_r, n_tokens, stride_b, stride_t, stride_h, H: tl.constexpr):
    """Where head o_r of B · T · H starts in a tensor of these strides."""
    o_h, o_t, o_b = o_r % H, (o_r // H) % n_tokens, o_r // H // n_tokens
    return o_b.to(tl.int64) * stride_b + o_t.to(tl.int64) * stride_t + o_h.to(tl.int64) * stride_h


@jit
def _cos_sin(p_cos, p_sin, p_positions, o_r, m_r, o_d, n_tokens, stride_p, H: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr):
    """cos and sin of each head's position: two of [BLOCK_R, BLOCK_HALF]."""
    o_t = (o_r // H) % n_tokens
    if p_positions is not None:
        o_t = tl.load(p_positions + (o_r // H // n_tokens) * stride_p + o_t, mask=m_r, other=0)
    o_cs = o_t.to(tl.int64)[:, None] * HALF + o_d[None, :]
    mask = m_r[:, None] & (o_d < HALF)[None, :]
    return tl.load(p_cos + o_cs, mask=mask, other=0.0).to(ACC), tl.load(p_sin + o_cs, mask=mask, other=0.0).to(ACC)


@jit
def _rope_rows(
    p_x,
    p_y,
    p_cos,
    p_sin,
    p_positions,
    block,
    n_rows,
    n_tokens,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_p,
    H: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    o_r = block * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    m_r = o_r < n_rows
    o_d = tl.arange(0, BLOCK_HALF)
    p_x += _row_offsets(o_r, n_tokens, stride_xb, stride_xt, stride_xh, H)[:, None]  # [BLOCK_R, 1]
    p_y += _row_offsets(o_r, n_tokens, stride_yb, stride_yt, stride_yh, H)[:, None]
    b_cos, b_sin = _cos_sin(p_cos, p_sin, p_positions, o_r, m_r, o_d, n_tokens, stride_p, H, HALF, ACC)  # [BLOCK_R, BLOCK_HALF]
    if CONJUGATE:
        b_sin = -b_sin
    if IS_INTERLEAVED:
        o_2d = tl.arange(0, 2 * BLOCK_HALF)
        m_2d = m_r[:, None] & (o_2d < 2 * HALF)[None, :]
        b_x = tl.load(p_x + o_2d[None, :], mask=m_2d, other=0.0).to(ACC)  # [BLOCK_R, 2 BLOCK_HALF]
        b_a, b_b = tl.split(tl.reshape(b_x, (BLOCK_R, BLOCK_HALF, 2)))
        b_y = tl.reshape(tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin), (BLOCK_R, 2 * BLOCK_HALF))
        tl.store(p_y + o_2d[None, :], b_y.to(p_y.dtype.element_ty), mask=m_2d)
    else:
        m_d = m_r[:, None] & (o_d < HALF)[None, :]
        b_a = tl.load(p_x + o_d[None, :], mask=m_d, other=0.0).to(ACC)  # [BLOCK_R, BLOCK_HALF]
        b_b = tl.load(p_x + HALF + o_d[None, :], mask=m_d, other=0.0).to(ACC)
        tl.store(p_y + o_d[None, :], (b_a * b_cos - b_b * b_sin).to(p_y.dtype.element_ty), mask=m_d)
        tl.store(p_y + HALF + o_d[None, :], (b_b * b_cos + b_a * b_sin).to(p_y.dtype.element_ty), mask=m_d)
    if REST > 0:
        o_c = tl.arange(0, BLOCK_REST)
        m_c = m_r[:, None] & (o_c < REST)[None, :]
        b_c = tl.load(p_x + 2 * HALF + o_c[None, :], mask=m_c, other=0.0)
        tl.store(p_y + 2 * HALF + o_c[None, :], b_c, mask=m_c)


@jit
def _rope(
    p_q,  # (B, T, H, D)
    p_k,  # (B, T, H_KV, D)
    p_cos,  # (T_max, HALF)
    p_sin,  # (T_max, HALF)
    p_positions,  # (B or 1, T) or None
    p_q_out,
    p_k_out,
    n_batch,
    n_tokens,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_qob,
    stride_qot,
    stride_qoh,
    stride_kob,
    stride_kot,
    stride_koh,
    stride_p,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    n_q = n_batch * n_tokens * H
    n_q_blocks = tl.cdiv(n_q, BLOCK_R)
    block = tl.program_id(0)
    if block < n_q_blocks:  # two calls, not one with chosen pointers: those would lose what is known of their alignment
        _rope_rows(
            p_q, p_q_out, p_cos, p_sin, p_positions, block, n_q, n_tokens,
            stride_qb, stride_qt, stride_qh, stride_qob, stride_qot, stride_qoh, stride_p,
            H, HALF, REST, IS_INTERLEAVED, CONJUGATE, ACC, BLOCK_R, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _rope_rows(
            p_k, p_k_out, p_cos, p_sin, p_positions, block - n_q_blocks, n_batch * n_tokens * H_KV, n_tokens,
            stride_kb, stride_kt, stride_kh, stride_kob, stride_kot, stride_koh, stride_p,
            H_KV, HALF, REST, IS_INTERLEAVED, CONJUGATE, ACC, BLOCK_R, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _position_stride(positions: Tensor | None) -> int:
    """From one text's positions to the next's: 0 where all share them, (T,) or (1, T)."""
    return 0 if positions is None or positions.dim() == 1 or positions.shape[0] == 1 else positions.stride(0)


def _launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    conjugate: bool,
    is_inplace: bool = False,
) -> None:
    n_batch, n_tokens, n_head, head_dim = q.shape
    half, n_kv_head = cos.shape[-1], k.shape[2]
    rest = 0 if is_inplace else head_dim - 2 * half
    options = launch_options("rope", q, half=half)
    blocks = sum(triton.cdiv(n_batch * n_tokens * n, options["BLOCK_R"]) for n in (n_head, n_kv_head))
    if blocks == 0:
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    wide = any(t.dtype == torch.float64 for t in (q, k, cos))
    with torch.cuda.device_of(q):
        _rope[blocks,](
            q, k, cos, sin, positions, q_out, k_out, n_batch, n_tokens,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], _position_stride(positions),
            H=n_head, H_KV=n_kv_head, HALF=half, REST=rest, IS_INTERLEAVED=interleaved, CONJUGATE=conjugate,
            ACC=tl.float64 if wide else tl.float32, BLOCK_HALF=power_of_two(half), BLOCK_REST=power_of_two(rest), **options,
        )  # fmt: skip


@torch.library.custom_op("tritale::rope", mutates_args=())
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    _launch(_adjacent(q), _adjacent(k), q_out, k_out, cos, sin, positions, interleaved, conjugate)
    return q_out, k_out


@_rope_op.register_fake
def _(q, k, cos, sin, positions, interleaved, conjugate):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))


@torch.library.custom_op("tritale::rope_backward", mutates_args=())
def _rope_backward_op(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    dq_in, dk_in = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dq, dk))
    _launch(_adjacent(dq), _adjacent(dk), dq_in, dk_in, cos, sin, positions, interleaved, not conjugate)
    return dq_in, dk_in


@_rope_backward_op.register_fake
def _(dq, dk, cos, sin, positions, interleaved, conjugate):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dq, dk))


@torch.library.custom_op("tritale::rope_", mutates_args=("q", "k"))
def _rope_inplace_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> None:
    _launch(q, k, q, k, cos, sin, positions, interleaved, False, is_inplace=True)


def _save(ctx, inputs, output):
    _, _, *tensors, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk):
    return *_rope_backward_op(dq, dk, *ctx.saved_tensors, ctx.interleaved, ctx.conjugate), None, None, None, None, None


_rope_op.register_autograd(_backward, setup_context=_save)
forbid_double_backward(_rope_backward_op, "rope")


def token_positions(n_batch: int, n_tokens: int, cos: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """The positions to look up in cos, None for 0 … T − 1; raises ValueError where they cannot fit. Their values are looked at on the CPU
    alone: on a GPU that would wait for it."""
    if positions is not None and cu_seqlens is not None:
        raise ValueError("positions and cu_seqlens were both given; positions restart by themselves with cu_seqlens, so give one of them")
    if cu_seqlens is not None:
        check_documents(cu_seqlens, n_batch, n_tokens)
        positions = reference.document_positions(cu_seqlens, n_tokens)
    if positions is None:
        if n_tokens > cos.shape[0]:
            raise ValueError(f"{n_tokens} tokens, but cos and sin hold {cos.shape[0]} positions; make them longer")
        return None
    if positions.shape not in ((n_tokens,), (1, n_tokens), (n_batch, n_tokens)):
        raise ValueError(f"positions {tuple(positions.shape)}: ({n_tokens},), (1, {n_tokens}) or ({n_batch}, {n_tokens}) expected")
    if is_readable(positions) and positions.numel():
        low, high = (int(n) for n in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions from {low} to {high}, but cos and sin hold {cos.shape[0]} positions from 0; make them longer")
    return positions.contiguous()


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

    Positions count from 0, restart at each document with `cu_seqlens` (B = 1), or are given. `inplace=True` writes over q and k where no
    gradient is asked of them, and returns them; elsewhere it changes nothing. cos and sin get no gradient.
    Raises ValueError where the shapes do not fit, positions are given twice or cos is too short for them (on a GPU the values of
    `positions` and `cu_seqlens` are not looked at, and reading past cos is undefined), or what is written in place overlaps itself."""
    is_fitting = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1]
    if not is_fitting or cos.dim() != 2 or 2 * cos.shape[-1] > q.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: (B, T, H, D), (B, T, H_kv, D) and "
            "twice (T_max, at most D / 2) expected"
        )
    positions = token_positions(*q.shape[:2], cos, positions, cu_seqlens)
    inplace = inplace and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    if inplace and not torch.compiler.is_compiling():  # its strides may be symbols, and it copies results back, which checks them
        _check_inplace(q, k)
    if not uses_triton(q):
        return reference.rope(q, k, cos.detach(), sin.detach(), interleaved=interleaved, positions=positions, inplace=inplace)
    if inplace and q.stride(-1) == k.stride(-1) == 1:
        _rope_inplace_op(q, k, cos, sin, positions, interleaved)
        return q, k
    q_out, k_out = _rope_op(q, k, cos, sin, positions, interleaved, False)
    return (q.copy_(q_out), k.copy_(k_out)) if inplace else (q_out, k_out)
