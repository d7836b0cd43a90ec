"""Newton–Schulz iteration of many matrices at once, in the interpreter or on a GPU."""

import math

import pytest
import torch

from tests.kernels.harness import Recorder, guard
from tests.kernels.harness.memory import check_bounds, check_races, grid_order, guarded_outputs
from tritale.kernels import launch, reference
from tritale.kernels.newton_schulz import is_fused, newton_schulz

OPTIONS = {"coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7}
SHAPES = [(24, 24), (40, 17), (7, 50), (1, 5), (33, 64), (64, 33)]


def draw(device, shapes=SHAPES, scale=1.0):
    return [torch.randn(shape, device=device) * scale for shape in shapes]


def errors(results, updates, factors, steps):
    """Largest error against float64 of each matrix, beside that of the definition in bf16."""
    for result, g, factor in zip(results, updates, factors, strict=True):
        truth = factor * reference.newton_schulz(g.double(), steps=steps, **OPTIONS)
        plain = factor * reference.newton_schulz(g.bfloat16(), steps=steps, **OPTIONS).double()
        yield (result.double() - truth).abs().max().item(), (plain - truth).abs().max().item(), truth.abs().max().item()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_error_is_that_of_the_definition(device, steps, scale):
    updates, factors = draw(device, scale=scale), tuple(0.1 * (i + 1) for i in range(len(SHAPES)))
    results = newton_schulz(updates, factors, steps=steps, **OPTIONS)
    assert [r.shape for r in results] == [u.shape for u in updates] and all(r.dtype == torch.float32 for r in results)
    found = list(errors(results, updates, factors, steps))
    assert all(mine <= 2 * theirs + 2**-6 * largest for mine, theirs, largest in found)
    assert sum(mine / largest for mine, _, largest in found) <= 1.5 * sum(theirs / largest for _, theirs, largest in found)


def test_singular_values_come_close_to_one(device):
    updates = draw(device, [(48, 80), (80, 48)])
    for x in newton_schulz(updates, (1.0, 1.0), steps=5, **OPTIONS):
        singular = torch.linalg.svdvals(x.cpu())
        assert 0.5 < singular.min() and singular.max() < 1.4


def test_zeros_stay_zero(device):
    (x,) = newton_schulz([torch.zeros(20, 30, device=device)], (1.0,), steps=5, **OPTIONS)
    assert (x == 0).all()


def test_memory(device):
    results = {}
    base, factors = draw(device, [(24, 40), (40, 24), (17, 16)]), (1.0, 2.0, 3.0)
    for order in ("forward", "reversed", "shuffled"):
        guards = [guard(t) for t in base]
        with grid_order(order), Recorder() as recorder, guarded_outputs(guards):
            outputs = newton_schulz([g.view for g in guards[:3]], factors, steps=2, **OPTIONS)
        for g in guards:
            g.check()
        check_bounds(recorder, guards)
        check_races(recorder)
        results[order] = [o.clone() for o in outputs]
        for a, b in zip(results[order], results["forward"], strict=True):
            assert a.isfinite().all() and torch.equal(a, b)
    if not torch.cuda.is_available():
        assert len(recorder.launches) == 3 * 2 + 1


def test_symmetric_products_are_computed_once(device):
    if torch.cuda.is_available():
        pytest.skip("counts programs in the interpreter")
    with Recorder() as recorder, launch.launch_override("newton_schulz", BLOCK=16, BLOCK_K=16):
        newton_schulz(draw(device, [(64, 96)]), (1.0,), steps=1, **OPTIONS)
    assert [math.prod(launched.grid) for launched in recorder.launches] == [4 * 6, 10, 10, 4 * 6]


def test_no_step_is_refused(device):
    with pytest.raises(ValueError, match="at least 1 step"):
        newton_schulz(draw(device), (1.0,) * len(SHAPES), steps=0, **OPTIONS)


def test_only_bf16_iterations_of_fp32_updates_are_fused(device):
    u = torch.zeros(4, 4, device=device)
    assert is_fused(u, torch.bfloat16) and not is_fused(u, torch.float32) and not is_fused(u.double(), torch.bfloat16)
