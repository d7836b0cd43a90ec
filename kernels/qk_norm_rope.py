"""RMSNorm of each q and k head and rotary embedding, in one kernel that reads the packed projection (…, (H + 2 H_kv) D).

    forward    u = x ρ w,  ρ = 1 / sqrt(mean(x²) + eps) over a head,   (a, b) of u → (a cos − b sin, b cos + a sin)
    backward   g = the incoming gradient rotated back,   dx = ρ (g w − x ρ² mean(g w x)),   dw = Σ g x ρ

Bytes: the packed tensor read once and written once as q, k, v: 2 (H + 2 H_kv) D s per token (the parts alone: 4 (H + H_kv) D s and a
strided v). Backward 3 times (gradients of q, k, v and the packed input read, its gradient written; dv is copied in by the same kernel, so
autograd has nothing to concatenate). ρ is computed again, nothing is stored for backward but the input. dw of q and k: one partial sum per
program.
"""

import torch
from torch import Tensor

from . import cpu, reference
from .common import accumulator, all_like, contiguous_like, no_second_derivative, refuse_transforms, unit_stride, wide_dtype
from .dispatch import uses_triton
from .launch import cdiv, launch_options, power_of_two, sm_count
from .rotary import load_cos_sin, position_stride, row_offsets, token_positions
from .triton_compat import jit, tl


