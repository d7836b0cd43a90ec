"""Fused ops for training GPTs, each a plain function on tensors; `reference` holds their definitions.

    from tritale.kernels import rms_norm
    y = rms_norm(x, weight)
"""

from .cross_entropy import cross_entropy
from .dispatch import backend
from .flash_attention import flash_attention
from .linear_cross_entropy import linear_cross_entropy
from .qk_norm_rope import qk_norm_rope
from .reference import document_positions
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import geglu, swiglu

__all__ = [
    "add_rms_norm",
    "backend",
    "cross_entropy",
    "document_positions",
    "flash_attention",
    "geglu",
    "linear_cross_entropy",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "swiglu",
]
