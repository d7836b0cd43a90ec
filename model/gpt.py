"""The model: a pre-norm GPT that Hugging Face's Mistral (without QK-norm) or Qwen3 (with QK-norm) can represent.

RMSNorm, rotary positions, grouped-query attention with a head size independent of the width, SwiGLU, tied or untied embeddings. Every
op that is not a matrix product comes from `tritale.kernels`. q, k, v and gate, up are packed into one matrix each; `checkpoint.py` splits
them on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..kernels import (
    add_rms_norm,
    decode_attention,
    document_positions,
    embedding,
    flash_attention,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    rope,
    swiglu,
)
from ..kernels.rotary import rotary_tables


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. n_head · head_dim need not equal width."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    width: int
    mlp_width: int
    context: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = True
    window: int | None = None
    init_std: float = 0.02

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" or f.type is int:
                if value < 1:
                    raise UserError(f"model.{f.name} is {value}; it must be at least 1")
        if self.n_head % self.n_kv_head:
            divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise UserError(f"model.n_kv_head ({self.n_kv_head}) must divide model.n_head ({self.n_head}); try one of {divisors}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary positions need an even size, try {self.head_dim + 1}")
        if self.window is not None and self.window < 1:
            raise UserError(f"model.window is {self.window}; it must be at least 1, or null for no window")

    @classmethod
    def preset(cls, name: str, **changes) -> "GPTConfig":
        """A named shape with some fields changed. Raises UserError if the name is unknown."""
        if name not in PRESETS:
            raise UserError(f"model.preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)

    @property
    def projections(self) -> dict[str, dict[str, tuple[int, int]]]:
        """{matrix of a block: {projection that is packed in it, by Hugging Face's name: its shape}}, in the order of their rows."""
        heads, kv_heads = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        return {
            "qkv": {f"self_attn.{x}_proj": (n, self.width) for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))},
            "attention_out": {"self_attn.o_proj": (self.width, heads)},
            "gate_up": {f"mlp.{x}_proj": (self.mlp_width, self.width) for x in ("gate", "up")},
            "mlp_out": {"mlp.down_proj": (self.width, self.mlp_width)},
        }

    @property
    def n_matrix(self) -> int:
        """Parameters in matrix products: all matrices and the head, also if it is tied to the embedding."""
        heads = (2 * self.n_head + 2 * self.n_kv_head) * self.head_dim
        return self.n_layer * self.width * (heads + 3 * self.mlp_width) + self.vocab_size * self.width

    def flops_per_token(self, length: float) -> float:
        """FLOPs of forward and backward for one token of a document of `length` tokens: 6 per matrix parameter, and in attention
        12 · layers · heads · head_dim per key; a token has half its document as keys on average."""
        return 6 * self.n_matrix + 6 * self.n_layer * self.n_head * self.head_dim * min(length, self.window or length)


PRESETS = {
    # For tests: trains in seconds, also through the interpreted kernels.
    "tiny": GPTConfig(512, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, width=48, mlp_width=64, context=64),
    # Trains on the built-in stories in five minutes on two CPU cores.
    "quickstart": GPTConfig(4096, n_layer=4, n_head=4, n_kv_head=4, head_dim=32, width=128, mlp_width=384, context=256, qk_norm=True),
    # The blog series' model: 43.9 M parameters, 76 % of them in the embedding.
    "microstories-44m": GPTConfig(65_024, n_layer=6, n_head=6, n_kv_head=6, head_dim=48, width=512, mlp_width=768, context=512),
}


