"""Bad steps and spikes: the loss and the gradient norm of every step stay on the device until they are read together."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS = 256  # steps that the device keeps; reading them waits for the device
SEEN = 20  # good steps before a loss can be called a spike
RATE = 0.02  # of the running mean and variance, after 1 / RATE steps


@dataclass
class Health:
    """What the steps so far have shown; a checkpoint holds it. A step is bad if its loss or its gradient norm is not finite."""

    steps: int = 0
    bad_steps: int = 0
    bad_in_row: int = 0  # of them, the last steps without a good one since
    good_steps: int = 0
    spikes: int = 0
    norm: float = 0.0  # of the gradient in the last good step
    mean: float = 0.0  # of the losses of good steps, running
    variance: float = 0.0
    losses: list[float] = field(default_factory=list)  # the finite ones since the last `take_loss`
    reports: list[str] = field(default_factory=list)  # of spikes, since the last `take_reports`

    def add(self, loss: float, norm: float, threshold: float) -> None:
        """Count a step. Its loss is a spike if it is above the running mean by more than `threshold` × the running spread (0: never)."""
        self.steps += 1
        if math.isfinite(loss):
            self.losses.append(loss)
        if not math.isfinite(loss + norm):
            self.bad_steps += 1
            self.bad_in_row += 1
            return
        self.bad_in_row, self.good_steps, self.norm = 0, self.good_steps + 1, norm
        difference, spread = loss - self.mean, math.sqrt(self.variance)
        is_spike = 0 < threshold * spread < difference and self.good_steps > SEEN
        rate = max(RATE, 1 / self.good_steps)
        if is_spike:
            self.spikes += 1
            times = f"{difference / spread:.1f} × the running spread ({spread:.3f})"
            self.reports.append(f"step {self.steps}: a spike, the loss of {loss:.3f} is {times} above its mean ({self.mean:.3f})")
            difference = threshold * spread  # or the next spikes would seem usual
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)

    def take_loss(self) -> float:
        """The mean of the finite losses since the last call, NaN if there was none."""
        losses, self.losses = self.losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def take_reports(self) -> list[str]:
        reports, self.reports = self.reports, []
        return reports

    def values(self, loss: float) -> dict[str, float]:
        """What a line of metrics.jsonl says: the loss if one was finite, and the gradient norm if the last step was good."""
        found = ({"loss": loss} if math.isfinite(loss) else {}) | ({} if self.bad_in_row else {"grad_norm": self.norm})
        return found | {name: getattr(self, name) for name in ("bad_steps", "spikes") if getattr(self, name)}


class Recorder:
    """The losses and gradient norms of the last steps on a device. `record` does not synchronise, and a CUDA graph may contain it."""

    def __init__(self, device: torch.device):
        self._rows, self._place = torch.zeros(ROWS, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        self.is_bad = torch.zeros((), device=device)  # 0 or 1, of the last step

    def record(self, loss: Tensor, norm: Tensor) -> None:
        """Keep the loss and the norm of a step, fp32 scalars, and set `is_bad`."""
        row = torch.stack((loss, norm))
        self._rows.index_copy_(0, self._place, row[None])
        self._place.add_(1)
        zero = row.sum().mul_(0)  # NaN if one of them is not finite
        torch.ne(zero, zero, out=self.is_bad)

    def take(self, n: int) -> list[list[float]]:
        """The (loss, norm) of the last `n` steps, all since the last call. Waits for the device."""
        rows = self._rows[:n].tolist()
        self._place.zero_()
        return rows
