"""The definition of every op, a few lines of PyTorch each: the specification on one page.

What a fused kernel must compute, in any dtype and on any device, differentiable by autograd. Arithmetic is done in fp32 (in fp64 where
the input is fp64) and the result is rounded once. They also run if Triton does not, and `torch.compile` fuses them
well; `flash_attention` and `linear_cross_entropy` have faster forms of the same definition in their own files.

Tensors of heads are (B, T, H, D), as in flash-attn. With `cu_seqlens` (int32, documents + 1, from 0 to T; a repeated last entry is an
empty document, so the tensor may be padded to a fixed length) the batch is flattened, B = 1, and documents do not see each other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic is done in: fp32, or fp64 if x already is."""
    return x if x.dtype == torch.float64 else x.float()


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]: (…, K) for ids (…) int64 and weight (V, K)."""
    return F.embedding(ids, weight)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · (offset + weight), over the last dimension (arXiv 1910.07467; offset 1 is Gemma's form)."""
    h = _wide(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (_wide(weight) + offset)
    return h.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(rms_norm(r), r) with r = residual + x, in the residual's dtype; the normed tensor has x's dtype."""
    residual = (_wide(residual) + _wide(x)).to(residual.dtype)
    return rms_norm(residual, weight, eps, offset=offset).to(x.dtype), residual


def document_starts(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """The start of the document of each of n_tokens flattened tokens: (T,) int64."""
    index = torch.arange(n_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, index, right=True, out_int32=True) - 1
    return cu_seqlens[document].long()


def document_positions(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """The position of each of n_tokens flattened tokens in its own document: (T,) int64."""
    return torch.arange(n_tokens, device=cu_seqlens.device) - document_starts(cu_seqlens, n_tokens)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    n = 2 * cos.shape[-1]
    h = _wide(x[..., :n])
    a, b = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    h = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((h.to(x.dtype), x[..., n:]), dim=-1) if n < x.shape[-1] else h.to(x.dtype)


def rope(
    q: Tensor, k: Tensor,  # (B, T, H, D), (B, T, H_kv, D)
    cos: Tensor, sin: Tensor,  # (T_max, rotary_dim / 2)
    *, interleaved: bool = False, positions: Tensor | None = None, cu_seqlens: Tensor | None = None, inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotary embedding (arXiv 2104.09864) of the first rotary_dim entries of each head, half-split or interleaved pairs; positions
    count from 0, restart at each document with `cu_seqlens`, or are given. `inplace` overwrites q and k if no gradient needs them."""
    if positions is None and cu_seqlens is not None:
        positions = document_positions(cu_seqlens, q.shape[1])
    index = slice(0, q.shape[1]) if positions is None else positions
    cos, sin = (_wide(t)[index].unsqueeze(-2) for t in (cos, sin))  # (T, 1, rotary_dim / 2) or (B, T, 1, …)
    q_out, k_out = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    return (q.copy_(q_out), k.copy_(k_out)) if inplace else (q_out, k_out)


def qk_norm_rope(
    qkv: Tensor,  # (B, T, (H + 2 H_kv) D)
    q_weight: Tensor, k_weight: Tensor,  # (D,)
    cos: Tensor, sin: Tensor, *, n_head: int, n_kv_head: int, eps: float = 1e-6, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Split packed q, k, v; RMSNorm over each head of q and k (as in Qwen3), then RoPE. v is a view of qkv."""
    q, k, v = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).split((n_head, n_kv_head, n_kv_head), dim=-2)
    q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return *rope(q, k, cos, sin, positions=positions, cu_seqlens=cu_seqlens), v


def swiglu(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202), of a packed (…, 2 N) [gate | up] or of two tensors (…, N)."""
    gate, up = gate_up.chunk(2, dim=-1) if up is None else (gate_up, up)
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def geglu(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    """gelu(gate) · up with the tanh form of gelu, packed or separate as `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1) if up is None else (gate_up, up)
    return (F.gelu(_wide(gate), approximate="tanh") * _wide(up)).to(gate.dtype)


def mean_divisor(is_valid: Tensor, normalizer: Tensor | None) -> Tensor:
    """What `mean` divides by: the number of targets that are not ignored, or `normalizer`; 1 if none is left, since 0 / 0 is NaN."""
    return is_valid.sum().clamp(min=1) if normalizer is None else torch.where(is_valid.any(), normalizer, 1)


def cross_entropy(
    logits: Tensor, targets: Tensor,  # (…, V), (…) int
    *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    token_weight: Tensor | None = None,  # (…)
    reduction: str = "mean", normalizer: Tensor | None = None, inplace_backward: bool = False, return_stats: bool = False,
) -> Any:  # the loss, or (loss, statistics) with return_stats  # fmt: skip
    """Cross-entropy with label smoothing ε, z-loss and soft cap, from the logits s after the cap c·tanh(s/c):

        loss = token_weight · ((1 − ε)(lse − s_target) + ε (lse − mean(s)) + z_loss · lse²),   lse = log Σ exp(s)

    `mean` divides by the number of targets that are not ignored, or by `normalizer` (a device tensor); with none left the loss and its
    gradients are 0. With `return_stats` also {nll, lse, z_loss, correct}, each shaped as targets, 0 if ignored. `inplace_backward`
    allows a kernel to write the gradient over the logits; here it changes nothing.
    """
    is_valid = targets != ignore_index
    s = _wide(logits).masked_fill(~is_valid.unsqueeze(-1), 0.0)  # an ignored row may hold anything, and NaN · 0 is NaN
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    index = torch.where(is_valid, targets, 0).long()
    top = s.detach().amax(-1, keepdim=True)
    s = s - top  # so that a large offset common to a row does not cost precision
    log_total = torch.logsumexp(s, dim=-1)
    lse = top.squeeze(-1) + log_total
    nll = log_total - s.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_total - s.mean(-1))
    penalty = z_loss * lse.square() if z_loss else torch.zeros_like(lse)  # 0 · inf is NaN
    loss = loss + penalty
    if token_weight is not None:
        loss = loss * token_weight
    loss = torch.where(is_valid, loss, 0.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / mean_divisor(is_valid, normalizer)
    if not return_stats:
        return loss
    stats = {
        "nll": torch.where(is_valid, nll, 0.0).detach(),
        "lse": torch.where(is_valid, lse, 0.0).detach(),
        "z_loss": torch.where(is_valid, penalty, 0.0).detach(),
        "correct": is_valid & (s.argmax(-1) == targets),
    }
    return loss, stats


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, **options) -> Any:
    """cross_entropy of the logits x weightᵀ, x: (…, K), weight: (V, K). The product is made in x's dtype."""
    return cross_entropy(x @ weight.to(x.dtype).T, targets, **options)


def newton_schulz(g: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ of g (…, rows, columns) by the quintic Newton–Schulz iteration in g's dtype, for Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/). With its coefficients singular values converge to 0.7 … 1.2."""
    a, b, c = coefficients
    is_tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if is_tall else g).reshape(-1, min(g.shape[-2:]), max(g.shape[-2:]))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram², rounded once
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return (x.mT if is_tall else x).reshape(g.shape)


def attention_mask(n_query: int, n_key: int, *, is_causal: bool, window: int | None, cu_seqlens: Tensor | None, device) -> Tensor | None:
    """(T, S) bool, True where a query sees a key; causal is aligned to the end if T ≠ S. None if all queries see all keys."""
    if not is_causal and window is None and cu_seqlens is None:
        return None
    query = torch.arange(n_query, device=device)[:, None] + n_key - n_query
    key = torch.arange(n_key, device=device)[None, :]
    mask = key <= query if is_causal else torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (key > query - window)
    if cu_seqlens is not None:
        start = document_starts(cu_seqlens, n_key)
        mask = mask & (start[:, None] == start[None, :])
    return mask


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor,  # (B, T, H, D) and twice (B, S, H_kv, D)
    *, is_causal: bool = True, window: int | None = None, softcap: float | None = None, scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ) v for grouped heads; `window=w` lets a query see itself and the w − 1 keys before it; `softcap=c` is
    c·tanh(s/c) on the scaled scores; scale is 1/√D by default; a query that sees no key gives 0."""
    unit: float = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    s = torch.einsum("bthd,bshd->bhts", _wide(q), _wide(k)) * unit
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    mask = attention_mask(q.shape[1], k.shape[1], is_causal=is_causal, window=window, cu_seqlens=cu_seqlens, device=q.device)
    if mask is None:
        p = s.softmax(-1)
    else:
        lowest = torch.finfo(s.dtype).min  # not −inf, with which a row without keys would be NaN
        p = s.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhts,bshd->bthd", p, _wide(v)).to(q.dtype)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor,  # (B, H, D) and twice (B, H_kv, D)
    keys: Tensor, values: Tensor,  # (rows, S, H_kv, D), the cache: sequence b has row b
    positions: Tensor,  # (B,) int
    *, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Writes k, v into the cache at `positions` and returns the attention of q to the entries up to there, the last `window` of them.
    Entries past a position may be anything."""
    n, group = len(q), q.shape[1] // k.shape[1]
    index = torch.arange(n, device=q.device)
    keys[index, positions], values[index, positions] = k, v
    distance = positions[:, None] - torch.arange(keys.shape[1], device=q.device)  # (B, S)
    is_seen = (distance >= 0) & (distance < (window or keys.shape[1]))
    k, v = (t[:n].masked_fill(~is_seen[:, :, None, None], 0.0).repeat_interleave(group, dim=2) for t in (keys, values))  # (B, S, H, D)
    s = torch.einsum("bhd,bshd->bhs", _wide(q), _wide(k)) * q.shape[-1] ** -0.5
    p = s.masked_fill(~is_seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhs,bshd->bhd", p, _wide(v)).to(q.dtype)


COLDEST = 1e-30  # at this temperature the most likely token has probability 1; below it the quotient overflows


def sample(logits: Tensor, random: Tensor, settings: Tensor, seen: Tensor) -> Tensor:
    """The next token of each row of logits (B, V), (B,) int64, −1 where a logit is not finite. `settings` (B, 5) are temperature, top-k,
    top-p, min-p and repetition penalty, applied in the order of `transformers`; `seen` (B, V) bool are the tokens that the penalty applies
    to. The token is the inverse of the cumulative distribution at `random` / 2⁶³, in descending order, or without a filter in that of ids.
    Tokens as likely as the last that top-k or top-p keeps are kept."""
    temperature, top_k, top_p, min_p, penalty = settings.split(1, dim=-1)  # (B, 1)
    s, n_token = logits.float(), logits.shape[1]
    s = torch.where(seen, torch.where(s < 0, s * penalty, s / penalty), s)
    is_greedy = (temperature == 0) | (top_p == 0)
    s = s / torch.where(is_greedy, 1.0, temperature.clamp(min=COLDEST))
    ordered, ids = s.sort(descending=True, stable=True)
    is_kept = ordered >= ordered.gather(-1, top_k.clamp(1, n_token).long() - 1)
    p = ordered.masked_fill(~is_kept, -torch.inf).double().softmax(-1)
    n_kept = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True)  # a token is kept if the more likely ones do not reach top_p
    is_kept &= (ordered >= ordered.gather(-1, n_kept.clamp(min=1) - 1)) & (p >= min_p * p[:, :1])
    p = p * is_kept
    is_filtered = (top_k < n_token) | (top_p < 1) | (min_p > 0)
    p = torch.where(is_filtered, p, torch.zeros_like(p).scatter(-1, ids, p))
    order = torch.where(is_filtered, ids, torch.arange(n_token, device=ids.device))
    total = p.cumsum(-1)
    index = (total <= random[:, None].double() / 2**63 * total[:, -1:]).sum(-1, keepdim=True).clamp(max=n_token - 1)
    token = torch.where(is_greedy, ids[:, :1], order.gather(-1, index))
    return torch.where(s.isfinite().all(-1), token[:, 0], -1)
