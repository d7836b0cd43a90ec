# A constexpr decides which branches of a kernel exist.
# pyright: reportPossiblyUnboundVariable=false
"""Cross-entropy of given logits, with label smoothing ε, z-loss, soft cap, weights, and the statistics of a training log.

    loss_i     = token_weight_i · ((1 − ε)(lse − s_t) + ε (lse − mean(s)) + z · lse²),     lse = log Σ_j exp(s_j),  s after the cap
    d loss/ds_j = token_weight_i · ((1 + 2 z lse) p_j − (1 − ε)[j = t] − ε / V),           p_j = exp(s_j − lse)

Bytes: the forward pass reads the logits once (online softmax, arXiv 1805.02867), the backward pass reads them once and writes the gradient
once, over the logits themselves on request: 3 · N · V · itemsize, and six numbers per row. About 10 FLOPs per logit and pass: bound by
memory. Where one launch does both (`linear_cross_entropy`) only so many rows are in flight that the second read finds them in the L2 cache:
2 · N · V · itemsize from memory.

Rows with an ignored target are not read: their loss and gradient are written as zeros.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .common import (
    LOG2E,
    accumulator,
    contiguous_like,
    is_transformed,
    no_second_derivative,
    refuse_transforms,
    tanh,
    unit_stride,
    wide_dtype,
)
from .dispatch import is_readable, uses_triton
from .launch import cached_programs, cdiv, launch_options
from .triton_compat import jit, tl

BLOCK = 2**18  # logits that are in a CPU's cache at a time
REDUCTIONS = ("mean", "sum", "none")


@jit
def log_sum_exp(top, total):
    """(top, log Σ) over the last axis of running maxima and sums of exp(s − top), [M, N] → [M], [M]; lse is their sum, NaN if the maximum
    is infinite, as PyTorch's loss."""
    m = tl.max(top, axis=1)
    return m, tl.log(tl.sum(total * tl.exp2((top - m[:, None]) * LOG2E), axis=1))


@jit
def row_loss(s_target, mean, top, log_total, is_valid, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):  # all [M]
    """(loss, nll) of rows; 0 if ignored. lse − s is computed as (top − s) + log Σ, which stays exact for large logits."""
    nll = (top - s_target) + log_total
    loss = nll
    if LABEL_SMOOTHING != 0:
        loss = (1 - LABEL_SMOOTHING) * nll + LABEL_SMOOTHING * ((top - mean) + log_total)
    if Z_LOSS != 0:
        lse = top + log_total
        loss += Z_LOSS * lse * lse
    return tl.where(is_valid, loss, 0.0), tl.where(is_valid, nll, 0.0)


