"""The range test on curves with a known answer, and on a small model."""

import dataclasses

import numpy as np
import pytest
import torch
from runs import TINY

from tritale.data.batches import Batches
from tritale.data.built_in import open_data
from tritale.training.config import parse
from tritale.training.lr_find import analyze, draw, sweep
from tritale.training.plan import DataFacts, plan
from tritale.training.step import TrainingStep

from .test_plan import CPU, HERE


def curve(fastest: float, turn: float, noise: float, rng) -> tuple[list[float], list[float]]:
    """A loss that falls fastest around `fastest` and rises above `turn`."""
    rates = np.geomspace(1e-5, 1, 200)
    losses = 8 - 3 / (1 + (rates / fastest) ** -2) + 4 * np.log(np.maximum(rates / turn, 1)) ** 2
    return rates.tolist(), (losses + noise * rng.standard_normal(200)).tolist()


def test_a_known_curve_gives_its_rates(seed):
    rng = np.random.default_rng(seed)
    for fastest, turn in ((1e-3, 3e-2), (1e-2, 2e-1)):
        found = analyze(*curve(fastest, turn, 0.03, rng))
        assert fastest / 2.5 < found.steepest < 4 * fastest and turn / 6 < found.lowest < 2 * turn
        assert found.steepest / 3 < found.suggestion <= found.lowest / 1.5


@pytest.mark.parametrize("losses", [[8.0] * 50, list(np.linspace(8, 12, 50))])
def test_a_loss_that_never_falls_is_refused(losses):
    with pytest.raises(ValueError, match="does not fall"):
        analyze(np.geomspace(1e-5, 1, 50).tolist(), losses)


def test_a_sweep_of_few_steps_is_refused():
    with pytest.raises(ValueError, match="after 3 steps; start at a lower rate"):
        analyze([1.0, 2.0, 3.0], [8.0, 9.0, 20.0])


def step_of(tiny_run, **changes):
    options = TINY | {"out_dir": tiny_run} | {k.replace("__", "."): v for k, v in changes.items()}
    config = parse([part for k, v in options.items() for part in (f"--{k}", str(v))])
    _, split, _ = open_data(tiny_run / "data")
    planned = plan(config, DataFacts.of(split), dataclasses.replace(CPU, compiler_missing="not here"))
    return TrainingStep(planned, HERE), Batches(split, context=64, micro_batch=2, global_batch=4, seed=config.seed)


def test_all_rates_rise_together_and_steps_are_made(tiny_run):
    step, batches = step_of(tiny_run, optim__lr=0.01, optim__embedding_lr=0.03)
    before = [p.detach().clone() for p in step.model.parameters()]
    rates = []
    for rate, loss in sweep(step, batches, lowest=1e-4, highest=1e-2, steps=20):
        groups = [g for o in step.optimizers for g in o.param_groups]
        assert [g["lr"] for g in groups] == pytest.approx([3 * rate, rate]) and loss > 0
        rates.append(rate)
    assert rates == pytest.approx(np.geomspace(1e-4, 1e-2, 20).tolist())
    assert not any(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_a_sweep_ends_when_the_loss_diverges(tiny_run):
    step, batches = step_of(tiny_run, optim__matrices="adamw")
    points = list(sweep(step, batches, lowest=1e-4, highest=1e4, steps=60))
    assert 10 < len(points) < 60 and points[-1][1] > points[0][1]


def test_the_curve_is_a_png(tmp_path, seed):
    pytest.importorskip("matplotlib")
    found = analyze(*curve(1e-3, 3e-2, 0.05, np.random.default_rng(seed)))
    draw(found, tmp_path / "deep" / "curve.png", configured=0.01)
    assert (tmp_path / "deep" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["curve.png"]
