"""Newton–Schulz iteration of many small matrices at once: U Vᵀ of G = U S Vᵀ, nearly, for Muon.

    X_0 = G / ‖G‖,    A = X Xᵀ,    B = b A + c A A,    X ← a X + B X,    as often as asked        (X is wide: Gᵀ if G is tall)

Three launches an iteration and one before, for all matrices of all shapes: a table names the matrix and tile of each program. A and B are
symmetric, so that only their tiles on and above the diagonal are computed, and each is stored twice: 3 m² n + m³ FLOPs instead of
4 m² n + 2 m³ for an (m, n) matrix. ‖G‖² is the trace of G Gᵀ, so G is not scaled before the first product but A and the result after it.

Everything between is in bf16, padded with zeros to whole tiles, so that no product has a mask; sums are in fp32. Bytes of an iteration:
each tile reads two stripes of its operands from the L2 cache.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import uses_triton
from .launch import architecture, launch_options
from .triton_compat import jit, tl

FIELDS = tl.constexpr(7)  # of a matrix in the table: m, n, rows, columns, and where it starts in the updates, in X and in A


@jit
def _pack(
    p_g,  # the updates, fp32, one after the other
    p_x,  # (m, n) each, bf16
    p_matrices,  # (matrices, FIELDS): columns and start in units of ALIGN
    p_tiles,  # (programs, 3): matrix, row and column of the tile in X
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p_tile = p_tiles + tl.program_id(0) * 3
    p_matrix = p_matrices + tl.load(p_tile) * FIELDS
    i, j = tl.load(p_tile + 1) * BLOCK, tl.load(p_tile + 2) * BLOCK
    n, rows, columns = tl.load(p_matrix + 1), tl.load(p_matrix + 2), tl.load(p_matrix + 3) * ALIGN
    p_g += tl.load(p_matrix + 4) * ALIGN
    o = tl.arange(0, BLOCK)
    if rows > columns:
        o_r, o_c = (j + o)[:, None], (i + o)[None, :]
        b_x = tl.trans(tl.load(p_g + o_r * columns + o_c, mask=(o_r < rows) & (o_c < columns), other=0.0))
    else:
        o_r, o_c = (i + o)[:, None], (j + o)[None, :]
        b_x = tl.load(p_g + o_r * columns + o_c, mask=(o_r < rows) & (o_c < columns), other=0.0)
    n = tl.multiple_of(n, BLOCK)
    tl.store(p_x + tl.load(p_matrix + 5) * BLOCK + (i + o)[:, None] * n + (j + o)[None, :], b_x.to(p_x.dtype.element_ty))


@jit
def _inverse_norm(p_a, m, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / ‖G‖ from the diagonal of G Gᵀ, (m, m)."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, m, BLOCK):
        total += tl.load(p_a + (start + tl.arange(0, BLOCK)) * (m + 1)).to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(total, axis=0)), EPS)


@jit
def _symmetric(
    p_x,  # (m, k) each: X, of n columns, or A, of m
    p_out,  # (m, m) each: X Xᵀ, or b A + c A A
    p_matrices, p_tiles,
    BETA: tl.constexpr, GAMMA: tl.constexpr, IS_GRAM: tl.constexpr,
    IS_FIRST: tl.constexpr,  # A is G Gᵀ, not yet divided by ‖G‖²
    EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p_tile = p_tiles + tl.program_id(0) * 3
    p_matrix = p_matrices + tl.load(p_tile) * FIELDS
    i, j = tl.load(p_tile + 1) * BLOCK, tl.load(p_tile + 2) * BLOCK
    m = tl.multiple_of(tl.load(p_matrix), BLOCK)
    k = tl.multiple_of(tl.load(p_matrix + 1), BLOCK) if IS_GRAM else m
    p_x += tl.load(p_matrix + (5 if IS_GRAM else 6)) * BLOCK
    p_out += tl.load(p_matrix + 6) * BLOCK
    o, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    p_i = p_x + (i + o)[:, None] * k + o_k[None, :]
    p_j = p_x + (j + o)[:, None] * k + o_k[None, :]
    scale = 1.0
    if IS_FIRST and not IS_GRAM:
        scale = _inverse_norm(p_x, m, EPS, BLOCK)
        scale *= scale
    b_s = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_K):
        b_i, b_j = tl.load(p_i + start), tl.load(p_j + start)
        if IS_FIRST and not IS_GRAM:  # before the product, which could leave the range of fp32
            b_i, b_j = (b_i * scale).to(b_i.dtype), (b_j * scale).to(b_j.dtype)
        b_s = tl.dot(b_i, tl.trans(b_j), b_s, input_precision="ieee", out_dtype=tl.float32)
    if not IS_GRAM:
        b_a = tl.load(p_x + (i + o)[:, None] * m + (j + o)[None, :]).to(tl.float32)
        b_s = BETA * scale * b_a + GAMMA * b_s
    b_out = b_s.to(p_out.dtype.element_ty)
    tl.store(p_out + (i + o)[:, None] * m + (j + o)[None, :], b_out)
    if i != j:
        tl.store(p_out + (j + o)[:, None] * m + (i + o)[None, :], tl.trans(b_out))


@jit
def _advance(
    p_b, p_a,  # (m, m) each; A for its trace
    p_x,  # (m, n) each
    p_out,  # as X; or, IS_LAST, as the updates: fp32, times the matrix's factor
    p_factors,  # (matrices,)
    p_matrices, p_tiles,
    ALPHA: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr,
    EPS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """α X + B X."""
    p_tile = p_tiles + tl.program_id(0) * 3
    matrix = tl.load(p_tile)
    p_matrix = p_matrices + matrix * FIELDS
    i, j = tl.load(p_tile + 1) * BLOCK, tl.load(p_tile + 2) * BLOCK
    m, n = tl.multiple_of(tl.load(p_matrix), BLOCK), tl.multiple_of(tl.load(p_matrix + 1), BLOCK)
    o_x, o_a = tl.load(p_matrix + 5) * BLOCK, tl.load(p_matrix + 6) * BLOCK
    o, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    p_x += o_x
    p_i = p_b + o_a + (i + o)[:, None] * m + o_k[None, :]
    p_j = p_x + o_k[:, None] * n + (j + o)[None, :]
    b_s = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, m, BLOCK_K):
        b_s = tl.dot(tl.load(p_i + start), tl.load(p_j + start * n), b_s, input_precision="ieee", out_dtype=tl.float32)
    b_s += ALPHA * tl.load(p_x + (i + o)[:, None] * n + (j + o)[None, :]).to(tl.float32)
    if IS_FIRST:
        b_s *= _inverse_norm(p_a + o_a, m, EPS, BLOCK)
    if IS_LAST:
        b_s *= tl.load(p_factors + matrix)
        rows, columns = tl.load(p_matrix + 2), tl.load(p_matrix + 3) * ALIGN
        p_out += tl.load(p_matrix + 4) * ALIGN
        if rows > columns:
            o_r, o_c = (j + o)[:, None], (i + o)[None, :]
            tl.store(p_out + o_r * columns + o_c, tl.trans(b_s), mask=(o_r < rows) & (o_c < columns))
        else:
            o_r, o_c = (i + o)[:, None], (j + o)[None, :]
            tl.store(p_out + o_r * columns + o_c, b_s, mask=(o_r < rows) & (o_c < columns))
    else:
        tl.store(p_out + o_x + (i + o)[:, None] * n + (j + o)[None, :], b_s.to(p_out.dtype.element_ty))


class _Tables(NamedTuple):
    matrices: Tensor  # (matrices, FIELDS) int64
    factors: Tensor  # (matrices,) fp32
    tiles: Tensor  # (tiles of all X, 3) int32
    symmetric_tiles: Tensor  # (tiles of all A on and above the diagonal, 3) int32
    x_size: int
    a_size: int
    align: int


@functools.lru_cache(maxsize=8)
def _tables(shapes: tuple[tuple[int, int], ...], factors: tuple[float, ...], block: int, device: torch.device) -> _Tables:
    """What the launches of these shapes read, kept on the device for the next step."""
    align = math.gcd(16, *(columns for _, columns in shapes))
    matrices, tiles, symmetric_tiles, g_size, x_size, a_size = [], [], [], 0, 0, 0
    for matrix, (rows, columns) in enumerate(shapes):
        rows_m, rows_n = (-(-size // block) for size in sorted((rows, columns)))
        m, n = rows_m * block, rows_n * block
        matrices.append((m, n, rows, columns // align, g_size // align, x_size // block, a_size // block))
        tiles += [(matrix, i, j) for i in range(rows_m) for j in range(rows_n)]
        symmetric_tiles += [(matrix, i, j) for i in range(rows_m) for j in range(i, rows_m)]
        g_size, x_size, a_size = g_size + rows * columns, x_size + m * n, a_size + m * m
    as_table = lambda rows, dtype: torch.tensor(rows, dtype=dtype).to(device)
    return _Tables(
        as_table(matrices, torch.int64), as_table(factors, torch.float32), as_table(tiles, torch.int32),
        as_table(symmetric_tiles, torch.int32), x_size, a_size, align,
    )  # fmt: skip


def is_fused(update: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels iterate this matrix in this dtype: bf16 on a GPU that has tensor cores for it."""
    return dtype == torch.bfloat16 and update.dtype == torch.float32 and uses_triton(update) and architecture(update) != "sm_75"


