"""Cross-entropy of the head's logits x Wᵀ, which are never all in memory: x (N, K), W (V, K).

`strategy="chunk"`: for one chunk of rows after another, the logits, their gradient d (see `cross_entropy`) written over them, and the
chunk's part of dx = d W and dW = dᵀ x, so that the largest tensor is (chunk, V) instead of (N, V). The forward pass computes the gradients,
and backward scales them: 6 · N · K · V FLOPs together, as without chunks. Memory beyond the inputs and outputs: chunk · V · itemsize. The
logits are written, read twice, overwritten and read by two products, W is read twice per chunk and dW read and written once per chunk (the
first only writes), so larger chunks are faster.

`strategy="recompute"`: no logits in memory, only tiles in registers (as Apple's cut-cross-entropy, arXiv 2411.09009). The forward kernel
stores five numbers per row and slice of the vocabulary. Backward computes each tile twice, since dx sums over the rows of W, dW over the
rows of x, and no program adds to another's sums (no atomics, the same bits in every run): 10 · N · K · V FLOPs.

dW accumulates in fp32 whatever the dtype of x: rounding it after each chunk is what makes bf16 training drift (Liger-Kernel #512, #827).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd  # pyright: ignore[reportAttributeAccessIssue]

from . import cpu, reference
from .common import LOG2E, accumulator, contiguous_like, no_second_derivative, refuse_transforms, tanh, unit_stride, wide_dtype
from .cross_entropy import (
    check_options,
    empty_rows,
    launch_cross_entropy,
    log_sum_exp,
    logits_gradient,
    row_loss,
    signed_targets,
    statistics,
)
from .dispatch import autocast, is_readable, uses_triton
from .launch import architecture, cdiv, launch_options, power_of_two, sm_count
from .triton_compat import jit, tl

STRATEGIES = ("chunk", "recompute")
BUDGET_MB = 256.0  # of logits, by default; larger chunks read and write dW less often
BLOCK = 2**20  # logits that are in a CPU's cache at a time
ENTRIES = 8192  # of the vocabulary, whose part of dW is in a CPU's cache at a time
IGNORED = -(2**31)  # the ignored targets inside the ops, for any ignore_index


def chunk_rows(n_rows: int, vocab_size: int, memory_budget_mb: float, itemsize: int = 4) -> int:
    """Rows of logits that fit the budget: a multiple of 128 of at least 128, and chunks of about equal size."""
    most = max(1, int(memory_budget_mb * 2**20 / (itemsize * vocab_size)) // 128)
    blocks = max(1, -(-n_rows // 128))
    n_chunks = -(-blocks // most)
    return 128 * -(-blocks // n_chunks)


# The step of a chunk: logits → the results of its rows, and the gradient in place of the logits.


def _torch_step(logits, targets, row_scale, results, *options):
    label_smoothing, z_loss, softcap, needs_gradient, with_correct = options
    if not softcap and cpu.can_run(logits):
        loss, nll, lse, correct = results
        rows = (loss, nll, lse, torch.empty_like(lse))  # lse holds the maximum until the logarithm of the sum is added
        cpu.cross_entropy(
            logits, targets, rows, correct if with_correct else None, gradient=logits if needs_gradient else None, scale=row_scale,
            ignore_index=IGNORED, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
        lse += rows[3]
        return logits
    # On a CPU a few rows at a time, so that the passes over them read the cache and not the memory.
    n, block = logits.shape[0], max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]
    wide = results[0].dtype
    buffer = None if wide == logits.dtype else logits.new_empty(min(block, n), logits.shape[1], dtype=wide)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        s = logits[rows] if buffer is None else buffer[: rows.stop - start].copy_(logits[rows])
        _torch_rows(s, targets[rows], row_scale[rows], [result[rows] for result in results], *options)
        if buffer is not None:
            logits[rows] = s
    return logits


def _cap(s: Tensor, softcap: float) -> Tensor | None:
    """Caps s in place, and returns the derivative, None without a cap."""
    if not softcap:
        return None
    s.div_(softcap).tanh_().mul_(softcap)
    return s.div(softcap).square_().neg_().add_(1)  # d tanh = 1 − tanh²


def _torch_rows(s, targets, row_scale, results, label_smoothing, z_loss, softcap, needs_gradient, with_correct):
    loss, nll, lse, correct = results
    vocab_size, is_ignored = s.shape[1], targets == IGNORED
    index = targets.masked_fill(is_ignored, 0).long().unsqueeze(1)
    slope = _cap(s, softcap)
    if with_correct:
        top, arg = s.max(dim=1, keepdim=True)
        correct.copy_(arg.squeeze(1) == targets)
    else:  # the index costs three times the maximum
        top = s.amax(dim=1, keepdim=True)
    s.sub_(top)  # so that an offset common to a row costs no digits
    s_target = s.gather(1, index).squeeze(1)
    mean = s.mean(1) if label_smoothing else 0.0
    p = s.exp_()  # in place: s is the softmax's numerator from here on
    total = p.sum(dim=1, keepdim=True)
    log_total = total.log()
    lse.copy_((top + log_total).squeeze(1))
    nll.copy_(log_total.squeeze(1) - s_target)
    loss.copy_(nll)
    if z_loss:  # 0 · inf is NaN
        loss += z_loss * lse.square()
    if label_smoothing:
        loss += label_smoothing * (s_target - mean)
    if needs_gradient:
        # d loss / d s_j = (1 + 2 z lse) p_j − (1 − ε) [j = target] − ε / V, subtracted in fp32 before any rounding.
        scale = row_scale.unsqueeze(1)
        p.mul_((1 + 2 * z_loss * lse.unsqueeze(1) if z_loss else 1) / total * scale)
        p.scatter_add_(1, index, (label_smoothing - 1) * scale)
        if label_smoothing:
            p.sub_(label_smoothing / vocab_size * scale)
        if slope is not None:
            p.mul_(slope)
    for row in (loss, nll, lse):
        row.masked_fill_(is_ignored, 0)
    return top, total


def _filtered_step(logits, targets, row_scale, results, z_loss, softcap, with_correct, filter_eps):
    """(d, entries): the gradient of the logits of those entries that some row gives more than filter_eps, and of the targets."""
    block = max(1, BLOCK // logits.shape[1])
    is_kept, shifts, totals = logits.new_zeros(logits.shape[1], dtype=torch.bool), [], []
    is_ignored = targets == IGNORED
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        p = logits[rows].to(results[0].dtype, copy=True)  # becomes the numerators of the softmax
        mine = [result[rows] for result in results]
        top, total = _torch_rows(p, targets[rows], None, mine, 0.0, z_loss, softcap, False, with_correct)
        is_small = (p <= filter_eps * total) | is_ignored[rows].unsqueeze(1)  # false for NaN, which is not lost
        is_kept |= ~is_small.all(0)
        shifts.append(top)
        totals.append(total)
    index = targets.masked_fill(is_ignored, 0).long()
    is_kept[index] = True
    entries = is_kept.nonzero().squeeze(1)
    d = logits.index_select(1, entries).to(results[0].dtype)
    slope = _cap(d, softcap)
    scale = row_scale.unsqueeze(1)
    factor = scale * (1 + 2 * z_loss * results[2].unsqueeze(1) if z_loss else 1)
    d.sub_(torch.cat(shifts)).exp_().mul_(factor / torch.cat(totals))
    d.scatter_add_(1, torch.searchsorted(entries, index).unsqueeze(1), -scale)
    if slope is not None:
        d.mul_(slope)
    return d.to(logits.dtype), entries


def _triton_step(logits, targets, row_scale, results, label_smoothing, z_loss, softcap, needs_gradient, with_correct):
    loss, nll, lse, correct = results
    rows = (loss, nll, lse, torch.empty_like(lse), correct)  # lse holds the maximum until the logarithm of the sum is added
    launch_cross_entropy(
        logits, targets, rows, with_loss=True, gradient=logits if needs_gradient else None, scale=row_scale,
        ignore_index=IGNORED, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip
    lse += rows[3]
    return logits


def _add_product(dw: Tensor, d: Tensor, x: Tensor, is_first: bool) -> None:
    """dw += dᵀ x, summed in dw's dtype; the first product writes, so dw needs no zero fill."""
    if d.dtype == dw.dtype:
        torch.mm(d.T, x, out=dw) if is_first else dw.addmm_(d.T, x)
    elif d.is_cuda and not torch.version.hip:  # the product is written in fp32, without a (V, K) temporary
        if is_first:
            torch.mm(d.T, x, out_dtype=dw.dtype, out=dw)
        else:
            torch.addmm(dw, d.T, x, out_dtype=dw.dtype, out=dw)
    else:  # some entries of the vocabulary at a time, so that adding their product reads it from a CPU's cache
        for entries in (slice(i, i + ENTRIES) for i in range(0, d.shape[1], ENTRIES)):
            part = d[:, entries].T.float() @ x.float() if d.dtype == torch.float16 else d[:, entries].T @ x  # a sum of fp16 may overflow
            dw[entries].copy_(part) if is_first else dw[entries].add_(part)


