"""Errors against float64, compared with the errors of the plain definition in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TINY = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}  # of the largest value
HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the largest value: what storing one entry may cost anyone


def differentiate(op: Callable, inputs: Sequence, pulls: Sequence[Tensor] | None = None, **options) -> tuple[list[Tensor], list]:
    """(outputs, gradients of Σ pull · output for the float inputs that require one) of op(*inputs, **options)."""
    outputs = op(*inputs, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if pulls is None or not wanted:
        return outputs, []
    pairs = [(o, p.to(o.dtype)) for o, p in zip(outputs, pulls, strict=True) if o.requires_grad]
    outs, grads = zip(*pairs, strict=True)
    return outputs, list(torch.autograd.grad(outs, wanted, grads, allow_unused=True))


def _cast(inputs: Sequence, dtype: torch.dtype | None) -> list:
    """Fresh leaves with the values of the inputs; floats in another dtype if one is given."""
    return [
        t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in inputs
    ]


def error(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root-mean-square) error; entries that are equally infinite count as exact."""
    actual, truth = actual.detach().double(), truth.detach().double()
    difference = torch.where(actual == truth, 0.0, actual - truth).abs()
    if not difference.numel():
        return 0.0, 0.0
    return difference.max().item(), difference.square().mean().sqrt().item()


def check_numbers(
    op: Callable,
    definition: Callable,
    inputs: Sequence,
    *,
    backward: bool = True,
    factor: float = 2.0,
    gradient_terms: Sequence[float] = (),
    **options,
) -> dict[str, tuple[float, float]]:
    """Assert that outputs and gradients of the op are within `factor` × the definition's own error, both against float64.

    `inputs` are tensors (those that require a gradient get one) and other positional arguments; tensors in `options` are cast to float64
    for the truth too. The tiny absolute term is TINY × the largest value, or what storing one entry in 16 bits may cost; where a gradient
    is a difference of larger terms, which may cancel, `gradient_terms` says how large they are, one number per gradient. Returns
    {name: (error of the op, of the definition)}."""
    wide_options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    truth_inputs = _cast(inputs, torch.float64)
    probe = definition(*_cast(inputs, torch.float64), **wide_options)
    probe = [probe] if isinstance(probe, Tensor) else list(probe)
    dtype = next(t.dtype for t in inputs if isinstance(t, Tensor) and t.is_floating_point())
    pulls = [torch.randn_like(o).to(dtype).to(o.dtype) if o.is_floating_point() else o for o in probe] if backward else None
    truth = differentiate(definition, truth_inputs, pulls, **wide_options)
    plain = differentiate(definition, _cast(inputs, None), pulls, **options)
    ours = differentiate(op, _cast(inputs, None), pulls, **options)
    report = {}
    for kind, *triples in zip(("output", "gradient"), truth, plain, ours, strict=True):
        for i, (t, p, o) in enumerate(zip(*triples, strict=True)):
            name = f"{kind} {i}"
            assert (t is None) == (o is None), f"{name}: {'unexpected' if t is None else 'missing'}"
            if t is None:
                continue
            assert o.dtype == p.dtype and o.shape == p.shape, f"{name}: {o.dtype} {tuple(o.shape)}, not {p.dtype} {tuple(p.shape)}"
            if not t.is_floating_point():
                assert torch.equal(o, p), f"{name} differs"
                continue
            bad = o.isnan() & ~t.isnan()
            assert not bad.any(), f"{name}: {int(bad.sum())} NaN of {o.numel()}"
            finite = t[t.isfinite()]
            largest = finite.abs().max().item() if finite.numel() else 0.0
            stored = HALF_ULP.get(o.dtype, 0.0) * largest
            if kind == "gradient" and i < len(gradient_terms):
                largest = max(largest, gradient_terms[i])
            tiny = TINY[torch.float32 if o.dtype == torch.float64 != dtype else o.dtype] * largest  # sums of fp32 inputs are fp32
            slack = max(tiny, stored), max(tiny, stored / max(1, t.numel()) ** 0.5)  # one entry's rounding, in either measure
            for measure, mine, theirs, tiny in zip(("largest", "rms"), error(o, t), error(p, t), slack, strict=True):
                assert mine <= factor * theirs + tiny, (
                    f"{name}: {measure} error {mine:.3g} against float64, the definition's {theirs:.3g}; "
                    f"allowed {factor} × that + {tiny:.1g}"
                )
                if measure == "largest":
                    report[name] = (mine, theirs)
    return report