@torch.no_grad()
def newton_schulz(
    updates: Sequence[Tensor],  # (rows, columns) each, fp32, of any shapes
    factors: tuple[float, ...],  # one for each
    *,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """factor · `reference.newton_schulz` of each matrix, iterated in bf16: fp32 tensors of the updates' shapes, views of one.

    Runs the Triton kernels, for updates that `is_fused` accepts; 3 · steps + 2 launches.
    Raises ValueError if there is no step to make."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 step is needed")
    shapes = tuple((u.shape[0], u.shape[1]) for u in updates)
    g = torch.cat([u.reshape(-1) for u in updates])
    options = launch_options("newton_schulz", g)
    block = options["BLOCK"]
    t = _tables(shapes, factors, block, g.device)
    x, y = (g.new_empty(t.x_size, dtype=torch.bfloat16) for _ in range(2))
    a, b = (g.new_empty(t.a_size, dtype=torch.bfloat16) for _ in range(2))
    out, (alpha, beta, gamma) = torch.empty_like(g), coefficients
    n_tiles, n_symmetric = len(t.tiles), len(t.symmetric_tiles)
    with torch.cuda.device_of(g):
        _pack[n_tiles,](g, x, t.matrices, t.tiles, ALIGN=t.align, BLOCK=block, num_warps=options["num_warps"])
        for step in range(steps):
            constants = dict(BETA=beta, GAMMA=gamma, EPS=eps, IS_FIRST=step == 0, **options)
            _symmetric[n_symmetric,](x, a, t.matrices, t.symmetric_tiles, IS_GRAM=True, **constants)
            _symmetric[n_symmetric,](a, b, t.matrices, t.symmetric_tiles, IS_GRAM=False, **constants)
            is_last = step == steps - 1
            _advance[n_tiles,](
                b, a, x, out if is_last else y, t.factors, t.matrices, t.tiles,
                ALPHA=alpha, EPS=eps, IS_FIRST=step == 0, IS_LAST=is_last, ALIGN=t.align, **options,
            )  # fmt: skip
            x, y = y, x
    return [o.view(shape) for o, shape in zip(out.split([r * c for r, c in shapes]), shapes, strict=True)]
