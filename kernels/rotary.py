"""What `rope` and `qk_norm_rope` share: the tables cos and sin, the positions looked up in them, and how a kernel addresses heads."""

import torch
from torch import Tensor

from . import reference
from .dispatch import check_documents, is_readable
from .triton_compat import jit, tl


def rotary_tables(
    context: int, rotary_dim: int, theta: float = 10_000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i / rotary_dim): two (context, rotary_dim / 2), computed in fp64 and rounded to fp32."""
    frequency = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64, device=device), frequency)
    return angle.cos().float(), angle.sin().float()


def check_positions(positions: Tensor, cos: Tensor) -> None:
    """Raise ValueError for a position that cos does not have. Reads the values."""
    if positions.numel():
        low, high = (int(n) for n in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions from {low} to {high}, but cos and sin hold positions 0 to {cos.shape[0] - 1}; make them longer")


def token_positions(n_batch: int, n_tokens: int, cos: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """The positions to look up in cos, None for 0 … T − 1. Raises ValueError if they do not fit; values are checked on the CPU only."""
    if positions is not None and cu_seqlens is not None:
        raise ValueError("positions and cu_seqlens were both given; cu_seqlens already restarts positions, so give one of them")
    if cu_seqlens is not None:
        check_documents(cu_seqlens, n_batch, n_tokens)
        positions = reference.document_positions(cu_seqlens, n_tokens)
    if positions is None:
        if n_tokens > cos.shape[0]:
            raise ValueError(f"{n_tokens} tokens, but cos and sin hold {cos.shape[0]} positions; make them longer")
        return None
    if positions.shape not in ((n_tokens,), (1, n_tokens), (n_batch, n_tokens)):
        raise ValueError(f"positions {tuple(positions.shape)}: ({n_tokens},), (1, {n_tokens}) or ({n_batch}, {n_tokens}) expected")
    if is_readable(positions):
        check_positions(positions, cos)
    return positions.contiguous()


def position_stride(positions: Tensor | None) -> int:
    """The stride between the positions of two sequences of the batch: 0 if all share them, (T,) or (1, T)."""
    return 0 if positions is None or positions.dim() == 1 or positions.shape[0] == 1 else positions.stride(0)


@jit
def row_offsets(o_r, n_tokens, stride_b, stride_t, stride_h, H: tl.constexpr):
    """Offsets of heads o_r of B · T · H in a tensor of these strides."""
    o_h, o_t, o_b = o_r % H, (o_r // H) % n_tokens, o_r // H // n_tokens
    return o_b.to(tl.int64) * stride_b + o_t.to(tl.int64) * stride_t + o_h.to(tl.int64) * stride_h


@jit
def load_cos_sin(p_cos, p_sin, p_positions, o_r, m_r, o_d, n_tokens, stride_p, H: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr):
    """cos and sin of each head's position: two of [BLOCK_R, BLOCK_HALF]."""
    o_t = (o_r // H) % n_tokens
    if p_positions is not None:
        o_t = tl.load(p_positions + (o_r // H // n_tokens) * stride_p + o_t, mask=m_r, other=0)
    o_cs = o_t.to(tl.int64)[:, None] * HALF + o_d[None, :]
    mask = m_r[:, None] & (o_d < HALF)[None, :]
    return tl.load(p_cos + o_cs, mask=mask, other=0.0).to(ACC), tl.load(p_sin + o_cs, mask=mask, other=0.0).to(ACC)