def _empty_results(
    x: Tensor, weight: Tensor, needs_dx: bool, needs_dw: bool, rows: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, nll, lse, _, correct = empty_rows(x, x.shape[0])
    dx = contiguous_like(x) if needs_dx else x.new_empty(0)
    # One product on a CPU needs no sum in fp32.
    is_whole = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16 and x.shape[0] <= rows
    dtype = weight.dtype if is_whole else loss.dtype
    dw = contiguous_like(weight, dtype) if needs_dw else x.new_empty(0, dtype=dtype)
    return loss, nll, lse, correct, dx, dw


def _unit(row_scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the gradients of an fp16 op are divided by while they are fp16, so that the largest entry of d is 16; None for other dtypes.

    A row's scale is 1 / tokens of a step, which fp16 cannot hold times a probability; the loss scale that lifts it comes in backward."""
    if dtype != torch.float16:
        return None
    largest = row_scale.abs().amax() if row_scale.numel() else row_scale.new_ones(())
    return torch.where(largest > 0, largest, 1) / 16


def _chunked(step, x, weight, targets, row_scale, label_smoothing, z_loss, softcap, rows, needs_dx, needs_dw, with_correct, filter_eps):
    loss, nll, lse, correct, dx, dw = _empty_results(x, weight, needs_dx, needs_dw, rows if step is _torch_step else 0)
    n, needs_gradient = x.shape[0], needs_dx or needs_dw
    if n == 0 or filter_eps:
        dw.zero_()
    unit = _unit(row_scale, x.dtype)
    scale = row_scale.contiguous() if unit is None else row_scale / unit  # contiguous: an incoming gradient may be expanded
    head, targets = weight.to(x.dtype), targets.contiguous()
    buffer = x.new_empty(min(rows, n), weight.shape[0]) if step is _triton_step else None  # the gradient takes the logits' place
    for start in range(0, n, rows):
        c = slice(start, min(start + rows, n))
        logits = x[c] @ head.T if buffer is None else torch.mm(x[c], head.T, out=buffer[: c.stop - start])
        results = [t[c] for t in (loss, nll, lse, correct)]
        if filter_eps and needs_gradient:
            d, entries = _filtered_step(logits, targets[c], scale[c], results, z_loss, softcap, with_correct, filter_eps)
            if needs_dx:
                torch.mm(d, head[entries], out=dx[c])
            if needs_dw:
                part = d.new_empty(len(entries), x.shape[1], dtype=dw.dtype)
                _add_product(part, d, x[c], is_first=True)
                dw.index_add_(0, entries, part)
            continue
        d = step(logits, targets[c], scale[c], results, label_smoothing, z_loss, softcap, needs_gradient, with_correct)
        if needs_dx:
            torch.mm(d, head, out=dx[c])
        if needs_dw:
            _add_product(dw, d, x[c], start == 0)
        del logits, d
    return (loss * row_scale).sum(), loss, nll, lse, correct, dx, dw


def _times(g: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """g · factor in dtype, rounded once."""
    if factor is None:
        return g.to(dtype)
    factor = factor.detach()
    is_eager_cpu = g.device.type == "cpu" and not torch.compiler.is_compiling()
    # As of loss.backward(). A kept graph multiplies again, so its dW must not become a gradient that a user may overwrite.
    if is_eager_cpu and is_readable(factor) and factor.item() == 1 and not _autograd._get_current_graph_task_keep_graph():
        return g.to(dtype)
    if is_eager_cpu and dtype == torch.bfloat16:
        return g.mul(factor).to(dtype)  # factor is not rounded; with `out` of another dtype both would be converted first
    return torch.mul(g, factor.reshape(1), out=torch.empty_like(g, dtype=dtype))  # of one dimension, or it would be rounded to g's dtype


class _Once(torch.autograd.Function):
    """The gradient itself, refusing to be differentiated; `like` is any tensor with a graph."""

    @staticmethod
    def forward(ctx, gradient, like):
        return gradient.view_as(gradient)

    backward = staticmethod(no_second_derivative("linear_cross_entropy"))


def _chunked_op(name: str, step: Callable) -> Callable:
    """The custom op of the chunked loss with one of the steps."""

    @torch.library.custom_op(name, mutates_args=())
    def op(
        x: Tensor,  # (N, K)
        weight: Tensor,  # (V, K)
        targets: Tensor,  # (N,), IGNORED where ignored
        row_scale: Tensor,  # (N,) fp32: d(loss) / d(loss of the row); 0 where ignored
        label_smoothing: float, z_loss: float,
        softcap: float,  # 0: none
        rows: int, needs_dx: bool, needs_dw: bool,
        with_correct: bool = True,  # a CPU leaves it uninitialised if not
        filter_eps: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(Σ row_scale · loss, loss of each row, nll, lse, correct, dx, dW); the gradients are the first's, over `_unit`, or empty."""
        return _chunked(
            step, x, weight, targets, row_scale, label_smoothing, z_loss, softcap, rows, needs_dx, needs_dw, with_correct, filter_eps
        )

    @op.register_fake
    def _(x, weight, targets, row_scale, label_smoothing, z_loss, softcap, rows, needs_dx, needs_dw, with_correct=True, filter_eps=0.0):
        *results, dx, dw = _empty_results(x, weight, needs_dx, needs_dw, rows if step is _torch_step else 0)
        return results[0].new_empty(()), *results, dx, dw

    def save(ctx, inputs, output):
        x, weight, targets, row_scale, *ctx.options, needs_dx, needs_dw, _, ctx.filter_eps = inputs
        ctx.has_gradients = needs_dx or needs_dw
        ctx.save_for_backward(*((output[1], *output[5:], row_scale) if ctx.has_gradients else (x, weight, targets)))
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_sum, grad_loss, *_):
        if (grad_sum if ctx.has_gradients else grad_loss) is None:
            return (None,) * 12
        d_scale = None
        needs_dx, needs_dw, _, needs_d_scale, *_ = ctx.needs_input_grad
        if ctx.has_gradients:  # of the sum, computed in the forward pass
            loss, dx, dw, row_scale = ctx.saved_tensors
            factor, d_scale = grad_sum, loss * grad_sum if needs_d_scale else None
        else:  # of each row (reduction "none", strategy "recompute"): the logits are computed once more
            x, weight, targets = ctx.saved_tensors
            _, loss, _, _, _, dx, dw = op(x, weight, targets, grad_loss, *ctx.options, needs_dx, needs_dw, False, ctx.filter_eps)
            row_scale, factor = grad_loss, None
        unit = _unit(row_scale.detach(), dx.dtype)
        if unit is not None:
            factor = unit if factor is None else factor * unit
        dx, dw = (
            _times(g, factor, dtype) if is_needed else None
            for g, dtype, is_needed in zip((dx, dw), ctx.dtypes, (needs_dx, needs_dw), strict=True)
        )
        if torch.is_grad_enabled():  # create_graph=True: dx and dW are no constants, but what they depend on is not known here
            dx, dw = (g if g is None else _Once.apply(g, loss) for g in (dx, dw))
        return dx, dw, None, d_scale, *(None,) * 8

    op.register_autograd(backward, setup_context=save)
    return op


_linear_cross_entropy = _chunked_op("tritale::linear_cross_entropy", _torch_step)
_linear_cross_entropy_triton = _chunked_op("tritale::linear_cross_entropy_triton", _triton_step)


@jit
def _tile_logits(
    p_a, p_b, o_a, o_b, m_a, m_b, width, stride_a, stride_b,
    SOFTCAP: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows o_a of A times rows o_b of B, capped: [BLOCK_A, BLOCK_B]."""
    o_k = tl.arange(0, BLOCK_K)
    b_s = tl.zeros([BLOCK_A, BLOCK_B], ACC)
    for k in range(0, width, BLOCK_K):
        m_k = k + o_k < width
        b_a = tl.load(p_a + o_a[:, None] * stride_a + (k + o_k)[None, :], mask=m_a[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_b[None, :] * stride_b + (k + o_k)[:, None], mask=m_b[None, :] & m_k[:, None], other=0.0)
        b_s = tl.dot(b_a, b_b, b_s, input_precision="ieee", out_dtype=ACC)
    if SOFTCAP != 0:
        b_s = SOFTCAP * tanh(b_s / SOFTCAP, True)
    return b_s


@jit
def _recompute_forward_kernel(
    p_x,  # (N, K)
    p_weight,  # (V, K)
    p_targets,  # (N,)
    p_top, p_total, p_sum, p_target, p_best,  # (slices, N): maximum, Σ exp(s − maximum), Σ s, s_target, index of the maximum
    n_rows, vocab_size, width, slice_size,
    stride_x, stride_weight,
    SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < n_rows
    target = tl.load(p_targets + o_n, mask=m_n, other=-1)
    top = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    sum_s = tl.zeros([BLOCK_N], ACC)
    s_target = tl.zeros([BLOCK_N], ACC)
    first = tl.program_id(1) * slice_size
    best = tl.zeros([BLOCK_N], tl.int32) + first
    for start in range(first, tl.minimum(first + slice_size, vocab_size), BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        m_v = o_v < vocab_size
        b_s = _tile_logits(
            p_x, p_weight, o_n, o_v.to(tl.int64), m_n, m_v, width, stride_x, stride_weight, SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_K, ACC
        )
        sum_s += tl.sum(tl.where(m_v[None, :], b_s, 0.0), axis=1)
        b_s = tl.where(m_v[None, :], b_s, float("-inf"))
        s_target += tl.sum(tl.where(o_v[None, :] == target[:, None], b_s, 0.0), axis=1)
        peak, at = tl.max(b_s, axis=1, return_indices=True)
        best = tl.where(peak > top, start + at, best)  # of equals the first, as argmax
        new_top = tl.maximum(top, peak)
        shift = tl.where(tl.abs(new_top) == float("inf"), 0.0, new_top)
        total = total * tl.exp2((top - shift) * LOG2E) + tl.sum(tl.exp2((b_s - shift[:, None]) * LOG2E), axis=1)
        top = new_top
    o_out = tl.program_id(1).to(tl.int64) * n_rows + o_n
    tl.store(p_top + o_out, top, mask=m_n)
    tl.store(p_total + o_out, total, mask=m_n)
    tl.store(p_sum + o_out, sum_s, mask=m_n)
    tl.store(p_target + o_out, s_target, mask=m_n)
    tl.store(p_best + o_out, best, mask=m_n)


@jit
def _recompute_combine_kernel(
    p_targets,  # (N,)
    p_top, p_total, p_sum, p_target, p_best,  # (slices, N), as the forward kernel leaves them
    p_loss, p_nll, p_top_out, p_log_total, p_correct,  # (N,)
    n_rows, vocab_size, n_slices,
    IGNORE_INDEX: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,  # ≥ slices
    ACC: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_s = tl.arange(0, BLOCK_S)
    m_n = o_n < n_rows
    mask = m_n[:, None] & (o_s < n_slices)[None, :]
    o_in = o_s[None, :].to(tl.int64) * n_rows + o_n[:, None]  # [BLOCK_N, BLOCK_S]
    target = tl.load(p_targets + o_n, mask=m_n, other=IGNORE_INDEX)
    is_valid = m_n & (target != IGNORE_INDEX)
    tops = tl.load(p_top + o_in, mask=mask, other=float("-inf"))
    totals = tl.load(p_total + o_in, mask=mask, other=0.0)
    best = tl.load(p_best + o_in, mask=mask, other=0)
    s_target = tl.sum(tl.load(p_target + o_in, mask=mask, other=0.0), axis=1)
    s_target = tl.where((target >= 0) & (target < vocab_size), s_target, float("nan"))  # outside: a NaN that is seen
    mean = tl.sum(tl.load(p_sum + o_in, mask=mask, other=0.0), axis=1) / vocab_size.to(ACC)
    at = tl.argmax(tops, axis=1)  # the first of equals
    arg = tl.sum(tl.where(o_s[None, :] == at[:, None], best, 0), axis=1)
    top, log_total = log_sum_exp(tops, totals)
    loss, nll = row_loss(s_target, mean, top, log_total, is_valid, LABEL_SMOOTHING, Z_LOSS)
    tl.store(p_loss + o_n, loss, mask=m_n)
    tl.store(p_nll + o_n, nll, mask=m_n)
    tl.store(p_top_out + o_n, tl.where(is_valid, top, 0.0), mask=m_n)
    tl.store(p_log_total + o_n, tl.where(is_valid, log_total, 0.0), mask=m_n)
    tl.store(p_correct + o_n, is_valid & (arg == target) & (nll == nll), mask=m_n)


@jit
def _recompute_backward_kernel(
    p_a,  # (n_a, K): the operand whose gradient is computed, x for dx and W for dW
    p_b,  # (n_b, K): the other operand
    p_out,  # (slices of B, n_a, K) in the accumulator's dtype
    p_targets, p_top, p_log_total, p_scale,  # (tokens,)
    n_a, n_b, width, slice_size, vocab_size,
    stride_a, stride_b,
    IGNORE_INDEX: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    FILTER: tl.constexpr,  # tiles of which no entry is above FILTER · its row's scale are left out; 0: none
    A_IS_TOKENS: tl.constexpr,  # A = x, B = W for dx; A = W, B = x for dW
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[a] = Σ_b d[a, b] B[b] with recomputed tiles of d. The sums are in memory that only this program reads and writes (it stays in the
    L2 cache), since K columns of BLOCK_A rows do not fit the registers."""
    o_a = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)  # [BLOCK_A]
    m_a = o_a < n_a
    o_k = tl.arange(0, BLOCK_K)
    p_out += tl.program_id(1).to(tl.int64) * n_a * width
    first = tl.program_id(1) * slice_size
    for start in range(first, tl.minimum(first + slice_size, n_b), BLOCK_B):
        o_b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)  # [BLOCK_B]
        m_b = o_b < n_b
        b_s = _tile_logits(p_a, p_b, o_a, o_b, m_a, m_b, width, stride_a, stride_b, SOFTCAP, BLOCK_A, BLOCK_B, BLOCK_K, ACC)
        o_token, m_token = (o_a, m_a) if A_IS_TOKENS else (o_b, m_b)
        target = tl.load(p_targets + o_token, mask=m_token, other=IGNORE_INDEX)
        top = tl.load(p_top + o_token, mask=m_token, other=0.0)
        log_total = tl.load(p_log_total + o_token, mask=m_token, other=0.0)
        scale = tl.load(p_scale + o_token, mask=m_token, other=0.0).to(ACC)
        is_valid = m_token & (target != IGNORE_INDEX)
        if A_IS_TOKENS:
            is_target = target[:, None] == o_b[None, :]
            b_d = logits_gradient(
                b_s, is_target, top[:, None], log_total[:, None], scale[:, None], vocab_size, LABEL_SMOOTHING, Z_LOSS, SOFTCAP
            )
            b_d = tl.where(is_valid[:, None] & m_b[None, :], b_d, 0.0)
        else:
            is_target = target[None, :] == o_a[:, None]
            b_d = logits_gradient(
                b_s, is_target, top[None, :], log_total[None, :], scale[None, :], vocab_size, LABEL_SMOOTHING, Z_LOSS, SOFTCAP
            )
            b_d = tl.where(is_valid[None, :] & m_a[:, None], b_d, 0.0)
        stop = width
        if FILTER != 0:
            b_scale = tl.abs(scale)[:, None] if A_IS_TOKENS else tl.abs(scale)[None, :]
            is_small = tl.abs(b_d) <= FILTER * b_scale  # false for NaN, which is not lost
            stop = tl.where((tl.min(is_small.to(tl.int32)) != 0) & (start > first), 0, width)
        b_d = b_d.to(p_b.dtype.element_ty)  # [BLOCK_A, BLOCK_B]
        for k in range(0, stop, BLOCK_K):
            m_k = k + o_k < width
            b_b = tl.load(p_b + o_b[:, None] * stride_b + (k + o_k)[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
            p_sum = p_out + o_a[:, None] * width + (k + o_k)[None, :]
            m_sum = m_a[:, None] & m_k[None, :]
            b_sum = tl.load(p_sum, mask=m_sum & (start > first), other=0.0)  # the first tile only writes: no zero fill
            b_sum = tl.dot(b_d, b_b, b_sum, input_precision="ieee", out_dtype=ACC)  # pyright: ignore[reportArgumentType]
            tl.store(p_sum, b_sum, mask=m_sum)
        tl.debug_barrier()  # the sums are read next by whichever thread the layout names: its block's stores must be done


def _slices(size: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """(number of slices, size of each): divide `size` at block borders so that programs · slices is about `wanted`. No slice is empty."""
    blocks = -(-size // block)
    per_slice = -(-blocks // max(1, min(blocks, wanted // max(programs, 1))))
    return -(-blocks // per_slice), per_slice * block


@torch.library.custom_op("tritale::linear_cross_entropy_recompute", mutates_args=())
def _recompute(
    x: Tensor,  # (N, K)
    weight: Tensor,  # (V, K)
    targets: Tensor,  # (N,), IGNORED where ignored
    label_smoothing: float, z_loss: float, softcap: float,
    filter_eps: float = 0.0,  # of the backward pass
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, nll, top, log_total, correct) of each row. Differentiable in loss."""
    (n, width), vocab_size = x.shape, weight.shape[0]
    rows = empty_rows(x, n)
    if n == 0:
        return rows
    x, weight, targets = unit_stride(x), unit_stride(weight.to(x.dtype)), targets.contiguous()
    acc = accumulator(x)
    options = launch_options("linear_cross_entropy_recompute_fwd", x, itemsize=x.itemsize)
    programs = cdiv(n, options["BLOCK_N"])
    n_slices, slice_size = _slices(vocab_size, options["BLOCK_V"], programs, 4 * sm_count(x))
    parts = [rows[0].new_empty(n_slices, n, dtype=dtype) for dtype in [rows[0].dtype] * 4 + [torch.int32]]
    with torch.cuda.device_of(x):
        _recompute_forward_kernel[(programs, n_slices)](
            x, weight, targets, *parts, n, vocab_size, width, slice_size, x.stride(0), weight.stride(0),
            SOFTCAP=softcap, ACC=acc, **options,
        )  # fmt: skip
        block_s = power_of_two(n_slices)
        options = launch_options("linear_cross_entropy_combine", x, n_slices=block_s)
        _recompute_combine_kernel[(cdiv(n, options["BLOCK_N"]),)](
            targets, *parts, *rows, n, vocab_size, n_slices,
            IGNORE_INDEX=IGNORED, LABEL_SMOOTHING=label_smoothing, Z_LOSS=z_loss, BLOCK_S=block_s, ACC=acc, **options,
        )  # fmt: skip
    return rows


@torch.library.custom_op("tritale::linear_cross_entropy_recompute_backward", mutates_args=())
def _recompute_backward(
    grad: Tensor,  # (N,)
    x: Tensor, weight: Tensor, targets: Tensor, top: Tensor, log_total: Tensor,
    label_smoothing: float, z_loss: float, softcap: float, needs_dx: bool, needs_dw: bool, filter_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx in x's dtype, dW in fp32), empty where not needed."""
    *_, dx, dw = _empty_results(x, weight, needs_dx, needs_dw)
    if x.shape[0] == 0:
        return dx, dw.zero_()
    x, weight = unit_stride(x), unit_stride(weight.to(x.dtype))
    unit = _unit(grad, x.dtype)
    row_args = (targets.contiguous(), top, log_total, grad.contiguous() if unit is None else grad / unit)
    options = launch_options("linear_cross_entropy_recompute_bwd", x, itemsize=x.itemsize)

    def launch(a: Tensor, b: Tensor, out: Tensor, n_slices: int, slice_size: int, a_is_tokens: bool) -> None:
        with torch.cuda.device_of(a):
            _recompute_backward_kernel[(cdiv(a.shape[0], options["BLOCK_A"]), n_slices)](
                a, b, out, *row_args, a.shape[0], b.shape[0], a.shape[1], slice_size, weight.shape[0], a.stride(0), b.stride(0),
                IGNORE_INDEX=IGNORED, LABEL_SMOOTHING=label_smoothing, Z_LOSS=z_loss, SOFTCAP=softcap, FILTER=filter_eps,
                A_IS_TOKENS=a_is_tokens, ACC=accumulator(a), **options,
            )  # fmt: skip

    if needs_dx:  # few rows of x leave SMs idle: the vocabulary is cut, one fp32 dx per slice, then summed
        programs = cdiv(x.shape[0], options["BLOCK_A"])
        n_slices, slice_size = _slices(weight.shape[0], options["BLOCK_B"], programs, sm_count(x))
        sums = top.new_empty(n_slices, *x.shape)
        launch(x, weight, sums, n_slices, slice_size, True)
        total = sums.sum(0)
        dx = (total if unit is None else total * unit).to(dx.dtype)
    if needs_dw:
        launch(weight, x, dw, 1, x.shape[0], False)
        if unit is not None:
            dw *= unit
    return dx, dw


_recompute.register_fake(lambda x, *_: empty_rows(x, x.shape[0]))
_recompute_backward.register_fake(
    lambda grad, x, weight, targets, top, log_total, label_smoothing, z_loss, softcap, needs_dx, needs_dw, filter_eps=0.0: _empty_results(
        x, weight, needs_dx, needs_dw
    )[-2:]
)
_recompute_backward.register_autograd(no_second_derivative("linear_cross_entropy"))


def _save_recompute(ctx, inputs, output):
    x, weight, targets, *ctx.options, ctx.filter_eps = inputs
    ctx.save_for_backward(x, weight, targets, output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_recompute(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:2]
    saved = ctx.saved_tensors  # read once, as non-reentrant checkpointing requires
    dx, dw = _recompute_backward(grad_loss, *saved, *ctx.options, *needs, ctx.filter_eps)
    return dx if needs[0] else None, dw.to(saved[1].dtype) if needs[1] else None, *(None,) * 5


_recompute.register_autograd(_backward_recompute, setup_context=_save_recompute)


def _filter(filter_eps: float | str | None, x: Tensor, label_smoothing: float) -> float:
    if filter_eps is None:
        return 0.0
    if filter_eps != "auto" and not (isinstance(filter_eps, float) and 0 < filter_eps < 1):
        raise ValueError(f"filter_eps is {filter_eps!r}; it must be a number between 0 and 1, 'auto', or None for exact gradients")
    if label_smoothing:
        raise ValueError("filter_eps cannot be used with label_smoothing, which gives every entry a part of the gradient")
    return torch.finfo(x.dtype).eps / 32 if filter_eps == "auto" else float(filter_eps)


def linear_cross_entropy(
    x: Tensor,  # (…, K)
    weight: Tensor,  # (V, K)
    targets: Tensor,  # (…) int
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
    memory_budget_mb: float = BUDGET_MB,
    filter_eps: float | str | None = None,
) -> Any:  # the loss, or (loss, statistics) with return_stats
    """Loss of the logits x Wᵀ; the options mean what they mean in `cross_entropy` (`reference.py` holds the formula).

    Products are in x's dtype (autocast's if it is on), sums in fp32. The weight may be fp32 with a bf16 x; its gradient is then fp32 too,
    unrounded. `mean` divides by the targets that are not ignored, or by `normalizer`, a tensor on the device: the number of
    targets of the global batch makes gradient accumulation exact. Nothing synchronises.

    `strategy="chunk"` holds the logits of some rows at a time in x's dtype, `memory_budget_mb` of them. "recompute" stores
    none and recomputes them in backward: 10 instead of 6 N·K·V FLOPs, for less memory (a CPU and sm_75, which have no tensor cores for
    it, use chunks too, but keep no gradients between forward and backward).

    `filter_eps` leaves out what small probabilities p add to the gradients, as cut-cross-entropy does (arXiv 2411.09009, section 4.3): on a
    CPU those of an entry of the vocabulary with p ≤ filter_eps in all rows of a chunk, with "recompute" on a GPU those of a tile without
    a larger one. The loss is exact. "auto" is ε / 32 of x's dtype: 2⁻¹² in bf16. In units of a row's scale, dx changes by at most Σ p |w|
    over the left-out entries w of the head, and the row of dW of an entry by at most filter_eps · Σ |x|. So an entry that no text uses
    is no longer made less likely: its gradient is 0.

    Raises ValueError for an unknown strategy or reduction, shapes that do not fit, or filter_eps with label smoothing or with chunks on a
    GPU."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    check_options(reduction, label_smoothing, softcap, targets, token_weight)
    if x.shape[-1] != weight.shape[-1] or x.shape[:-1] != targets.shape:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: (…, K), (V, K), (…) expected")
    (x,) = autocast(x)
    shape, x, targets = targets.shape, x.reshape(-1, x.shape[-1]), signed_targets(targets.reshape(-1))
    is_valid = targets != ignore_index
    targets = targets.masked_fill(~is_valid, IGNORED)
    wide = wide_dtype(x)
    row_scale = is_valid.to(wide)
    if reduction == "mean":
        row_scale = row_scale / reference.mean_divisor(is_valid, normalizer)
    if token_weight is not None:
        row_scale = row_scale * token_weight.reshape(-1).masked_fill(~is_valid, 0)
    row_scale = row_scale.to(wide)  # a weight or normalizer in fp64 makes nothing wider
    options = (label_smoothing, z_loss, softcap or 0.0)
    least = _filter(filter_eps, x, label_smoothing)
    is_triton, needs_dx, needs_dw, total = uses_triton(x), False, False, None
    refuse_transforms("linear_cross_entropy", x, weight, token_weight)
    if strategy == "recompute" and is_triton and architecture(x) != "sm_75":
        loss, nll, top, log_total, correct = _recompute(x, weight, targets, *options, least)
        lse = top + log_total
    else:
        if least and (is_triton or x.device.type != "cpu"):
            raise ValueError("filter_eps needs strategy 'recompute' on a GPU: the products of a chunk there are whole")
        has_fp32_logits = not is_triton and x.device.type != "cpu"  # a CPU converts a few rows at a time
        rows = chunk_rows(x.shape[0], weight.shape[0], memory_budget_mb, max(4, x.itemsize) if has_fp32_logits else x.itemsize)
        op = _linear_cross_entropy_triton if is_triton else _linear_cross_entropy
        in_forward = strategy == "chunk" and reduction != "none" and torch.is_grad_enabled()
        needs_dx, needs_dw = (in_forward and t.requires_grad for t in (x, weight))
        total, loss, nll, lse, correct, _, _ = op(x, weight, targets, row_scale, *options, rows, needs_dx, needs_dw, return_stats, least)
    if reduction == "none":
        result = (loss * row_scale).view(shape)
    elif total is None or not (needs_dx or needs_dw):
        result = (loss * row_scale).sum()
    else:
        result = total
    if not return_stats:
        return result
    return result, statistics(nll, lse, correct, z_loss, shape)


def token_log_probs(
    x: Tensor,  # (…, K)
    weight: Tensor,  # (V, K)
    targets: Tensor,  # (…) int
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    token_weight: Tensor | None = None,  # (…)
    strategy: str = "chunk",
    memory_budget_mb: float = BUDGET_MB,
) -> Tensor:
    """log p of each target, p = softmax(x Wᵀ), times its `token_weight`: (…), at least fp32; 0 where the target is ignored.

    For losses of whole answers, such as preference losses: their sums are the log-probabilities of the answers. Differentiable in x, weight
    and token_weight. Holds the logits of some rows at a time, in backward too: 8 · N · K · V FLOPs. Options and errors are those of
    `linear_cross_entropy`."""
    return -linear_cross_entropy(
        x, weight, targets, ignore_index=ignore_index, softcap=softcap, token_weight=token_weight, reduction="none",
        strategy=strategy, memory_budget_mb=memory_budget_mb,
    )  # fmt: skip
