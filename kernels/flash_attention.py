"""Attention for the packed sequences of training and for the KV cache of generation; the scores are never stored.

    s_ij = scale · q_i · k_j,   c·tanh(s/c) with a soft cap,   p_i = softmax over the keys j in [lo_i, hi_i),   o_i = Σ_j p_ij v_j
    dv_j = Σ_i p_ij do_i,   ds_ij = p_ij (do_i · v_j − do_i · o_i),   dq_i = scale Σ_j ds_ij k_j,   dk_j = scale Σ_i ds_ij q_i

Causal order, sliding window and packed documents have one form: query i sees an interval [lo, hi) of keys, neither end of which decreases
as i grows, and key j is seen by such an interval of queries. A block of rows walks the blocks from its first row's lo to its last row's hi;
those from its last row's lo to its first row's hi need no mask. So each kernel has two loops, one over the masked edges and one over the
unmasked interior, and blocks that no row sees are not read. The starts and ends of documents are two int32 vectors made on the device:
the grid depends on the number of tokens alone, and nothing synchronises with the host.

Forward (arXiv 2205.14135, 2307.08691): online softmax in base 2, which saves the multiplication inside exp; lse = log2 Σ exp2(s log2 e)
is kept, 4 bytes per row. Backward: one kernel for dQ (it also writes delta_i = do_i · o_i) and one for dK and dV, which walks the queries
of all heads of the group, so every sum has one owner: no atomics, the same bits each time.

FLOPs, with P = B · H · (number of pairs i, j that see each other) and D the head size: 4·P·D forward, 6·P·D in dQ, 8·P·D in dK/dV.
Bytes, with BLOCK_M rows of q a program: forward q and o once and k, v once for every program that sees them, ≈ 2·P·D·itemsize / BLOCK_M,
which the L2 cache serves; dQ the same with q, do, o and dq; dK/dV the mirror image, q and do ≈ 2·P·D·itemsize / BLOCK_N.

Outside Triton it is PyTorch's `scaled_dot_product_attention`; packed documents on a CPU call its kernel once per document, which costs
Σ len² instead of (Σ len)²: for 4,096 tokens in 40 stories 1/40 of the arithmetic of a masked product.
"""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .common import (
    accumulator,
    all_like,
    contiguous_like,
    no_second_derivative,
    refuse_forward_mode,
    refuse_transforms,
    tanh,
    unit_stride,
    wide_dtype,
)
from .dispatch import autocast, check_documents
from .launch import architecture, cdiv, launch_options, power_of_two
from .triton_compat import jit, tl

# --- Kernels -------------------------------------------------------------------------------------------------------------------------
#
# A head of D entries is two tiles of D0 and D1 columns, both powers of two as Triton requires: 48 = 32 + 16, 80 = 64 + 16, 96 = 64 + 32.
# One tile of 64, 128 and 128 would make a third and more of the tensor cores' work padding. D1 = 0: one tile.
#
# Strides are passed divided by ALIGN and multiplied again inside, so that the compiler sees that a row of a head size like 40 or 72 starts
# on 16 bytes. It checks plain arguments only for divisibility by 16, and would load such rows two bytes at a time.
#
# The score in base 2 is UNIT · q·k, or UNIT · tanh(INNER · q·k) with a soft cap (INNER = 0: none). These are constants of the binary: a
# float argument would be fp32, too coarse for the fp64 that gradcheck needs.


@jit
def _tile(p_x, stride, n_rows, ROWS: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, IS_FULL: tl.constexpr):
    """Columns FIRST … FIRST + WIDTH of the ROWS rows at p_x, 0 beyond n_rows (unless IS_FULL: all are there) and beyond D."""
    o_r = tl.arange(0, ROWS)
    o_d = FIRST + tl.arange(0, WIDTH)
    p_x = p_x + o_r[:, None] * stride + o_d[None, :]
    if IS_FULL:
        if FIRST + WIDTH <= D:
            b_x = tl.load(p_x)
        else:
            b_x = tl.load(p_x, mask=o_d[None, :] < D, other=0.0)
    else:
        if FIRST + WIDTH <= D:
            b_x = tl.load(p_x, mask=o_r[:, None] < n_rows, other=0.0)
        else:
            b_x = tl.load(p_x, mask=(o_r[:, None] < n_rows) & (o_d[None, :] < D), other=0.0)
    return b_x  # [ROWS, WIDTH]


@jit
def _tiles(p_x, stride, n_rows, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, IS_FULL: tl.constexpr):
    b_0 = _tile(p_x, stride, n_rows, ROWS, D, 0, D0, IS_FULL)
    b_1 = b_0
    if D1:
        b_1 = _tile(p_x, stride, n_rows, ROWS, D, D0, D1, IS_FULL)
    return b_0, b_1  # [ROWS, D0], [ROWS, D1]


