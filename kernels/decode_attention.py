"""Attention of one new token of each sequence to its KV cache: a step of generation.

    s_j = q · k_j / √D,   p = softmax over the keys j in (position − window, position],   o = Σ_j p_j v_j

The new token's k and v are written into the cache at its position. Positions are read on the device, so that one CUDA graph serves
sequences of any length; entries of the cache past a position are never read. Bytes: every key and value that is seen, once, 2 L H_kv D s
for a sequence of L tokens; 4 L H D FLOPs. Memory decides, so there are no tensor cores: a program multiplies a block of keys with up to 4
heads that share them.

Each lane of a block (keys o, o + BLOCK_S, …) has its own maximum and sum (online softmax, arXiv 1805.02867), which are joined once, after
the loop. If there are few sequences, PARTS programs divide the keys of one, and a second kernel joins their sums (flash-decoding): no
atomics, the same bits each time.
"""

import torch
from torch import Tensor

from . import reference
from .common import LOG2E, accumulator, wide_dtype
from .dispatch import is_readable, uses_triton
from .launch import launch_options, power_of_two, sm_count
from .triton_compat import jit, tl


@jit
def _decode_attention(
    p_q, p_k, p_v,  # (B, H, D), (B, H_KV, D) twice: of the new tokens
    p_keys, p_values,  # (rows, S, H_KV, D)
    p_positions,  # (B,)
    p_o,  # (B, H, D); with PARTS > 1 (B, H, PARTS, D)
    p_top, p_sum,  # (B, H, PARTS), with PARTS > 1
    window, stride_qb, stride_kb, stride_vb, stride_row,
    UNIT: tl.constexpr, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ACC: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_b, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    o_kv = tl.program_id(1) * HEADS // (H // H_KV)
    o_d, o_lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    m_d = o_d < D
    position = tl.load(p_positions + o_b).to(tl.int32)
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(position - window + 1, 0)
    n_keys = tl.cdiv(tl.cdiv(position - start, BLOCK_S), PARTS) * BLOCK_S
    start += part * n_keys
    end = tl.minimum(start + n_keys, position)

    b_q = tl.load(p_q + o_b * stride_qb + o_h * D + o_d, mask=m_d[None, :], other=0.0).to(ACC)  # [HEADS, BLOCK_D]
    p_k += o_b * stride_kb + o_kv * D + o_d
    p_v += o_b * stride_vb + o_kv * D + o_d
    p_keys += o_b * stride_row + o_kv * D
    p_values += o_b * stride_row + o_kv * D
    # The first part takes the new token, which is not read from the cache, in its first lane.
    b_new_k, b_new_v = tl.load(p_k, mask=m_d, other=0.0), tl.load(p_v, mask=m_d, other=0.0)  # [BLOCK_D]
    has_new = (o_lane == 0) & (part == 0)
    b_top = tl.where(has_new[None, :], tl.sum(b_q * b_new_k.to(ACC)[None, :], 1)[:, None] * UNIT, float("-inf"))  # [HEADS, BLOCK_S]
    b_sum = tl.where(has_new[None, :], tl.full([HEADS, BLOCK_S], 1.0, dtype=ACC), 0.0)
    b_o = b_sum[:, :, None] * b_new_v.to(ACC)[None, None, :]  # [HEADS, BLOCK_S, BLOCK_D]
    if (part == 0) & (tl.program_id(1) * HEADS % (H // H_KV) == 0):
        o_new = position.to(tl.int64) * (H_KV * D) + o_d
        tl.store(p_keys + o_new, b_new_k, mask=m_d)
        tl.store(p_values + o_new, b_new_v, mask=m_d)

    for o in range(start, end, BLOCK_S):
        is_seen = o + o_lane < end
        o_entry = tl.cast(o, tl.int64) * (H_KV * D) + (o_lane * (H_KV * D))[None, :, None] + o_d[None, None, :]
        m_entry = is_seen[None, :, None] & m_d[None, None, :]
        b_k = tl.load(p_keys + o_entry, mask=m_entry, other=0.0).to(ACC)  # [1, BLOCK_S, BLOCK_D]
        b_v = tl.load(p_values + o_entry, mask=m_entry, other=0.0).to(ACC)
        b_s = tl.where(is_seen[None, :], tl.sum(b_q[:, None, :] * b_k, 2) * UNIT, float("-inf"))  # [HEADS, BLOCK_S]
        b_new = tl.maximum(b_top, b_s)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a lane that has seen nothing yet: −inf − −inf would be NaN
        b_p, b_decay = tl.exp2(b_s - b_base), tl.exp2(b_top - b_base)
        b_sum = b_sum * b_decay + b_p
        b_o = b_o * b_decay[:, :, None] + b_p[:, :, None] * b_v
        b_top = b_new

    b_most = tl.max(b_top, 1)[:, None]  # [HEADS, 1]
    b_decay = tl.exp2(b_top - tl.where(b_most == float("-inf"), 0.0, b_most))
    b_total = tl.sum(b_sum * b_decay, 1)[:, None]
    b_o = tl.sum(b_o * b_decay[:, :, None], 1)  # [HEADS, BLOCK_D]
    o_out = o_b * H + o_h
    if PARTS == 1:
        tl.store(p_o + o_out * D + o_d[None, :], (b_o / b_total).to(p_o.dtype.element_ty), mask=m_d[None, :])
    else:
        o_out = o_out * PARTS + part
        tl.store(p_o + o_out * D + o_d[None, :], b_o, mask=m_d[None, :])
        tl.store(p_top + o_out, b_most)
        tl.store(p_sum + o_out, b_total)


@jit
def _decode_attention_combine(
    p_parts,  # (B · H, PARTS, D)
    p_top, p_sum,  # (B · H, PARTS)
    p_o,  # (B · H, D)
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_h = tl.program_id(0).to(tl.int64)
    o_p, o_d = o_h * PARTS + tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    b_top = tl.load(p_top + o_p)  # [PARTS]; the first is finite, since a token sees itself
    b_decay = tl.exp2(b_top - tl.max(b_top, 0))
    b_o = tl.load(p_parts + o_p[:, None] * D + o_d[None, :], mask=o_d[None, :] < D, other=0.0)  # [PARTS, BLOCK_D]
    b_o = tl.sum(b_o * b_decay[:, None], 0) / tl.sum(tl.load(p_sum + o_p) * b_decay, 0)
    tl.store(p_o + o_h * D + o_d, b_o.to(p_o.dtype.element_ty), mask=o_d < D)


def _parts(q: Tensor, n_programs: int, n_keys: int) -> int:
    """How many programs divide the keys of a sequence: a power of two, so that each SM has about two and each program at least 64 keys."""
    return power_of_two(max(1, min(2 * sm_count(q) // n_programs, n_keys // 64, 32)) // 2 + 1)


@torch.library.custom_op("tritale::decode_attention", mutates_args=("keys", "values"))
def _decode_attention_op(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
    (n_batch, n_head, head_dim), n_kv_head = q.shape, k.shape[1]
    out = q.new_empty(q.shape)
    if not q.numel():
        return out
    group = n_head // n_kv_head
    n_heads = min(group & -group, 4)
    block_d = power_of_two(head_dim)
    options = launch_options("decode_attention", q, entries=n_heads * block_d)
    n_parts = _parts(q, n_batch * n_head // n_heads, min(keys.shape[1], window or keys.shape[1]))
    wide = q.new_empty((n_batch, n_head, n_parts, head_dim), dtype=wide_dtype(q)) if n_parts > 1 else out
    top, total = (wide.new_empty(wide.shape[:3]) for _ in range(2)) if n_parts > 1 else (out, out)
    grid = (n_batch, n_head // n_heads, n_parts)
    with torch.cuda.device_of(q):
        _decode_attention[grid](
            q, k, v, keys, values, positions, wide, top, total,
            window, q.stride(0), k.stride(0), v.stride(0), keys.stride(0),
            UNIT=head_dim**-0.5 * LOG2E.value, H=n_head, H_KV=n_kv_head, D=head_dim, PARTS=n_parts, HAS_WINDOW=window > 0,
            ACC=accumulator(q), HEADS=n_heads, BLOCK_D=block_d, **options,
        )  # fmt: skip
        if n_parts > 1:
            options = launch_options("decode_attention_combine", q)
            _decode_attention_combine[n_batch * n_head,](wide, top, total, out, D=head_dim, PARTS=n_parts, BLOCK_D=block_d, **options)
    return out


_decode_attention_op.register_fake(lambda q, *_: q.new_empty(q.shape))


def _adjacent_heads(x: Tensor) -> Tensor:
    """x (B, H, D) if its heads lie next to each other, otherwise a contiguous copy."""
    return x if x.stride()[1:] == (x.shape[-1], 1) else x.contiguous()


def decode_attention(
    q: Tensor,  # (B, H, D)
    k: Tensor,  # (B, H_kv, D)
    v: Tensor,  # (B, H_kv, D)
    keys: Tensor,  # (rows, S, H_kv, D), the cache: sequence b has row b
    values: Tensor,  # (rows, S, H_kv, D)
    positions: Tensor,  # (B,) int64, in [0, S)
    *,
    window: int | None = None,
) -> Tensor:
    """Attention of one new token of each of B sequences, of which `positions` tokens are in the cache: (B, H, D), in q's dtype.

    k and v are written into the cache, which is contiguous, at `positions`. Grouped heads share k and v (H a multiple of H_kv);
    `window=w`: a token sees itself and the w − 1 tokens before it. Cache entries past a position may be anything. No gradient.

    Raises ValueError if shapes or dtypes do not match, the cache is not contiguous, or a window is not positive. The values of `positions`
    are not checked: on a GPU that would synchronise."""
    is_fitting = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2] and 0 < k.shape[1] <= q.shape[1]
    is_cached = keys.shape == values.shape and keys.shape[2:] == k.shape[1:] and len(keys) >= len(q) and positions.shape == q.shape[:1]
    if not is_fitting or not is_cached or q.shape[1] % k.shape[1]:
        given = {"q": q, "k": k, "v": v, "keys": keys, "values": values, "positions": positions}
        raise ValueError(
            f"{', '.join(f'{name} {tuple(t.shape)}' for name, t in given.items())}: (B, H, D), twice (B, H_kv, D), twice "
            "(rows, S, H_kv, D) and (B,) expected, with H a multiple of H_kv and at least B rows"
        )
    if len({t.dtype for t in (q, k, v, keys, values)}) > 1:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, the cache {keys.dtype}, {values.dtype}; convert them to one dtype")
    if not keys[0].is_contiguous() or keys.stride() != values.stride():
        raise ValueError(f"the cache has strides {keys.stride()}, {values.stride()}; its rows must be contiguous and both alike")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None for no window")
    if uses_triton(q):
        return _decode_attention_op(*map(_adjacent_heads, (q, k, v)), keys, values, positions, window or 0)
    if is_readable(positions) and len(q):  # on a CPU the rest of the cache takes time
        longest = int(positions.max()) + 1
        keys, values = keys[:, :longest], values[:, :longest]
    return reference.decode_attention(q, k, v, keys, values, positions, window=window)