@jit
def _copy_rows(
    p_x, p_y, block, n_rows, n_tokens, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    H: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r, o_d = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask = (o_r < n_rows)[:, None] & (o_d < D)[None, :]
    o_x = row_offsets(o_r, n_tokens, stride_xb, stride_xt, stride_xh, H)[:, None] + o_d[None, :]
    o_y = row_offsets(o_r, n_tokens, stride_yb, stride_yt, stride_yh, H)[:, None] + o_d[None, :]
    tl.store(p_y + o_y, tl.load(p_x + o_x, mask=mask, other=0.0), mask=mask)


@jit
def _norm_rope_rows(
    p_x, p_y, p_w, p_cos, p_sin, p_positions, block, n_rows, n_tokens,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_p,
    H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    o_r, o_d = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_HALF)
    m_r, m_half = o_r < n_rows, o_d < HALF
    m_d = m_r[:, None] & m_half[None, :]
    p_x += row_offsets(o_r, n_tokens, stride_xb, stride_xt, stride_xh, H)[:, None]  # [BLOCK_R, 1]
    p_y += row_offsets(o_r, n_tokens, stride_yb, stride_yt, stride_yh, H)[:, None]
    b_a = tl.load(p_x + o_d[None, :], mask=m_d, other=0.0).to(ACC)  # [BLOCK_R, BLOCK_HALF]
    b_b = tl.load(p_x + HALF + o_d[None, :], mask=m_d, other=0.0).to(ACC)
    b_square = tl.sum(b_a * b_a + b_b * b_b, axis=1)  # [BLOCK_R]
    if REST > 0:
        o_c = tl.arange(0, BLOCK_REST)
        m_c = m_r[:, None] & (o_c < REST)[None, :]
        b_c = tl.load(p_x + 2 * HALF + o_c[None, :], mask=m_c, other=0.0).to(ACC)
        b_square += tl.sum(b_c * b_c, axis=1)
    b_rstd = tl.rsqrt(b_square / D + EPS)[:, None]
    b_a *= b_rstd * tl.load(p_w + o_d, mask=m_half, other=0.0).to(ACC)[None, :]
    b_b *= b_rstd * tl.load(p_w + HALF + o_d, mask=m_half, other=0.0).to(ACC)[None, :]
    b_cos, b_sin = load_cos_sin(p_cos, p_sin, p_positions, o_r, m_r, o_d, n_tokens, stride_p, H, HALF, ACC)
    tl.store(p_y + o_d[None, :], (b_a * b_cos - b_b * b_sin).to(p_y.dtype.element_ty), mask=m_d)
    tl.store(p_y + HALF + o_d[None, :], (b_b * b_cos + b_a * b_sin).to(p_y.dtype.element_ty), mask=m_d)
    if REST > 0:
        b_c *= b_rstd * tl.load(p_w + 2 * HALF + o_c, mask=o_c < REST, other=0.0).to(ACC)[None, :]
        tl.store(p_y + 2 * HALF + o_c[None, :], b_c.to(p_y.dtype.element_ty), mask=m_c)


@jit
def _qk_norm_rope_fwd(
    p_qkv,  # (B, T, (H + 2 H_KV) D)
    p_wq, p_wk,  # (D,)
    p_cos, p_sin,  # (T_max, HALF)
    p_positions,  # (B or 1, T) or None
    p_q,  # (B, T, H, D)
    p_k, p_v,  # (B, T, H_KV, D)
    n_batch, n_tokens, stride_b, stride_t, stride_p,
    H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    n_q, n_kv = n_batch * n_tokens * H, n_batch * n_tokens * H_KV
    q_blocks, kv_blocks = tl.cdiv(n_q, BLOCK_R), tl.cdiv(n_kv, BLOCK_R)
    block = tl.program_id(0)
    n_long = tl.cast(n_tokens, tl.int64)  # times a token's entries it may pass 2³¹
    if block < q_blocks:
        _norm_rope_rows(
            p_qkv, p_q, p_wq, p_cos, p_sin, p_positions, block, n_q, n_tokens,
            stride_b, stride_t, D, n_long * (H * D), H * D, D, stride_p,
            H, HALF, REST, EPS, ACC, BLOCK_R, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        _norm_rope_rows(
            p_qkv + H * D, p_k, p_wk, p_cos, p_sin, p_positions, block - q_blocks, n_kv, n_tokens,
            stride_b, stride_t, D, n_long * (H_KV * D), H_KV * D, D, stride_p,
            H_KV, HALF, REST, EPS, ACC, BLOCK_R, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _copy_rows(
            p_qkv + (H + H_KV) * D, p_v, block - q_blocks - kv_blocks, n_kv, n_tokens,
            stride_b, stride_t, D, n_long * (H_KV * D), H_KV * D, D, H_KV, D, BLOCK_R, BLOCK_D,
        )  # fmt: skip


@jit
def _norm_rope_rows_bwd(
    p_dy, p_x, p_w, p_dx, p_dw, p_cos, p_sin, p_positions, n_rows, n_tokens,
    stride_yb, stride_yt, stride_yh, stride_xb, stride_xt, stride_db, stride_dt, stride_p,
    H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    o_d = tl.arange(0, BLOCK_HALF)
    m_half = o_d < HALF
    b_wa = tl.load(p_w + o_d, mask=m_half, other=0.0).to(ACC)[None, :]
    b_wb = tl.load(p_w + HALF + o_d, mask=m_half, other=0.0).to(ACC)[None, :]
    b_dwa, b_dwb = tl.zeros((BLOCK_R, BLOCK_HALF), dtype=ACC), tl.zeros((BLOCK_R, BLOCK_HALF), dtype=ACC)
    if REST > 0:
        o_c = tl.arange(0, BLOCK_REST)
        b_wc = tl.load(p_w + 2 * HALF + o_c, mask=o_c < REST, other=0.0).to(ACC)[None, :]
        b_dwc = tl.zeros((BLOCK_R, BLOCK_REST), dtype=ACC)
    for start in range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < n_rows
        m_d = m_r[:, None] & m_half[None, :]
        p_dy_r = p_dy + row_offsets(o_r, n_tokens, stride_yb, stride_yt, stride_yh, H)[:, None]  # [BLOCK_R, 1]
        p_x_r = p_x + row_offsets(o_r, n_tokens, stride_xb, stride_xt, D, H)[:, None]
        p_dx_r = p_dx + row_offsets(o_r, n_tokens, stride_db, stride_dt, D, H)[:, None]
        b_a = tl.load(p_x_r + o_d[None, :], mask=m_d, other=0.0).to(ACC)  # [BLOCK_R, BLOCK_HALF]
        b_b = tl.load(p_x_r + HALF + o_d[None, :], mask=m_d, other=0.0).to(ACC)
        b_da = tl.load(p_dy_r + o_d[None, :], mask=m_d, other=0.0).to(ACC)
        b_db = tl.load(p_dy_r + HALF + o_d[None, :], mask=m_d, other=0.0).to(ACC)
        b_cos, b_sin = load_cos_sin(p_cos, p_sin, p_positions, o_r, m_r, o_d, n_tokens, stride_p, H, HALF, ACC)
        b_ga, b_gb = b_da * b_cos + b_db * b_sin, b_db * b_cos - b_da * b_sin  # rotated back
        b_square = tl.sum(b_a * b_a + b_b * b_b, axis=1)  # [BLOCK_R]
        b_dot = tl.sum(b_ga * b_wa * b_a + b_gb * b_wb * b_b, axis=1)
        if REST > 0:
            m_c = m_r[:, None] & (o_c < REST)[None, :]
            b_c = tl.load(p_x_r + 2 * HALF + o_c[None, :], mask=m_c, other=0.0).to(ACC)
            b_gc = tl.load(p_dy_r + 2 * HALF + o_c[None, :], mask=m_c, other=0.0).to(ACC)
            b_square += tl.sum(b_c * b_c, axis=1)
            b_dot += tl.sum(b_gc * b_wc * b_c, axis=1)
        b_rstd = tl.rsqrt(b_square / D + EPS)
        b_back = (b_dot * b_rstd * b_rstd / D)[:, None]
        b_rstd = b_rstd[:, None]
        b_dwa += b_ga * b_a * b_rstd
        b_dwb += b_gb * b_b * b_rstd
        tl.store(p_dx_r + o_d[None, :], (b_rstd * (b_ga * b_wa - b_a * b_back)).to(p_dx.dtype.element_ty), mask=m_d)
        tl.store(p_dx_r + HALF + o_d[None, :], (b_rstd * (b_gb * b_wb - b_b * b_back)).to(p_dx.dtype.element_ty), mask=m_d)
        if REST > 0:
            b_dwc += b_gc * b_c * b_rstd
            tl.store(p_dx_r + 2 * HALF + o_c[None, :], (b_rstd * (b_gc * b_wc - b_c * b_back)).to(p_dx.dtype.element_ty), mask=m_c)
    tl.store(p_dw + o_d, tl.sum(b_dwa, axis=0), mask=m_half)
    tl.store(p_dw + HALF + o_d, tl.sum(b_dwb, axis=0), mask=m_half)
    if REST > 0:
        tl.store(p_dw + 2 * HALF + o_c, tl.sum(b_dwc, axis=0), mask=o_c < REST)


@jit
def _qk_norm_rope_bwd(
    p_dq,  # (B, T, H, D)
    p_dk, p_dv,  # (B, T, H_KV, D)
    p_qkv,  # (B, T, (H + 2 H_KV) D)
    p_wq, p_wk, p_cos, p_sin, p_positions,
    p_dqkv,  # (B, T, (H + 2 H_KV) D)
    p_dw,  # (2, programs, D)
    n_batch, n_tokens,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_b, stride_t, stride_p,
    H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    ROW: tl.constexpr = (H + 2 * H_KV) * D
    n_q, n_kv = n_batch * n_tokens * H, n_batch * n_tokens * H_KV
    kind = tl.program_id(1)
    stride_db = tl.cast(n_tokens, tl.int64) * ROW  # may exceed 2³¹
    p_dw += (kind * tl.num_programs(0) + tl.program_id(0)) * D
    if kind == 0:
        _norm_rope_rows_bwd(
            p_dq, p_qkv, p_wq, p_dqkv, p_dw, p_cos, p_sin, p_positions, n_q, n_tokens,
            stride_qb, stride_qt, stride_qh, stride_b, stride_t, stride_db, ROW, stride_p,
            H, HALF, REST, EPS, ACC, BLOCK_R, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif kind == 1:
        _norm_rope_rows_bwd(
            p_dk, p_qkv + H * D, p_wk, p_dqkv + H * D, p_dw, p_cos, p_sin, p_positions, n_kv, n_tokens,
            stride_kb, stride_kt, stride_kh, stride_b, stride_t, stride_db, ROW, stride_p,
            H_KV, HALF, REST, EPS, ACC, BLOCK_R, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        for block in range(tl.program_id(0), tl.cdiv(n_kv, BLOCK_R), tl.num_programs(0)):
            _copy_rows(
                p_dv, p_dqkv + (H + H_KV) * D, block, n_kv, n_tokens,
                stride_vb, stride_vt, stride_vh, stride_db, ROW, D, H_KV, D, BLOCK_R, BLOCK_D,
            )  # fmt: skip


def _flags(qkv: Tensor, cos: Tensor, head_dim: int, n_head: int, n_kv_head: int, eps: float) -> dict:
    half = cos.shape[-1]
    rest = head_dim - 2 * half
    return {
        "H": n_head, "H_KV": n_kv_head, "HALF": half, "REST": rest, "EPS": eps,
        "ACC": accumulator(qkv, cos),
        "BLOCK_HALF": power_of_two(half), "BLOCK_REST": power_of_two(rest), "BLOCK_D": power_of_two(head_dim),
    }  # fmt: skip


def _empty_heads(qkv: Tensor, head_dim: int, n_head: int, n_kv_head: int) -> tuple[Tensor, ...]:
    return tuple(qkv.new_empty((*qkv.shape[:2], n, head_dim)) for n in (n_head, n_kv_head, n_kv_head))


@torch.library.custom_op("tritale::qk_norm_rope", mutates_args=())
def _qk_norm_rope_op(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None, n_head: int, n_kv_head: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    qkv, head_dim = unit_stride(qkv), q_weight.shape[0]
    n_batch, n_tokens, _ = qkv.shape
    q, k, v = _empty_heads(qkv, head_dim, n_head, n_kv_head)
    options = launch_options("qk_norm_rope_fwd", qkv, half=cos.shape[-1])
    blocks = sum(cdiv(n_batch * n_tokens * n, options["BLOCK_R"]) for n in (n_head, n_kv_head, n_kv_head))
    if blocks:
        with torch.cuda.device_of(qkv):
            _qk_norm_rope_fwd[blocks,](
                qkv, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), positions, q, k, v,
                n_batch, n_tokens, *qkv.stride()[:2], position_stride(positions),
                **_flags(qkv, cos, head_dim, n_head, n_kv_head, eps), **options,
            )  # fmt: skip
    return q, k, v


@torch.library.custom_op("tritale::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward_op(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, qkv = (unit_stride(t) for t in (dq, dk, dv, qkv))
    n_batch, n_tokens, n_head, head_dim = dq.shape
    n_kv_head = dk.shape[2]
    dqkv = contiguous_like(qkv)
    if not dqkv.numel():
        return dqkv, torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    options = launch_options("qk_norm_rope_bwd", qkv, half=cos.shape[-1])
    n_programs = min(sm_count(qkv) * options.pop("PER_SM"), cdiv(n_batch * n_tokens * n_head, options["BLOCK_R"]))
    dw = qkv.new_empty((2, n_programs, head_dim), dtype=wide_dtype(qkv, cos))
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_bwd[n_programs, 3](
            dq, dk, dv, qkv, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), positions, dqkv, dw,
            n_batch, n_tokens, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *qkv.stride()[:2],
            position_stride(positions), **_flags(qkv, cos, head_dim, n_head, n_kv_head, eps), **options,
        )  # fmt: skip
    dwq, dwk = dw.sum(1)
    return dqkv, dwq.to(q_weight.dtype, copy=True), dwk.to(k_weight.dtype, copy=True)


def _save(ctx, inputs, output):
    *tensors, _, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk, dv):
    return *_qk_norm_rope_backward_op(dq, dk, dv, *ctx.saved_tensors, ctx.eps), *(None,) * 6


_qk_norm_rope_op.register_fake(lambda qkv, weight, k, cos, sin, positions, *heads: _empty_heads(qkv, weight.shape[0], *heads[:2]))
_qk_norm_rope_backward_op.register_fake(lambda dq, dk, dv, *inputs: all_like(*inputs[:3]))
_qk_norm_rope_op.register_autograd(_backward, setup_context=_save)
_qk_norm_rope_backward_op.register_autograd(no_second_derivative("qk_norm_rope"))


def qk_norm_rope(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) D)
    q_weight: Tensor,  # (D,)
    k_weight: Tensor,  # (D,)
    cos: Tensor,  # (T_max, rotary_dim / 2)
    sin: Tensor,
    *,
    n_head: int,
    n_kv_head: int,
    eps: float = 1e-6,
    positions: Tensor | None = None,  # (T,), (1, T) or (B, T) int
    cu_seqlens: Tensor | None = None,  # (documents + 1,) int32
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed q, k, v; RMSNorm over each head of q and k (as Qwen3), then `rope`: q (B, T, H, D), k and v (B, T, H_kv, D).

    The plain form returns v as a view of qkv, the kernel a copy, so that its backward writes the gradient of qkv at once.
    cos and sin get no gradient. Raises ValueError if the shapes do not match, and for positions as `rope` does."""
    head_dim = q_weight.shape[-1]
    if qkv.dim() != 3 or qkv.shape[-1] != (n_head + 2 * n_kv_head) * head_dim or q_weight.dim() != 1 or k_weight.shape != q_weight.shape:
        raise ValueError(
            f"qkv {tuple(qkv.shape)}, q_weight {tuple(q_weight.shape)}, k_weight {tuple(k_weight.shape)}, n_head {n_head}, n_kv_head "
            f"{n_kv_head}: (B, T, (n_head + 2 n_kv_head) D), (D,), (D,) expected"
        )
    if cos.dim() != 2 or 2 * cos.shape[-1] > head_dim or cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: twice (T_max, at most {head_dim // 2}) expected")
    positions = token_positions(qkv.shape[0], qkv.shape[1], cos, positions, cu_seqlens)
    if not uses_triton(qkv):
        if cpu.can_run(qkv, small=(q_weight, k_weight, cos, sin), positions=positions, numbers=(eps,)):
            return cpu.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, n_head, n_kv_head, eps)
        cos, sin = cos.detach(), sin.detach()
        return reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, n_head=n_head, n_kv_head=n_kv_head, eps=eps, positions=positions)
    refuse_transforms("qk_norm_rope", qkv, q_weight, k_weight)
    return _qk_norm_rope_op(qkv, q_weight, k_weight, cos, sin, positions, n_head, n_kv_head, eps)
