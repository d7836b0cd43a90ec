"""Fused ops for training GPTs, each a plain function on tensors; `reference` holds their definitions.

from tritale.kernels import rms_norm
y = rms_norm(x, weight)
"""

if __name__ == "kernels":
    # transformers imports a package of this name if one is on sys.path, as this folder is when the repository's root is. A second import of
    # the ops would register them twice, so under this name the package is empty.
    __all__ = []
else:
    from .cross_entropy import cross_entropy
    from .decode_attention import decode_attention
    from .dispatch import backend
    from .embedding import embedding
    from .flash_attention import attention_backend, flash_attention
    from .hugging_face import patch_transformers, unpatch
    from .linear_cross_entropy import linear_cross_entropy, token_log_probs
    from .modules import LinearCrossEntropy, RMSNorm, RotaryEmbedding, SwiGLU
    from .qk_norm_rope import qk_norm_rope
    from .reference import document_positions
    from .rms_norm import add_rms_norm, rms_norm
    from .rope import rope
    from .rotary import rotary_tables
    from .sample import sample
    from .swiglu import geglu, swiglu

    __all__ = [
        "LinearCrossEntropy",
        "RMSNorm",
        "RotaryEmbedding",
        "SwiGLU",
        "add_rms_norm",
        "attention_backend",
        "backend",
        "cross_entropy",
        "decode_attention",
        "document_positions",
        "embedding",
        "flash_attention",
        "geglu",
        "linear_cross_entropy",
        "patch_transformers",
        "qk_norm_rope",
        "rms_norm",
        "rope",
        "rotary_tables",
        "sample",
        "swiglu",
        "token_log_probs",
        "unpatch",
    ]