@jit
def _store(p_x, b_x, n_rows, stride, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    o_r = tl.arange(0, ROWS)
    o_0 = tl.arange(0, D0)
    m_r = o_r[:, None] < n_rows
    p_x = p_x + o_r[:, None] * stride
    tl.store(p_x + o_0[None, :], b_x[0].to(p_x.dtype.element_ty), mask=m_r & (o_0[None, :] < D))
    if D1:
        o_1 = D0 + tl.arange(0, D1)
        tl.store(p_x + o_1[None, :], b_x[1].to(p_x.dtype.element_ty), mask=m_r & (o_1[None, :] < D))


@jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr):
    b_0 = tl.zeros([ROWS, D0], dtype=ACC)
    b_1 = b_0
    if D1:
        b_1 = tl.zeros([ROWS, D1], dtype=ACC)
    return b_0, b_1


@jit
def _scaled(b_x, b_factor, D1: tl.constexpr):
    b_0, b_1 = b_x[0] * b_factor, b_x[1]
    if D1:
        b_1 = b_1 * b_factor
    return b_0, b_1


@jit
def _products(b_a, b_b, D1: tl.constexpr):
    """a bᵀ over the head's columns: [rows of a, rows of b]."""
    b_s = tl.dot(b_a[0], tl.trans(b_b[0]), input_precision="ieee")
    if D1:
        b_s = tl.dot(b_a[1], tl.trans(b_b[1]), b_s, input_precision="ieee", out_dtype=b_s.dtype)
    return b_s


@jit
def _accumulate(b_w, b_x, b_sum, D1: tl.constexpr):
    """b_sum + w x, w rounded to x's dtype for the tensor cores."""
    b_w = b_w.to(b_x[0].dtype)
    b_0, b_1 = tl.dot(b_w, b_x[0], b_sum[0], input_precision="ieee", out_dtype=b_sum[0].dtype), b_sum[1]
    if D1:
        b_1 = tl.dot(b_w, b_x[1], b_1, input_precision="ieee", out_dtype=b_1.dtype)
    return b_0, b_1


