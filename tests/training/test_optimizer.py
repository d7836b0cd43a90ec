"""Muon compared with PyTorch's, and the learning-rate schedule."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from tritale.model import GPT, GPTConfig
from tritale.training.config import OptimConfig
from tritale.training.optimizer import Muon, build_optimizers, lr_factor


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_in_bf16_takes_pytorchs_steps(shape):
    start, grads = torch.randn(2, *shape), torch.randn(5, 2, *shape)
    ours, theirs, truth = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(3))
    options: dict[str, Any] = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    a = Muon(ours, dtype=torch.bfloat16, **options)
    b = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    c = Muon(truth, dtype=torch.float32, **options)
    for step in grads:
        for p, q, t, g in zip(ours, theirs, truth, step, strict=True):
            p.grad, q.grad, t.grad = g.clone(), g.clone(), g.clone()
        for optimizer in (a, b, c):
            optimizer.step()
    for p, q, t, s in zip(ours, theirs, truth, start, strict=True):
        error, moved = (q - t).norm(), (t - s).norm()  # of bf16
        assert 0 < error < 0.05 * moved and (p - t).norm() < 1.5 * error


def test_muon_steps_are_nearly_orthogonal():
    p = torch.nn.Parameter(torch.zeros(20, 50))
    p.grad = torch.randn(20, 50)
    Muon([p], dtype=torch.float32, lr=1.0, weight_decay=0.0).step()
    singular = torch.linalg.svdvals(p.detach()) / (0.2 * 50**0.5)
    assert 0.5 < singular.min() and singular.max() < 1.5


def test_each_parameter_has_one_optimizer_and_only_matrices_decay():
    model = GPT(GPTConfig.preset("tiny", qk_norm=True))
    for matrices in ("muon", "adamw"):
        groups = [g for o in build_optimizers(model, OptimConfig(matrices=matrices), bf16=False) for g in o.param_groups]
        seen = [id(p) for g in groups for p in g["params"]]
        assert sorted(seen) == sorted(id(p) for p in model.parameters())
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert decayed == {id(p) for block in model.blocks for p in block.parameters() if p.ndim == 2}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_warms_up_and_ends_at_its_minimum(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=10, min_lr_ratio=0.1, decay_fraction=0.4)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == 1 and factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    if schedule == "wsd":
        assert factors[58] == 1 > factors[61]


def test_muon_changes_nothing_if_found_inf_is_1():
    start, grads = torch.randn(2, 16, 40), torch.randn(3, 2, 16, 40)
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    a, b = (Muon(p, dtype=torch.float32, lr=0.02, weight_decay=0.1) for p in (ours, theirs))
    for step in (grads[0], grads[1] / 0, grads[2]):
        a.found_inf = torch.tensor(float(not step.isfinite().all()))
        for p, q, g in zip(ours, theirs, step, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        a.step()
        if not a.found_inf:
            b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q) and torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])
    assert not any(torch.equal(p, s) for p, s in zip(ours, start, strict=True))
