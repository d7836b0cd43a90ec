"""A learning-rate range test (Smith 2015, arXiv 1506.01186): train some steps on the real data while the rate rises exponentially, and look
where the loss falls fastest and where it turns.

All rates of the optimizers rise together, in the proportion of their peaks, so that one number is found for Muon and AdamW as they are
configured. The rate of the test is the rate of a short, rising run; the best peak of a long one that decays lies near it, not on it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from ..common.files import atomic_file
from ..data.batches import Batches
from .step import Trial

SMOOTHING = 0.4  # standard deviation of the Gaussian that smooths the loss over the logarithm of the rate; a running mean would lag


@dataclass(frozen=True)
class Found:
    """The curve and what it says. Rates are of optim.lr."""

    rates: np.ndarray  # (steps,)
    losses: np.ndarray  # (steps,), nats per token
    smoothed: np.ndarray  # (steps,)
    steepest: float  # where the smoothed loss falls fastest
    lowest: float  # where it is lowest: beyond, steps are too long
    suggestion: float


def sweep(trial: Trial, batches: Batches, *, peak_lr: float, lowest: float, highest: float, steps: int) -> Iterator[tuple[float, float]]:
    """(rate, loss before the step of that rate) of each step; ends early where the loss leaves all hope: not finite, or above
    its first value by half of what it had fallen."""
    first = best = mean = None
    for step in range(steps):
        rate = lowest * (highest / lowest) ** (step / (steps - 1))
        for group in (group for optimizer in trial.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * rate / peak_lr
        loss = sum(trial.backward(batch, batches.tokens_per_step) for batch in batches.step(step)).item()
        if not math.isfinite(loss):
            return
        yield rate, loss
        trial.update()
        mean = loss if mean is None else 0.7 * mean + 0.3 * loss
        first, best = first or loss, min(best or mean, mean)
        if mean > max(first, best + 0.5 * (first - best)) + 0.5:
            return


def find(rates: list[float], losses: list[float]) -> Found:
    """What a sweep says: the geometric mean of the rate of steepest descent and a third of the rate of the lowest loss.

    Raises ValueError where the loss never falls."""
    x, y = np.log(rates), np.array(losses)
    if len(y) < 10:
        raise UserError(f"the loss left all bounds after {len(y)} steps; start lower (--lowest {rates[0] / 100:.0e})")
    weights = np.exp(-0.5 * ((x[:, None] - x) / SMOOTHING) ** 2)  # (steps, steps)
    smoothed = weights @ y / weights.sum(1)
    low = int(np.argmin(smoothed))
    if low < 3 or smoothed[0] - smoothed[low] < 0.02 * smoothed[0]:
        raise UserError(f"the loss does not fall between the rates {rates[0]:.1e} and {rates[-1]:.1e}; try other --lowest and --highest")
    slope = np.gradient(smoothed, x)
    steep = int(np.argmin(slope[: low + 1]))
    steepest, lowest = float(rates[steep]), float(rates[low])
    suggestion = float(f"{math.sqrt(steepest * lowest / 3):.1g}")
    return Found(np.array(rates), y, smoothed, steepest, lowest, suggestion)


def draw(found: Found, path: Path, *, configured: float) -> None:
    """Write the curve as a PNG. `configured`: optim.lr as it is. Raises ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the curve needs matplotlib: pip install 'tritale[plots]'") from None
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="0.8", linewidth=1, label="each step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", linewidth=2, label="smoothed")
    marks = (
        ("steepest", found.steepest, "tab:green", ":"),
        ("lowest loss", found.lowest, "tab:red", ":"),
        ("suggestion", found.suggestion, "tab:orange", "-"),
        ("as configured", configured, "black", "--"),
    )
    for name, rate, color, style in marks:
        axes.axvline(rate, color=color, linestyle=style, label=f"{name}: {rate:.2g}")
    low, high = found.smoothed.min(), found.losses[: max(10, len(found.losses) // 4)].max()
    axes.set(xscale="log", ylim=(low - 0.1 * (high - low), high + 0.15 * (high - low)))
    axes.set(xlabel="optim.lr (all rates in proportion)", ylabel="training loss, nats per token", title="Learning-rate range test")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as aside:
        figure.savefig(aside, format="png")