@jit
def _seen(
    o_m, p_start, p_end, n_self, n_other, window,
    BY_KEY: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The interval [lo, hi) of keys that query o_m sees; BY_KEY: of queries that see key o_m. Neither end falls as o_m grows."""
    o_self = o_m + (n_other - n_self)  # aligned to the end
    lo = o_m * 0
    hi = lo + n_other
    if BY_KEY:
        if IS_CAUSAL:
            lo = tl.maximum(lo, o_self)
        if HAS_WINDOW:
            hi = tl.minimum(hi, o_self + window)
    else:
        if IS_CAUSAL:
            hi = tl.minimum(hi, o_self + 1)
        if HAS_WINDOW:
            lo = tl.maximum(lo, o_self - window + 1)
    if HAS_DOCUMENTS:
        if not BY_KEY or not IS_CAUSAL:
            lo = tl.maximum(lo, tl.load(p_start + o_m))
        if BY_KEY or not IS_CAUSAL:
            hi = tl.minimum(hi, tl.load(p_end + o_m))
    return lo, hi


@jit
def _walk(
    o_block, p_start, p_end, n_self, n_other, window,
    BY_KEY: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the ROWS rows from o_block see of the other operand, [lo, hi) each, and the blocks of it that they walk: from `inner` up to
    `right` without a mask; with a mask the edges, n_edge blocks: the first n_left from `left`, the others from `right`."""
    o_m = tl.minimum(o_block + tl.arange(0, ROWS), n_self - 1)
    b_lo, b_hi = _seen(o_m, p_start, p_end, n_self, n_other, window, BY_KEY, IS_CAUSAL, HAS_WINDOW, HAS_DOCUMENTS)
    lo_first, hi_first = _seen(o_block, p_start, p_end, n_self, n_other, window, BY_KEY, IS_CAUSAL, HAS_WINDOW, HAS_DOCUMENTS)
    o_last = tl.minimum(o_block + ROWS, n_self) - 1
    lo_last, hi_last = _seen(o_last, p_start, p_end, n_self, n_other, window, BY_KEY, IS_CAUSAL, HAS_WINDOW, HAS_DOCUMENTS)
    left = tl.maximum(lo_first, 0) // BLOCK * BLOCK
    end = tl.maximum(hi_last, 0)
    inner = tl.cdiv(tl.maximum(lo_last, 0), BLOCK) * BLOCK
    right = tl.maximum(tl.maximum(hi_first, 0) // BLOCK * BLOCK, inner)
    n_left = tl.cdiv(tl.maximum(tl.minimum(inner, end) - left, 0), BLOCK)
    n_right = tl.cdiv(tl.maximum(end - right, 0), BLOCK)
    return b_lo, b_hi, left, n_left, inner, right, n_left + n_right


@jit
def _long(stride):
    """A stride in 64 bits; Triton knows a stride of 1 at compile time."""
    return tl.cast(stride, tl.int64)


@jit
def _head(o_b, o_h, stride_b, stride_h, ALIGN: tl.constexpr):
    """The offset of a head in its tensor."""
    return (o_b * stride_b + o_h.to(tl.int64) * stride_h) * ALIGN


@jit
def _flash_attention_fwd(
    p_q, p_k, p_v, p_o, p_lse, p_start, p_end,
    n_query, n_key, n_head, window,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    UNIT: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, IS_LONG: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if IS_LONG:
        stride_qt, stride_kt, stride_vt = _long(stride_qt), _long(stride_kt), _long(stride_vt)
    stride_qt, stride_kt, stride_vt = stride_qt * ALIGN, stride_kt * ALIGN, stride_vt * ALIGN
    n_blocks = tl.cdiv(n_query, BLOCK_M)
    o_bh = tl.program_id(0) // n_blocks
    o_b = (o_bh // n_head).to(tl.int64)
    o_h = o_bh % n_head
    o_block = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M  # causal: the longest programs of a head first
    p_q += _head(o_b, o_h, stride_qb, stride_qh, ALIGN) + o_block.to(tl.int64) * stride_qt
    p_k += _head(o_b, o_h // GROUP, stride_kb, stride_kh, ALIGN)
    p_v += _head(o_b, o_h // GROUP, stride_vb, stride_vh, ALIGN)
    b_lo, b_hi, left, n_left, inner, right, n_edge = _walk(
        o_block, p_start, p_end, n_query, n_key, window, False, IS_CAUSAL, HAS_WINDOW, HAS_DOCUMENTS, BLOCK_M, BLOCK_N
    )

    b_q = _tiles(p_q, stride_qt, n_query - o_block, BLOCK_M, D, D0, D1, False)
    b_o = _zeros(BLOCK_M, D0, D1, ACC)
    b_top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    b_sum = tl.zeros([BLOCK_M], dtype=ACC)
    for IS_EDGE in tl.static_range(2):
        for o in range(0 if IS_EDGE else inner, n_edge if IS_EDGE else right, 1 if IS_EDGE else BLOCK_N):
            o_n = tl.where(o < n_left, left + o * BLOCK_N, right + (o - n_left) * BLOCK_N) if IS_EDGE else o
            b_k = _tiles(p_k + tl.cast(o_n, tl.int64) * stride_kt, stride_kt, n_key - o_n, BLOCK_N, D, D0, D1, not IS_EDGE)
            b_s = _products(b_q, b_k, D1)  # [BLOCK_M, BLOCK_N]
            if INNER != 0.0:
                b_s = tanh(b_s * INNER, b_q[0].dtype == tl.float32)
            if IS_EDGE:
                o_k = o_n + tl.arange(0, BLOCK_N)
                b_s = tl.where((o_k[None, :] >= b_lo[:, None]) & (o_k[None, :] < b_hi[:, None]), b_s, float("-inf"))
            # UNIT is positive and multiplied after the maximum, so that scaling and subtraction below are one fused multiply-add.
            b_new = tl.maximum(b_top, tl.max(b_s, 1) * UNIT)
            b_base = b_new
            if IS_EDGE:
                b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row that has seen nothing yet: −inf − −inf would be NaN
            b_p = tl.exp2(b_s * UNIT - b_base[:, None])
            b_decay = tl.exp2(b_top - b_base)
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_o = _scaled(b_o, b_decay[:, None], D1)
            b_v = _tiles(p_v + tl.cast(o_n, tl.int64) * stride_vt, stride_vt, n_key - o_n, BLOCK_N, D, D0, D1, not IS_EDGE)
            b_o = _accumulate(b_p, b_v, b_o, D1)
            b_top = b_new

    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)  # 0: the row sees nothing, gives 0, and p = exp2(s − inf) = 0 in the backward pass
    b_scale = 1.0 / b_total
    o_row = o_b * n_query + o_block
    _store(p_o + (o_row * n_head + o_h) * D, _scaled(b_o, b_scale[:, None], D1), n_query - o_block, n_head * D, BLOCK_M, D, D0, D1)
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_top + tl.log2(b_total))
    o_m = o_block + tl.arange(0, BLOCK_M)
    tl.store(p_lse + o_bh.to(tl.int64) * n_query + o_m, b_lse, mask=o_m < n_query)


@jit
def _flash_attention_bwd_dq(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq, p_start, p_end,
    n_query, n_key, n_head, window,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_dob, stride_dot, stride_doh,
    SCALE: tl.constexpr, UNIT: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, IS_LONG: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if IS_LONG:
        stride_qt, stride_kt, stride_vt = _long(stride_qt), _long(stride_kt), _long(stride_vt)
        stride_ot, stride_dot = _long(stride_ot), _long(stride_dot)
    stride_qt, stride_kt, stride_vt = stride_qt * ALIGN, stride_kt * ALIGN, stride_vt * ALIGN
    stride_ot, stride_dot = stride_ot * ALIGN, stride_dot * ALIGN
    n_blocks = tl.cdiv(n_query, BLOCK_M)
    o_bh = tl.program_id(0) // n_blocks
    o_b = (o_bh // n_head).to(tl.int64)
    o_h = o_bh % n_head
    o_block = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    n_rows = n_query - o_block
    p_q += _head(o_b, o_h, stride_qb, stride_qh, ALIGN) + o_block.to(tl.int64) * stride_qt
    p_o += _head(o_b, o_h, stride_ob, stride_oh, ALIGN) + o_block.to(tl.int64) * stride_ot
    p_do += _head(o_b, o_h, stride_dob, stride_doh, ALIGN) + o_block.to(tl.int64) * stride_dot
    p_k += _head(o_b, o_h // GROUP, stride_kb, stride_kh, ALIGN)
    p_v += _head(o_b, o_h // GROUP, stride_vb, stride_vh, ALIGN)
    b_lo, b_hi, left, n_left, inner, right, n_edge = _walk(
        o_block, p_start, p_end, n_query, n_key, window, False, IS_CAUSAL, HAS_WINDOW, HAS_DOCUMENTS, BLOCK_M, BLOCK_N
    )

    # delta first: o is not needed any more when the loops start.
    b_do = _tiles(p_do, stride_dot, n_rows, BLOCK_M, D, D0, D1, False)
    b_o = _tiles(p_o, stride_ot, n_rows, BLOCK_M, D, D0, D1, False)
    b_delta = tl.sum(b_do[0].to(ACC) * b_o[0].to(ACC), 1)
    if D1:
        b_delta += tl.sum(b_do[1].to(ACC) * b_o[1].to(ACC), 1)
    o_m = o_block + tl.arange(0, BLOCK_M)
    o_row = o_bh.to(tl.int64) * n_query
    tl.store(p_delta + o_row + o_m, b_delta, mask=o_m < n_query)
    b_lse = tl.load(p_lse + o_row + o_m, mask=o_m < n_query, other=0.0)
    b_q = _tiles(p_q, stride_qt, n_rows, BLOCK_M, D, D0, D1, False)
    b_dq = _zeros(BLOCK_M, D0, D1, ACC)
    for IS_EDGE in tl.static_range(2):
        for o in range(0 if IS_EDGE else inner, n_edge if IS_EDGE else right, 1 if IS_EDGE else BLOCK_N):
            o_n = tl.where(o < n_left, left + o * BLOCK_N, right + (o - n_left) * BLOCK_N) if IS_EDGE else o
            b_k = _tiles(p_k + tl.cast(o_n, tl.int64) * stride_kt, stride_kt, n_key - o_n, BLOCK_N, D, D0, D1, not IS_EDGE)
            b_v = _tiles(p_v + tl.cast(o_n, tl.int64) * stride_vt, stride_vt, n_key - o_n, BLOCK_N, D, D0, D1, not IS_EDGE)
            b_s = _products(b_q, b_k, D1)  # [BLOCK_M, BLOCK_N]
            if INNER != 0.0:
                b_s = tanh(b_s * INNER, b_q[0].dtype == tl.float32)
            b_p = tl.exp2(b_s * UNIT - b_lse[:, None])
            if IS_EDGE:
                o_k = o_n + tl.arange(0, BLOCK_N)
                b_p = tl.where((o_k[None, :] >= b_lo[:, None]) & (o_k[None, :] < b_hi[:, None]), b_p, 0.0)
            b_ds = b_p * (_products(b_do, b_v, D1) - b_delta[:, None])
            if INNER != 0.0:
                b_ds = b_ds * (1.0 - b_s * b_s)
            b_dq = _accumulate(b_ds, b_k, b_dq, D1)
    o_out = ((o_b * n_query + o_block) * n_head + o_h) * D
    _store(p_dq + o_out, _scaled(b_dq, SCALE, D1), n_rows, n_head * D, BLOCK_M, D, D0, D1)


@jit
def _flash_attention_bwd_dkv(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_start, p_end,
    n_query, n_key, n_kv_head, window,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh,
    SCALE: tl.constexpr, UNIT: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, IS_LONG: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if IS_LONG:
        stride_qt, stride_kt, stride_vt, stride_dot = _long(stride_qt), _long(stride_kt), _long(stride_vt), _long(stride_dot)
    stride_qt, stride_kt, stride_vt, stride_dot = stride_qt * ALIGN, stride_kt * ALIGN, stride_vt * ALIGN, stride_dot * ALIGN
    n_blocks = tl.cdiv(n_key, BLOCK_N)
    o_bh = tl.program_id(0) // n_blocks
    o_b = (o_bh // n_kv_head).to(tl.int64)
    o_h = o_bh % n_kv_head
    o_block = tl.program_id(0) % n_blocks * BLOCK_N  # with a causal mask the first keys have the most work, so they start first
    n_rows = n_key - o_block
    p_k += _head(o_b, o_h, stride_kb, stride_kh, ALIGN) + o_block.to(tl.int64) * stride_kt
    p_v += _head(o_b, o_h, stride_vb, stride_vh, ALIGN) + o_block.to(tl.int64) * stride_vt
    p_q += _head(o_b, o_h * GROUP, stride_qb, stride_qh, ALIGN)
    p_do += _head(o_b, o_h * GROUP, stride_dob, stride_doh, ALIGN)
    p_lse += o_bh.to(tl.int64) * GROUP * n_query
    p_delta += o_bh.to(tl.int64) * GROUP * n_query
    b_lo, b_hi, left, n_left, inner, right, n_edge = _walk(
        o_block, p_start, p_end, n_key, n_query, window, True, IS_CAUSAL, HAS_WINDOW, HAS_DOCUMENTS, BLOCK_N, BLOCK_M
    )

    b_k = _tiles(p_k, stride_kt, n_rows, BLOCK_N, D, D0, D1, False)
    b_v = _tiles(p_v, stride_vt, n_rows, BLOCK_N, D, D0, D1, False)
    b_dk = _zeros(BLOCK_N, D0, D1, ACC)
    b_dv = _zeros(BLOCK_N, D0, D1, ACC)
    for IS_EDGE in tl.static_range(2):
        # One loop over the blocks and the heads of the group: a loop in a loop takes some twenty registers more.
        for i in range(0, GROUP * (n_edge if IS_EDGE else (right - inner) // BLOCK_M)):
            head, o = i % GROUP, i // GROUP
            o_m = tl.where(o < n_left, left + o * BLOCK_M, right + (o - n_left) * BLOCK_M) if IS_EDGE else inner + o * BLOCK_M
            o_q = o_m + tl.arange(0, BLOCK_M)
            o_row = head * n_query + o_q
            p_qh = p_q + head * tl.cast(stride_qh, tl.int64) * ALIGN + tl.cast(o_m, tl.int64) * stride_qt
            p_doh = p_do + head * tl.cast(stride_doh, tl.int64) * ALIGN + tl.cast(o_m, tl.int64) * stride_dot
            b_q = _tiles(p_qh, stride_qt, n_query - o_m, BLOCK_M, D, D0, D1, not IS_EDGE)
            b_do = _tiles(p_doh, stride_dot, n_query - o_m, BLOCK_M, D, D0, D1, not IS_EDGE)
            if IS_EDGE:
                b_lse = tl.load(p_lse + o_row, mask=o_q < n_query, other=0.0)
                b_delta = tl.load(p_delta + o_row, mask=o_q < n_query, other=0.0)
            else:
                b_lse = tl.load(p_lse + o_row)
                b_delta = tl.load(p_delta + o_row)
            # The rows of the scores are keys, so that p and ds are left operands without a transpose.
            b_s = _products(b_k, b_q, D1)  # [BLOCK_N, BLOCK_M]
            if INNER != 0.0:
                b_s = tanh(b_s * INNER, b_k[0].dtype == tl.float32)
            b_p = tl.exp2(b_s * UNIT - b_lse[None, :])
            if IS_EDGE:
                b_p = tl.where((o_q[None, :] >= b_lo[:, None]) & (o_q[None, :] < b_hi[:, None]), b_p, 0.0)
            b_dv = _accumulate(b_p, b_do, b_dv, D1)
            b_ds = b_p * (_products(b_v, b_do, D1) - b_delta[None, :])
            if INNER != 0.0:
                b_ds = b_ds * (1.0 - b_s * b_s)
            b_dk = _accumulate(b_ds, b_q, b_dk, D1)
    o_out = ((o_b * n_key + o_block) * n_kv_head + o_h) * D
    _store(p_dk + o_out, _scaled(b_dk, SCALE, D1), n_rows, n_kv_head * D, BLOCK_N, D, D0, D1)
    _store(p_dv + o_out, b_dv, n_rows, n_kv_head * D, BLOCK_N, D, D0, D1)


# --- Launches -----------------------------------------------------------------------------------------------------------------------


def head_tiles(head_dim: int) -> tuple[int, int]:
    """(D0, D1): the widths of the one or two column tiles a head is cut into, powers of two of at least 16, or 0."""
    d0 = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - d0
    if rest <= 0:
        return d0, 0
    d1 = max(16, power_of_two(rest))
    return (d0, d1) if d1 < d0 else (2 * d0, 0)


def _strides(*tensors: Tensor) -> tuple[list[int], dict]:
    """(batch, token, head) strides of each tensor in units of ALIGN elements, and the constants ALIGN and IS_LONG: whether offsets within
    a tile of up to 256 tokens pass 32 bits."""
    strides = [t.stride(i) if t.shape[i] > 1 else 0 for t in tensors for i in (0, 1, 2)]
    align = math.gcd(*strides, 16)
    return [s // align for s in strides], {"ALIGN": align, "IS_LONG": max(strides[1::3]) * 256 >= 2**31}


def _constants(q: Tensor, k: Tensor, start: Tensor | None, is_causal: bool, window: int, softcap: float, scale: float) -> dict:
    d0, d1 = head_tiles(q.shape[-1])
    log2e = math.log2(math.e)
    return dict(
        UNIT=(softcap or scale) * log2e, INNER=scale / softcap if softcap else 0.0, GROUP=q.shape[2] // k.shape[2],
        IS_CAUSAL=is_causal, HAS_WINDOW=window > 0, HAS_DOCUMENTS=start is not None, D=q.shape[-1], D0=d0, D1=d1, ACC=accumulator(q),
    )  # fmt: skip


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide_dtype(q))
    return contiguous_like(q), lse


@torch.library.custom_op("tritale::flash_attention", mutates_args=())
def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, is_causal: bool, window: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """(o, log2 of the row's sum of exponents, inf if a query sees nothing)."""
    out, lse = _empty_outputs(q)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    n_batch, n_query, n_head, head_dim = q.shape
    if out.numel() == 0:
        return out, lse
    options = launch_options("flash_attention_fwd", q, head_dim=head_dim, itemsize=q.itemsize)
    strides, align = _strides(q, k, v)
    grid = (cdiv(n_query, options["BLOCK_M"]) * n_batch * n_head,)
    with torch.cuda.device_of(q):
        _flash_attention_fwd[grid](
            q, k, v, out, lse, start, end, n_query, k.shape[1], n_head, window, *strides,
            **_constants(q, k, start, is_causal, window, softcap, scale), **align, **options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("tritale::flash_attention_backward", mutates_args=())
def _flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, start: Tensor | None, end: Tensor | None,
    is_causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = all_like(q, k, v)
    grad, q, k, v, out = (unit_stride(t) for t in (grad, q, k, v, out))
    (n_batch, n_query, n_head, head_dim), (n_key, n_kv_head) = q.shape, k.shape[1:3]
    delta = torch.empty_like(lse)
    constants = {"SCALE": scale, **_constants(q, k, start, is_causal, window, softcap, scale)}
    sizes = dict(head_dim=head_dim, itemsize=q.itemsize)
    if dq.numel():
        options = launch_options("flash_attention_bwd_dq", q, **sizes)
        strides, align = _strides(q, k, v, out, grad)
        grid = (cdiv(n_query, options["BLOCK_M"]) * n_batch * n_head,)
        with torch.cuda.device_of(q):
            _flash_attention_bwd_dq[grid](
                q, k, v, out, grad, lse, delta, dq, start, end, n_query, n_key, n_head, window, *strides,
                **constants, **align, **options,
            )  # fmt: skip
    if dk.numel():
        options = launch_options("flash_attention_bwd_dkv", q, **sizes)
        strides, align = _strides(q, k, v, grad)
        grid = (cdiv(n_key, options["BLOCK_N"]) * n_batch * n_kv_head,)
        with torch.cuda.device_of(q):
            _flash_attention_bwd_dkv[grid](
                q, k, v, grad, lse, delta, dk, dv, start, end, n_query, n_key, n_kv_head, window, *strides,
                **constants, **align, **options,
            )  # fmt: skip
    return dq, dk, dv


def _save_flash(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.window, ctx.softcap, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _flash_backward(ctx, grad, _):
    q, k, v, start, end, out, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    options = (ctx.is_causal, ctx.window, ctx.softcap, ctx.scale)
    return *_flash_attention_backward(grad, q, k, v, out, lse, start, end, *options), *(None,) * 6


_flash_attention.register_fake(lambda q, *_: _empty_outputs(q))
_flash_attention_backward.register_fake(lambda grad, q, k, v, *_: all_like(q, k, v))
_flash_attention.register_autograd(_flash_backward, setup_context=_save_flash)
_flash_attention_backward.register_autograd(no_second_derivative("flash_attention"))


# --- PyTorch's attention, and documents on a CPU -----------------------------------------------------------------------------------------

_sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_sdpa_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
WIDE_UP_TO = 24_576  # tokens of a document · head size, up to which PyTorch's backward in 16 bits takes longer than in fp32 (docs/log.md)


def _documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return [(start, end) for start, end in pairwise(bounds) if end > start]


def _heads_first(x: Tensor, start: int, end: int) -> Tensor:
    return x[:, start:end].transpose(1, 2)  # (1, H, T, D); PyTorch's kernel requires adjacent entries of a head


def _order(q: Tensor, n: int, is_causal: bool, window: int) -> dict[str, Any]:
    """What a document of n tokens sees, for PyTorch's kernel: all, causal, or by a mask (n, n) if a window is shorter than it."""
    if not 0 < window < n:
        return {"is_causal": is_causal}
    mask = reference.attention_mask(n, n, is_causal=is_causal, window=window, cu_seqlens=None, device=q.device)
    assert mask is not None
    return {"is_causal": False, "attn_mask": torch.zeros(n, n, dtype=q.dtype).masked_fill(~mask, float("-inf"))}


@torch.library.custom_op("tritale::document_attention", mutates_args=())
def _document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, is_causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    for start, end in _documents(cu_seqlens):
        qkv = (_heads_first(t, start, end) for t in (q, k, v))
        o, lse[:, :, start:end] = _sdpa(*qkv, scale=scale, **_order(q, end - start, is_causal, window))
        out[:, start:end] = o.transpose(1, 2)
    return out, lse


@torch.library.custom_op("tritale::document_attention_backward", mutates_args=())
def _document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    is_causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = all_like(q, k, v)
    tensors, documents = [unit_stride(t) for t in (grad, q, k, v, out)], _documents(cu_seqlens)
    if q.shape[-1] * max((end - start for start, end in documents), default=0) <= WIDE_UP_TO:
        tensors = [t.to(wide_dtype(t)) for t in tensors]
    for start, end in documents:
        inputs = [_heads_first(t, start, end) for t in tensors]
        order = _order(tensors[1], end - start, is_causal, window)
        parts = _sdpa_backward(*inputs, lse[:, :, start:end].contiguous(), 0.0, scale=scale, **order)
        for total, part in zip((dq, dk, dv), parts, strict=True):
            total[:, start:end] = part.transpose(1, 2)
    return dq, dk, dv


def _save(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    gradients = _document_attention_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.is_causal, ctx.window, ctx.scale)
    return *gradients, None, None, None, None


_document_attention.register_fake(lambda q, *_: _empty_outputs(q))
_document_attention_backward.register_fake(lambda grad, q, k, v, *_: all_like(q, k, v))
_document_attention.register_autograd(_backward, setup_context=_save)
_document_attention_backward.register_autograd(no_second_derivative("flash_attention"))


def _document_bounds(cu_seqlens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """The start and end of each token's document: two (T,) int32, made on the device."""
    document = torch.searchsorted(cu_seqlens, torch.arange(n_tokens, device=cu_seqlens.device), right=True)
    return cu_seqlens[document - 1].int(), cu_seqlens[document].int()


def _attend_triton(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window, softcap, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    if q.shape[-1] > LARGEST_HEAD:
        raise ValueError(f"the Triton kernels take heads of at most {LARGEST_HEAD}, not {q.shape[-1]}; use attention_backend('sdpa')")
    window = 0 if window is None else min(window, q.shape[1] + k.shape[1])  # there are no keys further back, and this fits 32 bits
    start, end = (None, None) if cu_seqlens is None else _document_bounds(cu_seqlens, q.shape[1])
    refuse_transforms("flash_attention", q, k, v)
    return _flash_attention(q, k, v, start, end, is_causal, window, softcap or 0.0, scale)[0]


def _attend_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window, softcap, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    """Dao's package; its causal masks are aligned to the end and its window (left, right) does not count the query itself."""
    import flash_attn  # pyright: ignore[reportMissingImports]  (optional)

    left, right = (-1 if window is None else window - 1), (0 if is_causal else -1)
    options = dict(softmax_scale=scale, causal=is_causal, window_size=(left, right), softcap=softcap or 0.0)
    if cu_seqlens is None:
        return flash_attn.flash_attn_func(q, k, v, **options)
    n, bounds = q.shape[1], cu_seqlens.int()  # the longest document is on the device; T is a bound that needs no synchronisation
    return flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, n, n, **options).unsqueeze(0)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window, softcap, scale: float, cu_seqlens: Tensor) -> Tensor:
    """PyTorch's attention to the documents one by one, without a mask of T × T. Reads cu_seqlens, so a GPU synchronises."""
    lengths = [end - start for start, end in _documents(cu_seqlens)]
    documents = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([_attend_sdpa(q, k, v, is_causal, window, softcap, scale, None) for q, k, v in documents], dim=1)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window, softcap, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    if q.shape[1] < 2:  # one document
        cu_seqlens = None
    if cu_seqlens is not None and q.device.type != "cpu":
        return _attend_documents(q, k, v, is_causal, window, softcap, scale, cu_seqlens)
    if softcap is not None:
        return reference.flash_attention(q, k, v, is_causal=is_causal, window=window, softcap=softcap, scale=scale, cu_seqlens=cu_seqlens)
    group = q.shape[2] // k.shape[2]
    # Grouped heads in fp32, or above 256, have no fused kernel in PyTorch: with `enable_gqa` the scores would be in memory.
    if group > 1 and (cu_seqlens is not None or (q.is_cuda and (_is_slow(q) or q.shape[-1] > LARGEST_HEAD))):
        k, v, group = *(t.repeat_interleave(group, dim=2) for t in (k, v)), 1
    if cu_seqlens is not None:
        refuse_transforms("flash_attention", q, k, v)
        return _document_attention(q, k, v, cu_seqlens, is_causal, window or 0, scale)[0]
    refuse_forward_mode("flash_attention", q, k, v)  # PyTorch's error names an op of its own
    # One query sees all keys; a square causal product has a faster form than a mask.
    is_square = True if q.shape[1] == k.shape[1] else False  # a bool: with dynamic shapes the comparison is a symbol, which SDPA refuses
    needs_mask = window is not None or (is_causal and not is_square and q.shape[1] > 1)
    mask = None
    if needs_mask:
        mask = reference.attention_mask(q.shape[1], k.shape[1], is_causal=is_causal, window=window, cu_seqlens=None, device=q.device)
    needs_group = True if group > 1 else False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    is_causal = is_causal and mask is None and is_square
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=needs_group).transpose(1, 2)


# --- The public function -------------------------------------------------------------------------------------------------------------

ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "flash_attn")
LARGEST_HEAD = 256  # of the Triton kernels
_forced = "auto"


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Run `flash_attention` inside the block on one implementation: "triton", "sdpa" (PyTorch's scaled_dot_product_attention; packed
    documents one by one, which synchronises with a GPU and cannot be captured), "flash_attn" (the package of that name) or "auto".

    "auto" follows `dispatch.backend` and uses Triton's kernels except for cases in which they are slow, which use SDPA: sm_75 (no
    tensor-core path) and fp32 and fp64 on a GPU (exact products do not use tensor cores), but not packed documents and soft caps, for which
    SDPA needs the bounds on the host or all scores; head sizes above 256; and a single query (decoding), which would leave most of the GPU
    idle.

    Raises ValueError for another name, or for "flash_attn" if it is not installed."""
    global _forced
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; choose one of {', '.join(ATTENTION_BACKENDS)}")
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("attention backend 'flash_attn' needs the package: pip install flash-attn, or use 'triton' or 'sdpa'")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _is_slow(q: Tensor) -> bool:
    """Whether Triton's kernels have no tensor cores for q on its GPU."""
    return q.dtype in (torch.float32, torch.float64) or architecture(q) == "sm_75"


def _choose(q: Tensor, needs_scores: bool = False) -> str:
    """The backend for q: the forced one, or what "auto" means for its device, dtype and shape, and for options with which SDPA needs the
    bounds of documents on the host or all scores."""
    if _forced == "triton" and not q.is_cuda and not dispatch.interprets():
        raise ValueError(
            f"attention backend 'triton' cannot run on a {q.device.type} tensor; move it to a GPU, use 'sdpa', or set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        )
    if _forced != "auto":
        return _forced
    if not dispatch.uses_triton(q) or q.shape[-1] > LARGEST_HEAD or q.shape[1] == 1:
        return "sdpa"
    return "sdpa" if q.is_cuda and _is_slow(q) and not needs_scores else "triton"


def flash_attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, S, H_kv, D)
    v: Tensor,  # (B, S, H_kv, D)
    *,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Exact attention softmax(scale · q kᵀ) v, without storing the scores (arXiv 2205.14135): (B, T, H, D), in q's dtype.

    Grouped heads share k and v (H a multiple of H_kv). Causal attention is aligned to the end when T ≠ S, as a KV cache needs.
    `window=w`: a query sees itself and the w − 1 keys before it. `softcap=c`: scores become c·tanh(s/c). `cu_seqlens` (int32,
    documents + 1, from 0 to T, may repeat its last entry): B = 1 and documents do not see each other, though a NaN in one may reach others.
    A query that sees no key gives 0. `attention_backend` chooses what computes it. It has no forward-mode and no second derivative;
    `reference.flash_attention` has both.

    Raises ValueError if shapes or dtypes do not match, a window or soft cap is not positive, or `cu_seqlens` do not run from 0 to T
    (their values are checked on the CPU only: on a GPU that would synchronise)."""
    is_fitting = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1] and q.shape[0] == k.shape[0]
    if not is_fitting or not q.shape[2] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: (B, T, H, D) and twice (B, S, H_kv, D) expected: k "
            "and v must have one shape, q their batch and head size, and q's heads (dimension 2) must be a multiple of theirs"
        )
    if cu_seqlens is not None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"cu_seqlens needs T = S; got q {tuple(q.shape)}, k {tuple(k.shape)}")
        check_documents(cu_seqlens, *q.shape[:2])
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"window ({window}) must be at least 1 and softcap ({softcap}) positive; None switches either off")
    q, k, v = autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; convert them to one dtype")
    unit: float = q.shape[-1] ** -0.5 if scale is None else scale
    if unit <= 0:  # the kernels, PyTorch's too, take the maximum before scaling, so they need a positive unit
        q, unit = q * unit, 1.0
    needs_scores = softcap is not None or cu_seqlens is not None
    attend = {"triton": _attend_triton, "flash_attn": _attend_flash_attn, "sdpa": _attend_sdpa}[_choose(q, needs_scores)]
    return attend(q, k, v, is_causal, window, softcap, unit, cu_seqlens)
