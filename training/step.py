"""Training steps apart from any run: `tritale plan` times a few, `tritale lr-find` raises the learning rate over some hundred."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from ..data.batches import Batch
from ..model.gpt import GPT
from . import processes
from .optimizer import build_optimizers
from .plan import Plan

SECONDS = 10  # of measuring, after the compilation


class Trial:
    """A fresh model with its optimizers. Its steps are train.py's, in one process."""

    def __init__(self, planned: Plan, device: torch.device):
        config, precision = planned.config, planned.device.precision
        torch.manual_seed(config.seed)
        self.device, self.grad_clip, self.z_loss = device, config.train.grad_clip, config.train.z_loss
        self.model = GPT(planned.shape).to(device)
        self.optimizers = build_optimizers(self.model, config.optim, bf16=precision == "bf16")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.autocast = processes.autocast(device, precision)
        compiles = config.train.compile and not planned.device.compiler_missing
        self.run = torch.compile(self.model, dynamic=False) if compiles else self.model

    def backward(self, batch: Batch, n_tokens: int) -> torch.Tensor:
        """Add one micro-batch's gradients; its loss is the sum over its tokens divided by `n_tokens`, those of the step."""
        tokens, targets, cu_seqlens = batch.on(self.device)
        normalizer = torch.tensor(n_tokens, dtype=torch.float32, device=self.device)
        with self.autocast():
            loss = self.run(tokens, targets, cu_seqlens=cu_seqlens, normalizer=normalizer, z_loss=self.z_loss)
            self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
        self.scaler.update()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def random_batch(planned: Plan, micro_batch: int) -> Batch:
    """A micro-batch of random tokens in documents of the data's mean length."""
    n = micro_batch * planned.sequence
    tokens = torch.randint(planned.shape.vocab_size, (1, n))
    if not planned.config.data.document_mask:
        rows = tokens.view(micro_batch, planned.sequence)
        return Batch(rows, rows.clone(), None)
    length = max(1, min(planned.sequence, round(planned.data.document_length(planned.sequence))))
    return Batch(tokens, tokens.clone(), torch.tensor([*range(0, n, length), n], dtype=torch.int32))


def measure(planned: Plan, device: torch.device, track: Callable[[Iterable, str], Iterable]) -> tuple[float, int]:
    """(seconds of an optimizer step, micro-batch it was measured with): medians of some micro-batches of random tokens and some updates.
    A CPU is as fast with 2,048 tokens at a time as with more, so that many are measured. What several processes tell each other, validation
    and checkpoints are not in it."""
    most = planned.largest_micro_batch or 1
    if device.type == "cpu":
        most = min(most, max(1, 2048 // planned.sequence))
    micro_batch = min(planned.config.train.micro_batch, most)
    trial, batch = Trial(planned, device), random_batch(planned, micro_batch)

    def seconds(work: Callable[[], object]) -> float:
        trial.wait()
        start = time.perf_counter()
        work()
        trial.wait()
        return time.perf_counter() - start

    passes, updates = [], []
    for i in track(range(9), "measuring a step"):
        if i < 4 or sum(passes) + sum(updates) < SECONDS:
            timed = [seconds(lambda: trial.backward(batch, batch.tokens.numel())), seconds(trial.update)]
            if i:  # the first compiles
                passes.append(timed[0])
                updates.append(timed[1])
    per_process = planned.config.train.global_batch // planned.device.count
    return statistics.median(passes) * per_process / micro_batch + statistics.median(updates), micro_batch
