"""The ops as `nn.Module`s, for models built from parts.

norm, mlp = RMSNorm(512), SwiGLU(512, 1408)
x = x + mlp(norm(x))
"""

import math

import torch
from torch import Tensor, nn

from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .rotary import rotary_tables
from .swiglu import swiglu


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension, with its weight, (width,), which scales by 1 at first. `offset=1` is Gemma's form."""

    def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normed x; with a residual, `add_rms_norm`'s (normed, residual + x)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, offset=self.offset)
        return add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"


class RotaryEmbedding(nn.Module):
    """`rope` with its tables for `context` positions: cos and sin, (context, rotary_dim / 2), fp32, not part of the state dict.

    Raises ValueError for a rotary_dim (head_dim by default) that is odd or larger than the head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context: int, theta: float = 10_000.0, interleaved: bool = False, rotary_dim: int | None = None):
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and at most head_dim ({head_dim})")
        self.interleaved = interleaved
        cos, sin = rotary_tables(context, rotary_dim, theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, **options) -> tuple[Tensor, Tensor]:
        """q: (B, T, H, D), k: (B, T, H_kv, D), rotated; `positions`, `cu_seqlens` and `inplace` are `rope`'s."""
        return rope(q, k, self.cos, self.sin, interleaved=self.interleaved, **options)

    def extra_repr(self) -> str:
        return f"context={self.cos.shape[0]}, rotary_dim={2 * self.cos.shape[1]}, interleaved={self.interleaved}"


class SwiGLU(nn.Module):
    """The feed-forward layer down(silu(gate(x)) · up(x)); gate and up are one product, `gate_up`. No biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class LinearCrossEntropy(nn.Module):
    """The head and its loss, `linear_cross_entropy` with its weight: (vocab, width). `options` are that function's.

    To tie it to an embedding: `loss.weight = embedding.weight`. Raises TypeError for an unknown option."""

    def __init__(self, vocab: int, width: int, **options):
        super().__init__()
        known = linear_cross_entropy.__kwdefaults__ or {}
        if unknown := options.keys() - known.keys():
            raise TypeError(f"linear_cross_entropy has no option {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
        self.options = options
        self.weight: Tensor = nn.Parameter(torch.empty(vocab, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor, targets: Tensor, **options) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x: (…, width), targets: (…); `options` replace those of the module for this call."""
        return linear_cross_entropy(x, self.weight, targets, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([str(n) for n in self.weight.shape] + [f"{k}={v}" for k, v in self.options.items()])