@dataclass
class CachedTokens:
    """The KV cache, with a row for each sequence, and the places in it of the tokens of one pass, flattened to (1, n).

    The tokens are either the beginnings of several sequences, concatenated (`rows` has their rows, `cu_seqlens` their bounds), or one token
    of each of the rows 0, 1, …, n − 1, which attends to the cached tokens of its row."""

    cache: Tensor  # (n_layer, 2, slots, capacity, H_kv, D): keys, values
    positions: Tensor  # (n,) int64
    rows: Tensor | None = None  # (n,) int64
    cu_seqlens: Tensor | None = None  # (sequences + 1,) int32

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Store k, v (1, n, H_kv, D) and return the attention of q (1, n, H, D): (1, n, H, D)."""
        keys, values = self.cache[layer]
        if self.rows is None:
            return decode_attention(q[0], k[0], v[0], keys, values, self.positions, window=window)[None]
        keys[self.rows, self.positions], values[self.rows, self.positions] = k[0], v[0]
        return flash_attention(q, k, v, window=window, cu_seqlens=self.cu_seqlens)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        c = config
        self.attention_norm = nn.Parameter(torch.ones(c.width))
        self.qkv = nn.Linear(c.width, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=False)
        self.attention_out = nn.Linear(c.n_head * c.head_dim, c.width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(c.width))
        self.gate_up = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
        self.mlp_out = nn.Linear(c.mlp_width, c.width, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.Parameter(torch.ones(c.head_dim)), nn.Parameter(torch.ones(c.head_dim))

    def forward(
        self,
        x: Tensor,  # (B, T, width), the residual stream
        delta: Tensor | None,  # (B, T, width), output of the previous layer, not yet added
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: CachedTokens | None,
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        if delta is None:
            h = rms_norm(x, self.attention_norm, c.norm_eps)
        else:
            h, x = add_rms_norm(delta, x, self.attention_norm, c.norm_eps)

        qkv = self.qkv(h)  # (B, T, (H + 2 H_kv) D)
        if c.qk_norm:
            q, k, v = qk_norm_rope(
                qkv, self.q_norm, self.k_norm, cos, sin, n_head=c.n_head, n_kv_head=c.n_kv_head, eps=c.norm_eps, positions=positions
            )
        else:
            q, k, v = qkv.unflatten(-1, (-1, c.head_dim)).split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
            q, k = rope(q, k, cos, sin, positions=positions)
        if cache is not None:
            a = cache.attend(self.layer, q, k, v, c.window)
        else:
            a = flash_attention(q, k, v, window=c.window, cu_seqlens=cu_seqlens)  # (B, T, H, D)
        attended: Tensor = self.attention_out(a.flatten(-2))

        h, x = add_rms_norm(attended, x, self.mlp_norm, c.norm_eps)
        return x, self.mlp_out(swiglu(self.gate_up(h)))


class GPT(nn.Module):
    """A GPT with random weights: normal with `init_std`, the outputs of the MLPs scaled by 1 / √(2 · n_layer) so that the variance of the
    residual stream does not grow with depth (GPT-2).

    Attention starts as a copy operation, as in mimetic initialization (arXiv 2305.09828): query and key matrices are equal, so a token
    attends to similar tokens, and each head's output matrix is its transposed value matrix, so it writes what it reads. Small models learn
    much sooner to keep names through a story (docs/log.md)."""

    blocks: Sequence[Block]  # a ModuleList, which has no type for its elements
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))  # pyright: ignore[reportAttributeAccessIssue]
        self.norm = nn.Parameter(torch.ones(config.width))
        self.head = self.embedding if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.width))
        cos, sin = rotary_tables(config.context, config.head_dim, config.rope_theta)
        self.adapters: dict | None = None  # of `lora.add_adapters`: rank, alpha and targets, as PEFT names them
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, std = self.config, self.config.init_std
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=std / (2 * c.n_layer) ** 0.5 if name.endswith("mlp_out.weight") else std)
        group = c.n_head // c.n_kv_head
        for block in self.blocks:
            q, k, v = block.qkv.weight.split([n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
            per_head = lambda x: x.unflatten(0, (c.n_kv_head, -1)).repeat_interleave(group, 0).flatten(0, 1)
            q.copy_(per_head(k))
            nn.init.orthogonal_(v)
            block.attention_out.weight.copy_(per_head(v).T * (1 / group / (2 * c.n_layer) ** 0.5))
            v.mul_(std * max(v.shape) ** 0.5)

    def forward(
        self,
        tokens: Tensor,  # (B, T) int
        targets: Tensor | None = None,  # (B, T) int, −100: ignored
        *,
        cu_seqlens: Tensor | None = None,  # (documents + 1,) int32; B = 1
        cache: CachedTokens | None = None,
        last: Tensor | None = None,  # (N,) int, with a cache
        **loss_options,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, T, V). With `targets` the loss of `linear_cross_entropy` (and its `loss_options`), which never holds all logits.
        With `cu_seqlens` attention does not cross documents and positions restart. With a `cache`, which gives the places of the tokens
        (1, T), the logits of the tokens `last`: (1, N, V), by default of all.

        Raises UserError if a sequence is longer than the context. With `cu_seqlens` or a `cache` the caller checks this."""
        n = tokens.shape[1]
        if cu_seqlens is None and cache is None and n > self.config.context:
            raise UserError(f"{n} tokens are more than the model's context of {self.config.context}; shorten them")
        if cache is not None:
            positions = cache.positions
        else:
            positions = document_positions(cu_seqlens, n) if cu_seqlens is not None else None
        x, delta = embedding(tokens, self.embedding), None
        for block in self.blocks:
            x, delta = block(x, delta, self.cos, self.sin, positions, cu_seqlens, cache)
        assert delta is not None
        if last is not None and not len(last):
            return x.new_empty(1, 0, self.config.vocab_size)
        if last is not None:
            x, delta = x[:, last], delta[:, last]
        h, _ = add_rms_norm(delta, x, self.norm, self.config.norm_eps)
        if targets is None:
            return F.linear(h, self.head)
        return linear_cross_entropy(h, self.head, targets, **loss_options)