@jit
def logits_gradient(
    s,  # [M, N], after the cap
    is_target,  # [M, N]
    top, log_total, scale,  # of the tokens: [M, 1], or [1, N] if the second axis is tokens
    vocab_size,
    LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """d loss / d logits, in the accumulator's dtype: softmax − 1 is formed before any rounding."""
    d = tl.exp2((s - top) * LOG2E - log_total * LOG2E)  # a difference first, which keeps the digits of large logits
    if Z_LOSS != 0:
        d *= 1 + 2 * Z_LOSS * (top + log_total)
    d = tl.where(is_target, d - (1 - LABEL_SMOOTHING), d)
    if LABEL_SMOOTHING != 0:
        d -= LABEL_SMOOTHING / vocab_size.to(d.dtype)
    if SOFTCAP != 0:
        t = s / SOFTCAP
        d *= 1 - t * t
    return d * scale


@jit
def _cross_entropy_kernel(
    p_logits,  # (N, V)
    p_gradient,  # (N, V), may be p_logits
    p_targets,  # (N,)
    p_scale,  # (N,) d result / d loss of the row
    p_loss, p_nll, p_top, p_log_total, p_correct,  # (N,), the third and fourth read where WITH_LOSS is off
    n_rows, vocab_size, stride_logits, stride_gradient,
    IGNORE_INDEX: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,  # as arguments they would be rounded to fp32
    WITH_LOSS: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,  # neighbouring logits that one 128-bit load brings to one thread
    ACC: tl.constexpr,
):  # fmt: skip
    o_v = tl.arange(0, BLOCK_V)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), tl.num_programs(0)):
        o_n = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N], 64 bit: N · V passes 2³¹
        m_n = o_n < n_rows
        target = tl.load(p_targets + o_n, mask=m_n, other=IGNORE_INDEX)
        is_valid = m_n & (target != IGNORE_INDEX)
        is_inside = is_valid & (target >= 0) & (target < vocab_size)
        target = tl.where(is_inside, target, -1).to(tl.int32)  # every logit is compared with it
        p_row = p_logits + o_n * stride_logits
        if WITH_LOSS:
            # The logits of the target's group: s_target, and whether an entry beats it (argmax takes the first of equals). A target outside
            # 0 … V − 1 finds no entry: its loss becomes NaN.
            target_group = tl.where(is_inside, target // GROUP, 0)
            o_g = target_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            m_g = is_inside[:, None] & (o_g < vocab_size)
            b_g = tl.load(p_row[:, None] + o_g, mask=m_g, other=float("-inf")).to(ACC)  # [BLOCK_N, GROUP]
            if SOFTCAP != 0:
                b_g = SOFTCAP * tanh(b_g / SOFTCAP, True)
            b_g = tl.where(m_g, b_g, float("-inf"))
            s_target = tl.where(is_inside, tl.sum(tl.where(o_g == target[:, None], b_g, 0.0), axis=1), float("nan"))
            beats = (b_g > s_target[:, None]) | ((b_g == s_target[:, None]) & (o_g < target[:, None]))
            n_beats = tl.sum(beats.to(tl.int32), axis=1)
            # One maximum and one sum per group, which one thread holds: no exchange between threads inside the loop.
            top = tl.full([BLOCK_N, BLOCK_V // GROUP], float("-inf"), ACC)
            total = tl.zeros([BLOCK_N, BLOCK_V // GROUP], ACC)
            mean = tl.zeros([BLOCK_N, BLOCK_V // GROUP], ACC)
            ahead = tl.zeros([BLOCK_N, BLOCK_V // GROUP], tl.int1)
            for start in range(0, vocab_size, BLOCK_V):
                m_v = start + o_v < vocab_size
                b_s = tl.load(p_row[:, None] + (start + o_v)[None, :], mask=is_valid[:, None] & m_v[None, :], other=float("-inf"))
                b_s = b_s.to(ACC)  # [BLOCK_N, BLOCK_V]
                if SOFTCAP != 0:
                    b_s = tl.where(m_v[None, :], SOFTCAP * tanh(b_s / SOFTCAP, True), float("-inf"))
                b_s = tl.reshape(b_s, [BLOCK_N, BLOCK_V // GROUP, GROUP])
                if LABEL_SMOOTHING != 0:
                    m_s = tl.reshape((o_n >= 0)[:, None] & m_v[None, :], [BLOCK_N, BLOCK_V // GROUP, GROUP])
                    mean += tl.sum(tl.where(m_s, b_s, 0.0), axis=2)
                peak = tl.max(b_s, axis=2)  # [BLOCK_N, BLOCK_V // GROUP]
                o_group = start // GROUP + tl.arange(0, BLOCK_V // GROUP)[None, :]
                ahead |= (peak > s_target[:, None]) | ((peak == s_target[:, None]) & (o_group < target_group[:, None]))
                new_top = tl.maximum(top, peak)
                shift = tl.where(tl.abs(new_top) == float("inf"), 0.0, new_top)
                total = total * tl.exp2((top - shift) * LOG2E) + tl.sum(tl.exp2((b_s - shift[:, :, None]) * LOG2E), axis=2)
                top = new_top
            top, log_total = log_sum_exp(top, total)
            mean = tl.sum(mean, axis=1) / vocab_size.to(ACC)
            loss, nll = row_loss(s_target, mean, top, log_total, is_valid, LABEL_SMOOTHING, Z_LOSS)
            n_beats += tl.sum(ahead.to(tl.int32), axis=1)
            tl.store(p_loss + o_n, loss, mask=m_n)
            tl.store(p_nll + o_n, nll, mask=m_n)
            tl.store(p_top + o_n, tl.where(is_valid, top, 0.0), mask=m_n)
            tl.store(p_log_total + o_n, tl.where(is_valid, log_total, 0.0), mask=m_n)
            tl.store(p_correct + o_n, is_valid & (n_beats == 0) & (nll == nll), mask=m_n)
        if WITH_GRADIENT:
            if not WITH_LOSS:
                top = tl.load(p_top + o_n, mask=m_n, other=0.0)
                log_total = tl.load(p_log_total + o_n, mask=m_n, other=0.0)
            # An ignored row is not read: its s, top and log Σ are 0, so that its gradient is 0 · 1 whatever it holds.
            scale = tl.where(is_valid, tl.load(p_scale + o_n, mask=m_n, other=0.0).to(ACC), 0.0)
            top, log_total = tl.where(is_valid, top, 0.0), tl.where(is_valid, log_total, 0.0)
            p_out = p_gradient + o_n * stride_gradient
            for i in range(0, tl.cdiv(vocab_size, BLOCK_V)):  # from the end, which was read last and is in the cache
                o_s = (tl.cdiv(vocab_size, BLOCK_V) - 1 - i) * BLOCK_V + o_v
                m_v = o_s < vocab_size
                b_s = tl.load(p_row[:, None] + o_s[None, :], mask=is_valid[:, None] & m_v[None, :], other=0.0).to(ACC)
                if SOFTCAP != 0:
                    b_s = SOFTCAP * tanh(b_s / SOFTCAP, True)
                is_target = o_s[None, :] == target[:, None]
                b_d = logits_gradient(
                    b_s, is_target, top[:, None], log_total[:, None], scale[:, None], vocab_size, LABEL_SMOOTHING, Z_LOSS, SOFTCAP
                )
                tl.store(p_out[:, None] + o_s[None, :], b_d.to(p_gradient.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])


def launch_cross_entropy(
    logits: Tensor,  # (N, V), rows of unit stride
    targets: Tensor,  # (N,)
    rows: tuple[Tensor, ...],  # loss, nll, top, log_total, correct: (N,)
    *, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, with_loss: bool,
    gradient: Tensor | None = None,  # (N, V), written if given; may be logits
    scale: Tensor | None = None,  # (N,)
) -> None:  # fmt: skip
    """One pass over the logits for the rows' losses, one for the gradient, or both in one launch while the row is still in the cache."""
    n, vocab_size = logits.shape
    if n == 0:
        return
    out = logits if gradient is None else gradient
    reads_twice = with_loss and gradient is not None
    options = launch_options("cross_entropy", logits, vocab_size=vocab_size, reads_twice=reads_twice)
    programs = cdiv(n, options["BLOCK_N"])
    if reads_twice:
        programs = min(programs, cached_programs(logits, options["BLOCK_N"] * vocab_size * logits.itemsize, options["num_warps"]))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(programs,)](
            logits, out, targets, rows[0] if scale is None else scale, *rows, n, vocab_size, logits.stride(0), out.stride(0),
            IGNORE_INDEX=ignore_index, LABEL_SMOOTHING=label_smoothing, Z_LOSS=z_loss, SOFTCAP=softcap,
            WITH_LOSS=with_loss, WITH_GRADIENT=gradient is not None,
            GROUP=min(16 // logits.itemsize, options["BLOCK_V"]), ACC=accumulator(logits),
            **options,
        )  # fmt: skip


def empty_rows(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised loss, nll, top, log_total (in fp32, or fp64 if x is) and correct of n rows."""
    loss, nll, top, log_total = (x.new_empty(n, dtype=wide_dtype(x)) for _ in range(4))
    return loss, nll, top, log_total, x.new_empty(n, dtype=torch.bool)


@torch.library.custom_op("tritale::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float,  # 0: none
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, nll, top, log_total, correct) of each row, before weights; lse = top + log_total. Differentiable in loss."""
    rows = empty_rows(logits, logits.shape[0])
    launch_cross_entropy(
        unit_stride(logits), targets.contiguous(), rows, with_loss=True,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip
    return rows


def _launch_backward(grad, logits, out, targets, top, log_total, ignore_index, label_smoothing, z_loss, softcap):
    launch_cross_entropy(
        logits, targets.contiguous(), (grad, grad, top, log_total, grad), with_loss=False, gradient=out, scale=grad.contiguous(),
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip


@torch.library.custom_op("tritale::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: Tensor,  # (N,)
    logits: Tensor, targets: Tensor, top: Tensor, log_total: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    out = contiguous_like(logits)
    _launch_backward(grad, unit_stride(logits), out, targets, top, log_total, ignore_index, label_smoothing, z_loss, softcap)
    return out


@torch.library.custom_op("tritale::cross_entropy_backward_", mutates_args=("logits",))
def _cross_entropy_backward_(
    grad: Tensor,  # (N,)
    logits: Tensor,  # becomes the gradient; rows of unit stride that do not overlap
    targets: Tensor, top: Tensor, log_total: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    _launch_backward(grad, logits, logits, targets, top, log_total, ignore_index, label_smoothing, z_loss, softcap)


_cross_entropy.register_fake(lambda logits, *_: empty_rows(logits, logits.shape[0]))
_cross_entropy_backward.register_fake(lambda grad, logits, *_: contiguous_like(logits))
_cross_entropy_backward_.register_fake(lambda *_: None)
_cross_entropy_backward.register_autograd(no_second_derivative("cross_entropy"))


def _save(ctx, inputs, output):
    logits, targets, *ctx.options, ctx.inplace = inputs
    ctx.save_for_backward(logits, targets, output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 7
    logits, targets, top, log_total = ctx.saved_tensors
    if ctx.inplace and not torch.is_grad_enabled():  # grad mode is on here for create_graph=True: then the logits are still needed
        _cross_entropy_backward_(grad_loss, logits, targets, top, log_total, *ctx.options)
        gradient = logits.detach()
    else:
        gradient = _cross_entropy_backward(grad_loss, logits, targets, top, log_total, *ctx.options)
    return gradient, *(None,) * 6


_cross_entropy.register_autograd(_backward, setup_context=_save)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    s = logits.to(wide_dtype(logits))
    return s.div(softcap).tanh_().mul_(softcap) if softcap else s


def _torch_blocks(logits: Tensor) -> Iterator[slice]:
    n, rows = len(logits), max(1, BLOCK // max(1, logits.shape[1]))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _runs_in_c(logits: Tensor, label_smoothing: float, z_loss: float, softcap: float) -> bool:
    return not softcap and logits.stride(1) == 1 and cpu.can_run(logits, numbers=(label_smoothing, z_loss))


class _TorchCrossEntropy(torch.autograd.Function):
    """(loss, nll, lse, correct) of each row on a CPU, differentiable in loss; correct only with_stats.

    Some rows at a time, so that the passes over them read the cache. The softmax is computed again in backward: besides the gradient
    nothing of the logits' size is stored."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, label_smoothing, z_loss, softcap, inplace, with_stats):
        rows = loss, nll, top, log_total, correct = empty_rows(logits, len(logits))
        ctx.options, ctx.inplace = (ignore_index, label_smoothing, z_loss, softcap), inplace
        ctx.set_materialize_grads(False)
        if _runs_in_c(logits, label_smoothing, z_loss, softcap):
            options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
            cpu.cross_entropy(logits, targets, rows[:4], correct if with_stats else None, **options)
            lse = top + log_total
            ctx.save_for_backward(logits, targets, top, log_total)
            ctx.mark_non_differentiable(nll, lse, correct)
            return loss, nll, lse, correct
        is_ignored = targets == ignore_index
        index = targets.masked_fill(is_ignored, 0).long().unsqueeze(1)
        for rows in _torch_blocks(logits):
            s = _capped(logits[rows], softcap)
            if with_stats:
                correct[rows] = s.argmax(1) == targets[rows]
            top[rows] = s.amax(1)
            s = s - top[rows].unsqueeze(1)  # a difference first, which keeps the digits of large logits
            s_target, mean = s.gather(1, index[rows]).squeeze(1), s.mean(1) if label_smoothing else 0.0
            log_total[rows] = s.exp_().sum(1).log()
            nll[rows] = log_total[rows] - s_target
            loss[rows] = (1 - label_smoothing) * nll[rows] + label_smoothing * (log_total[rows] - mean) if label_smoothing else nll[rows]
        lse = top + log_total
        if z_loss:  # 0 · inf is NaN
            loss += z_loss * lse.square()
        for row in (loss, nll, lse, correct):
            row.masked_fill_(is_ignored, 0)
        ctx.save_for_backward(logits, targets, top, log_total)
        ctx.mark_non_differentiable(nll, lse, correct)
        return loss, nll, lse, correct

    @staticmethod
    def backward(ctx, *grads):
        grad, (logits, targets, top, log_total) = grads[0], ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        ignore_index, label_smoothing, z_loss, softcap = ctx.options
        if cpu.needs_definition(grad):  # autograd differentiates the definition
            options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap or None, "reduction": "none"}
            definition = lambda s: reference.cross_entropy(s, targets, ignore_index=ignore_index, **options)
            return *cpu.by_definition(definition, (logits,), (grad,)), *(None,) * 7
        out = logits.detach() if ctx.inplace else contiguous_like(logits)
        if _runs_in_c(logits, label_smoothing, z_loss, softcap):
            options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
            cpu.cross_entropy_backward(logits, targets, top, log_total, grad, out, **options)
            if ctx.inplace:
                torch.autograd.graph.increment_version(logits)
            return out, *(None,) * 7
        is_direct = not ctx.inplace and out.dtype == grad.dtype
        is_ignored = targets == ignore_index
        index = targets.masked_fill(is_ignored, 0).long().unsqueeze(1)
        scale = grad.masked_fill(is_ignored, 0).unsqueeze(1)
        factor = scale / log_total.exp().unsqueeze(1) * (1 + 2 * z_loss * (top + log_total).unsqueeze(1) if z_loss else 1)
        for rows in _torch_blocks(logits):
            s = _capped(logits[rows], softcap)
            d = torch.sub(s, top[rows].unsqueeze(1), out=out[rows] if is_direct else None).exp_().mul_(factor[rows])
            d.scatter_add_(1, index[rows], (label_smoothing - 1) * scale[rows])
            if label_smoothing:
                d.sub_(label_smoothing / s.shape[1] * scale[rows])
            if softcap:
                d.mul_(1 - s.div(softcap).square_())
            if not is_direct:
                out[rows] = d
        if is_ignored.any():  # whatever an ignored row holds: 0 · NaN is NaN
            out[is_ignored] = 0
        return out, *(None,) * 7


def _may_overwrite(logits: Tensor) -> bool:
    """Whether the gradient may overwrite the logits: not if they are a leaf (a parameter, a user's input), a view of one, or overlap. Never
    under torch.compile: Inductor plans memory itself, and would copy the logits to keep the order of a mutation."""
    if torch.compiler.is_compiling():
        return False
    root = logits if logits._base is None else logits._base
    return not root.is_leaf and logits.stride(-1) == 1 and (logits.stride(0) >= logits.shape[1] or logits.shape[0] == 1)


def check_options(reduction: str, label_smoothing: float, softcap: float | None, targets: Tensor, token_weight: Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1]")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}; integers expected, the indices into the vocabulary")
    if token_weight is not None and token_weight.shape != targets.shape:
        raise ValueError(f"token_weight {tuple(token_weight.shape)} must have the targets' shape, {tuple(targets.shape)}")


def signed_targets(targets: Tensor) -> Tensor:
    """The targets in a dtype that can hold every ignore_index; in uint8, −100 is 156."""
    return targets if targets.dtype in (torch.int32, torch.int64) else targets.long()


def cross_entropy(
    logits: Tensor,  # (…, V)
    targets: Tensor,  # (…) int
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,  # (…)
    reduction: str = "mean",
    normalizer: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Any:  # the loss, or (loss, statistics) with return_stats
    """Cross-entropy in fp32 (fp64 for fp64 logits) of logits of any float dtype; `reference.cross_entropy` is the definition.

    `mean` divides by the number of targets that are not ignored, or by `normalizer`, a tensor on the device (the targets of the global
    batch, for gradient accumulation); with none left loss and gradients are 0. `token_weight` multiplies the rows' losses. With
    `return_stats` also {nll, lse, z_loss, correct}, each shaped as targets, 0 if ignored, detached. Nothing synchronises.

    `inplace_backward` lets backward write the gradient over the logits: saves N · V · itemsize bytes; the logits then hold the gradient,
    and autograd refuses a later use of their values. It has no effect on a leaf, under torch.compile, or with
    `create_graph`. A target that is neither ignored nor in 0 … V − 1 makes the loss NaN (an error on the CPU).

    Raises ValueError for an unknown reduction, options out of range, or targets that are not shaped as the rows of the logits."""
    check_options(reduction, label_smoothing, softcap, targets, token_weight)
    targets = signed_targets(targets)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: (…, V) and (…) expected")
    is_triton = uses_triton(logits)
    if not is_triton and (not is_readable(logits) or is_transformed(logits, token_weight)):
        return reference.cross_entropy(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            token_weight=token_weight, reduction=reduction, normalizer=normalizer, return_stats=return_stats,
        )  # fmt: skip
    if is_triton:
        refuse_transforms("cross_entropy", logits, token_weight)
    shape, logits, targets = targets.shape, logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    options = ignore_index, label_smoothing, z_loss, softcap or 0.0, inplace_backward and _may_overwrite(logits)
    if is_triton:
        loss, nll, *of_lse, correct = _cross_entropy(logits, targets, *options)
    else:
        loss, nll, *of_lse, correct = _TorchCrossEntropy.apply(logits, targets, *options, return_stats)
    is_valid = targets != ignore_index
    if token_weight is not None:
        loss = loss * token_weight.reshape(-1).masked_fill(~is_valid, 0)
    if reduction == "none":
        result = loss.view(shape)
    else:
        result = loss.sum()
    if reduction == "mean":
        result = result / reference.mean_divisor(is_valid, normalizer)
    if not return_stats:
        return result
    return result, statistics(nll, sum(of_lse[1:], of_lse[0]), correct, z_loss, shape)  # added here, since it costs a launch


def statistics(nll: Tensor, lse: Tensor, correct: Tensor, z_loss: float, shape: torch.Size) -> dict[str, Tensor]:
    stats = {"nll": nll, "lse": lse, "z_loss": z_loss * lse.square(), "correct": correct}
    return {name: t.detach().view(shape) for name, t in stats.items()}
