"""A learning-rate range test (Smith 2015, arXiv 1506.01186): train on the run's data while the learning rate rises exponentially, and find
where the loss falls fastest and where it is lowest.

All learning rates rise together in the proportion of their peaks, so one number is found for Muon and AdamW as configured. The test is
short and its rate never decays, so its suggestion is only near the best peak of a full run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from ..common.files import atomic_file
from ..data.batches import Batches
from .step import TrainingStep

SMOOTHING = 0.4  # standard deviation of a Gaussian over the logarithm of the rate; a running mean would lag


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test. Rates are values of optim.lr."""

    rates: np.ndarray  # (steps,)
    losses: np.ndarray  # (steps,), nats per token
    smoothed: np.ndarray  # (steps,)
    steepest: float  # the rate at which the smoothed loss falls fastest
    lowest: float  # the rate at which the smoothed loss is lowest
    suggestion: float


def sweep(step: TrainingStep, batches: Batches, *, lowest: float, highest: float, steps: int) -> Iterator[tuple[float, float]]:
    """(rate, loss before the update) of each step. Ends early if the loss diverges: it is not finite, or its running mean rises far above
    its minimum."""
    first = best = mean = None
    for i in range(steps):
        rate = lowest * (highest / lowest) ** (i / (steps - 1))
        step.run(batches.step(i), rate / step.config.optim.lr, n_targets=batches.n_targets(i))
        loss = step.mean_loss()
        if not math.isfinite(loss):
            return
        yield rate, loss
        mean = loss if mean is None else 0.7 * mean + 0.3 * loss
        first, best = first or loss, min(best or mean, mean)
        if mean > max(first, best + 0.5 * (first - best)) + 0.5:
            return


def analyze(rates: list[float], losses: list[float]) -> RangeTest:
    """Smooth the curve and suggest a rate: the geometric mean of the steepest rate and a third of the lowest rate.

    Raises UserError if the loss does not fall."""
    x, y = np.log(rates), np.array(losses)
    if len(y) < 10:
        raise UserError(f"the loss diverged after {len(y)} steps; start at a lower rate: --lowest {rates[0] / 100:.0e}")
    weights = np.exp(-0.5 * ((x[:, None] - x) / SMOOTHING) ** 2)  # (steps, steps)
    smoothed = weights @ y / weights.sum(1)
    low = int(np.argmin(smoothed))
    if low < 3 or smoothed[0] - smoothed[low] < 0.02 * smoothed[0]:
        raise UserError(f"the loss does not fall between the rates {rates[0]:.1e} and {rates[-1]:.1e}; try other --lowest and --highest")
    slope = np.gradient(smoothed, x)
    steep = int(np.argmin(slope[: low + 1]))
    steepest, lowest = float(rates[steep]), float(rates[low])
    suggestion = float(f"{math.sqrt(steepest * lowest / 3):.1g}")
    return RangeTest(np.array(rates), y, smoothed, steepest, lowest, suggestion)


def draw(found: RangeTest, path: Path, *, configured: float) -> None:
    """Write the curve as a PNG. `configured` is the config's optim.lr."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="0.8", linewidth=1, label="each step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", linewidth=2, label="smoothed")
    marks = (
        ("steepest", found.steepest, "tab:green", ":"),
        ("lowest loss", found.lowest, "tab:red", ":"),
        ("suggestion", found.suggestion, "tab:orange", "-"),
        ("configured", configured, "black", "--"),
    )
    for name, rate, color, style in marks:
        axes.axvline(rate, color=color, linestyle=style, label=f"{name}: {rate:.2g}")
    low, high = found.smoothed.min(), found.losses[: max(10, len(found.losses) // 4)].max()
    axes.set(xscale="log", ylim=(low - 0.1 * (high - low), high + 0.15 * (high - low)))
    axes.set(xlabel="optim.lr (all rates in proportion)", ylabel="training loss, nats per token", title="Learning-rate range test")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
