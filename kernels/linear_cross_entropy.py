"""Cross-entropy of the head's logits x Wᵀ without ever holding all of them.

The rows of x go through in chunks: logits of one chunk, their softmax, and at once the chunk's part of dx and dW, so that the largest
tensor is (chunk, V) instead of (N, V). With the gradients known in the forward pass, backward only scales them. Arithmetic: 6·N·K·V FLOPs
for forward and backward together, as without chunks. Memory: 2 · chunk · V · itemsize instead of up to 4 · N · V · 4 bytes.

dW accumulates in fp32 whatever the dtype of x: rounding it after each chunk is what makes bf16 training drift (Liger-Kernel #512, #827).
"""

import torch
from torch import Tensor

from .dispatch import autocast

STRATEGIES = ("chunk",)


def chunk_rows(n_rows: int, vocab_size: int, memory_budget_mb: float) -> int:
    """Rows of logits whose fp32 form fits the budget: a multiple of 128 of at least 128."""
    rows = int(memory_budget_mb * 2**20 / (4 * vocab_size)) // 128 * 128
    return max(128, min(rows, n_rows))


@torch.library.custom_op("tritale::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,  # (N, K)
    weight: Tensor,  # (V, K)
    targets: Tensor,  # (N,)
    row_scale: Tensor,  # (N,) fp32: d(loss) / d(loss of the row); 0 where ignored
    label_smoothing: float,
    z_loss: float,
    softcap: float,  # 0: none
    rows: int,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(Σ row_scale · loss, loss of each row, nll, lse, correct, dx, dW); the gradients are those of the first, empty where not needed."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n, vocab_size = x.shape[0], weight.shape[0]
    loss, nll, lse = (x.new_empty(n, dtype=wide) for _ in range(3))
    correct = x.new_empty(n, dtype=torch.bool)
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dw = torch.empty_like(weight, dtype=wide) if needs_dw else x.new_empty(0, dtype=wide)
    if n == 0:
        dw.zero_()
    head = weight.to(x.dtype)
    for start in range(0, n, rows):
        c = slice(start, min(start + rows, n))
        index = targets[c].unsqueeze(1).clamp(min=0)  # an ignored target may be negative; its row_scale is 0
        s = (x[c] @ head.T).to(wide)  # (rows, V)
        if softcap:
            s.div_(softcap).tanh_().mul_(softcap)
            slope = s.div(softcap).square_().neg_().add_(1)  # d tanh = 1 − tanh²
        s_target = s.gather(1, index)
        top, arg = s.max(dim=1, keepdim=True)
        mean = s.mean(1) if label_smoothing else None
        p = s.sub_(top).exp_()  # in place: s is the softmax's numerator from here on
        total = p.sum(dim=1, keepdim=True)
        lse[c] = (top + total.log()).squeeze(1)
        nll[c] = lse[c] - s_target.squeeze(1)
        correct[c] = arg.squeeze(1) == targets[c]
        loss[c] = nll[c] + z_loss * lse[c].square()
        if label_smoothing:
            loss[c] += label_smoothing * (s_target.squeeze(1) - mean)
        if not (needs_dx or needs_dw):
            continue
        # d loss / d s_j = (1 + 2 z lse) p_j − (1 − ε) [j = target] − ε / V, subtracted in fp32 before any rounding.
        scale = row_scale[c].unsqueeze(1)
        p.mul_((1 + 2 * z_loss * lse[c].unsqueeze(1)) / total * scale)
        p.scatter_add_(1, index, (label_smoothing - 1) * scale)
        if label_smoothing:
            p.sub_(label_smoothing / vocab_size * scale)
        if softcap:
            p.mul_(slope)
        d = p.to(x.dtype)
        if needs_dx:
            torch.mm(d, head, out=dx[c])
        if needs_dw and start == 0:  # the first chunk writes, no zero fill
            torch.mm(d.T, x[c], out=dw) if d.dtype == wide else dw.copy_(d.T @ x[c])
        elif needs_dw:
            dw.addmm_(d.T, x[c]) if d.dtype == wide else dw.add_(d.T @ x[c])
    return (loss * row_scale).sum(), loss, nll, lse, correct, dx, dw


@_linear_cross_entropy.register_fake
def _(x, weight, targets, row_scale, label_smoothing, z_loss, softcap, rows, needs_dx, needs_dw):
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.shape[0]
    loss, nll, lse = (x.new_empty(n, dtype=wide) for _ in range(3))
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dw = torch.empty_like(weight, dtype=wide) if needs_dw else x.new_empty(0, dtype=wide)
    return x.new_empty((), dtype=wide), loss, nll, lse, x.new_empty(n, dtype=torch.bool), dx, dw


def _save(ctx, inputs, output):
    x, weight, targets, _, *ctx.options, needs_dx, needs_dw = inputs
    ctx.has_gradients = needs_dx or needs_dw
    ctx.save_for_backward(*(output[5:] if ctx.has_gradients else (x, weight, targets)))
    ctx.dtype = weight.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_sum, grad_loss, *_):
    if ctx.has_gradients:  # of the sum, computed in the forward pass
        dx, dw = (g * grad_sum if g.numel() else None for g in ctx.saved_tensors)
    else:  # of each row (reduction "none"): the logits are made once more
        x, weight, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        *_, dx, dw = _linear_cross_entropy(x, weight, targets, grad_loss, *ctx.options, *needs)
        dx, dw = (g if is_needed else None for g, is_needed in zip((dx, dw), needs, strict=True))
    return dx, None if dw is None else dw.to(ctx.dtype), *(None,) * 8


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(
    x: Tensor,  # (…, K)
    weight: Tensor,  # (V, K)
    targets: Tensor,  # (…) int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,  # (…)
    reduction: str = "mean",
    normalizer: Tensor | None = None,
    return_stats: bool = False,
    strategy: str = "chunk",
    memory_budget_mb: float = 64.0,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Loss of the logits x Wᵀ; the options mean what they mean in `cross_entropy` (`reference.py` holds the formula).

    Products are made in x's dtype (autocast's where it is on), sums in fp32; the weight may be fp32 beside a bf16 x, and its gradient
    then keeps its fp32. `mean` divides by the targets that are not ignored, or by `normalizer`, a tensor on the device: the number of
    targets of the global batch makes gradient accumulation exact. `memory_budget_mb` bounds the fp32 logits held at once.

    Raises ValueError for an unknown strategy or reduction, or widths that differ."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is unknown; choose one of mean, sum, none")
    if x.shape[-1] != weight.shape[-1] or x.shape[:-1] != targets.shape:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: (…, K), (V, K), (…) expected")
    (x,) = autocast(x)
    shape, x, targets = targets.shape, x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    is_valid = targets != ignore_index
    row_scale = is_valid.to(torch.promote_types(x.dtype, torch.float32))
    if reduction == "mean":
        row_scale = row_scale / (is_valid.sum().clamp(min=1) if normalizer is None else normalizer)
    if token_weight is not None:
        row_scale = row_scale * token_weight.reshape(-1)
    rows = chunk_rows(x.shape[0], weight.shape[0], memory_budget_mb)
    is_sum = reduction != "none"
    needs_dx, needs_dw = (is_sum and torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    total, loss, nll, lse, correct, _, _ = _linear_cross_entropy(
        x, weight, targets, row_scale.detach(), label_smoothing, z_loss, softcap or 0.0, rows, needs_dx, needs_dw
    )
    result = total if is_sum else (loss * row_scale).view(shape)
    if not return_stats:
        return result
    stats = {"nll": nll, "lse": lse, "z_loss": z_loss * lse.square(), "correct": correct}
    return result, {name: t.detach().masked_fill(~is_valid, 0).view(shape) for name, t in stats.items()}
