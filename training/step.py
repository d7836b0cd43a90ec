"""The training step that train.py, `tritale plan` and `tritale lr-find` share."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_add_ is the function that torch.optim is built on.

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.graphs import WARM_UP, Graphed
from ..common.run_folder import find_checkpoint
from ..data.batches import Batch
from ..model.checkpoint import Base, load_weights, merged_model
from ..model.gpt import GPT
from ..model.lora import add_adapters
from . import processes
from .config import RunConfig, divisors
from .health import ROWS, Health, Recorder
from .optimizer import Muon, Together, build_optimizers, lr_factor, set_rates, state_shapes
from .plan import Plan, size
from .preference import STATISTICS, answer_log_probs, dpo_loss
from .sharding import Shards

MEASURE_SECONDS = 10  # after the compilation


@contextlib.contextmanager
def explain_errors(config: RunConfig) -> Iterator[None]:
    """Raises UserError, which names the setting to lower, in place of an out-of-memory error of PyTorch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):  # on a CPU
            raise
        n = config.train.micro_batch
        smaller = max((d for d in divisors(config.train.global_batch) if d <= n // 2), default=None)
        remedy = (
            f"add --train.micro_batch {smaller} (a step keeps its number of tokens)" if smaller else "lower model.context or model.width"
        )
        raise UserError(f"out of memory with train.micro_batch {n}; {remedy}, and run the command again") from None


class TrainingStep:
    """A fresh model with its optimizers; `run` makes one optimizer step.

    A bad step, whose loss or gradient norm is not finite, changes no weight and no state of the optimizers; `health` counts it. With
    `train.ema`, `averages` is the running mean of the weights. On a GPU, `train.compile` also captures a micro-batch and the update
    as CUDA graphs, each launched by one call."""

    def __init__(self, planned: Plan, here: processes.Processes):
        config, precision = planned.config, planned.device.precision
        self.config, self.here = config, here
        fixed = planned.memory.weights + planned.memory.gradients + planned.memory.optimizer
        if fixed > planned.device.free_memory:
            raise UserError(
                f"the model needs {size(fixed)} for its weights, gradients and optimizer, and {size(planned.device.free_memory)} of memory "
                "are free; lower model.n_layer, model.width, model.mlp_width or the vocabulary"
            )
        torch.manual_seed(config.seed)
        self.model = GPT(planned.shape).to(here.device)
        self.base: Base | None = None  # of adapters
        if config.init_from:
            folder = find_checkpoint(Path(config.init_from))
            load_weights(self.model, folder)
            if config.lora.rank:
                self.base = Base.at(folder)
                add_adapters(self.model, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
        processes.copy_from_main(list(self.model.parameters()))
        self.parameters: list[nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(self.model, config.optim, bf16=precision == "bf16")
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self.state_shapes = state_shapes(self.optimizers, names)
        self.shards = None
        if config.train.parallel == "fsdp" and here.world_size > 1:
            if precision == "fp16":
                raise UserError("train.parallel fsdp does not take fp16; add --train.precision fp32, or train.parallel ddp")
            whole, self.shards = self.parameters, Shards(self.model, here)
            self.parameters = self.shards.parts
            part_of: dict[Tensor, nn.Parameter] = dict(zip(whole, self.parameters, strict=True))
            names = {part_of[p]: name for p, name in names.items()}
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["params"] = [part_of[p] for p in group["params"]]
        self.names: dict[Tensor, str] = names  # of the parameters; with FSDP of their parts in this process
        # The gradients and the step's loss are views of one tensor, so that clearing and exchanging them is one operation each.
        self.gradients = torch.zeros(sum(p.numel() for p in self.parameters) + 1, device=here.device)
        *views, loss = self.gradients.split([*(p.numel() for p in self.parameters), 1])
        self.grads, self.loss = [view.view_as(p) for p, view in zip(self.parameters, views, strict=True)], loss[0]
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad
        self.optimizer = Together(self.optimizers)
        self.recorder, self.health = Recorder(here.device), Health()
        self.n_recorded = 0  # steps that `health` has not counted yet
        for optimizer in self.optimizers:
            optimizer.found_inf = self.recorder.is_bad  # pyright: ignore[reportAttributeAccessIssue]  # their kernels skip if it is 1
            if isinstance(optimizer, Muon):
                optimizer.shards = self.shards
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.train.ema and not self.shards else None
        self.averages: list[Tensor] = [*self.ema.parameters()] if self.ema else []
        if config.train.ema and self.shards:
            self.averages = [p.detach().clone() for p in self.parameters]
        self.ema_rate = torch.zeros((), device=here.device)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=precision == "fp16")
        self.autocast = processes.autocast(here.device, precision)
        self.module: nn.Module = self.model
        self.forward_backward, self.clip_and_step = self._forward_backward, self._clip_and_step
        if config.train.compile and not planned.device.compiler_missing and not self.shards:
            processes.trust_vector_instructions()
            self.module = cast(nn.Module, torch.compile(self.module, dynamic=False))
            if here.device.type == "cuda":
                self.forward_backward = Graphed(self._forward_backward)
                if not self.scaler.is_enabled():  # whether an fp16 step is skipped is decided on the host
                    self.clip_and_step = Graphed(self._clip_and_step)
        # The loss of a micro-batch is its sum over the targets, divided by their number in the step over all processes.
        self.normalizer = torch.tensor(planned.tokens_per_step, dtype=torch.float32, device=here.device)
        # STATISTICS and the number of pairs: sums of the step, and of the steps since the last `mean_preference`
        self.step_preference, self.preference = torch.zeros(2, len(STATISTICS) + 1, device=here.device)
        self.data_seconds = 0.0  # that `run` waited for batches; the caller resets it

    def lr_factor(self, step: int) -> float:
        """The learning rate of a 0-based step, divided by its peak."""
        return lr_factor(step, self.config.train.max_steps, self.config.optim)

    def run(self, batches: Iterable[Batch], lr_factor: float, step: int = 0, n_targets: float | None = None) -> Tensor:
        """One optimizer step on the micro-batches of this process, with learning rates of `lr_factor` times their peaks. The 0-based `step`
        only concerns the EMA, in which the first steps weigh more. The loss is divided by `n_targets`, the sum of their weights over all
        processes; by all tokens of a step if it is not given.

        Returns the gradient's norm before clipping, until the next step. Does not synchronise with the device, except in fp16 and once in
        `ROWS` steps."""
        set_rates(self.optimizers, lr_factor)
        if n_targets:
            self.normalizer.fill_(n_targets)
        if self.averages:
            self.ema_rate.fill_(1 - min(self.config.train.ema or 0.0, (1 + step) / (10 + step)))
        waiting_since = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - waiting_since
            self.backward(batch)
            waiting_since = time.perf_counter()
        return self.update()

    def backward(self, batch: Batch) -> None:
        """Add the gradients and the loss of one micro-batch."""
        self.forward_backward(*batch.on(self.here.device))

    def _loss(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, reference: Tensor | None, weights: Tensor | None) -> Tensor:
        """The loss of a micro-batch: its sum over `normalizer`."""
        with self.autocast():
            if reference is None:
                options = {"normalizer": self.normalizer, "z_loss": self.config.train.z_loss, "token_weight": weights}
                return self.module(tokens, targets, cu_seqlens=cu_seqlens, **options)
            nll = self.module(tokens, targets, cu_seqlens=cu_seqlens, reduction="none")
        assert cu_seqlens is not None
        log_probs, counts = answer_log_probs(nll, targets, cu_seqlens, len(reference))
        loss, values = dpo_loss(log_probs, reference, counts, self.config.dpo)
        self.step_preference += values
        return loss.sum() / self.normalizer

    def _forward_backward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, reference: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        loss = self._loss(tokens, targets, cu_seqlens, reference, weights)
        if self.shards:
            loss.backward()
            torch._foreach_add_(self.grads, self.shards.take_gradients())
        else:  # not backward(), which would add the gradients one by one
            torch._foreach_add_(self.grads, torch.autograd.grad(self.scaler.scale(loss), self.parameters))
        return self.loss.add_(loss.detach())

    def update(self) -> Tensor:
        """Sum the gradients over the processes, clip them, step the optimizers, clear the gradients. Returns the norm before clipping."""
        processes.total(self.loss if self.shards else self.gradients)
        grad_norm = self.clip_and_step()
        self.n_recorded += 1
        if self.n_recorded == ROWS:
            self.count()
        return grad_norm

    @torch.no_grad()  # or the averages keep a graph of all steps
    def _clip_and_step(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.get_total_norm(self.grads)
        if self.shards:
            grad_norm = processes.total(grad_norm.square()).sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.train.grad_clip, grad_norm)
        self.recorder.record(self.loss, grad_norm)
        if self.config.objective == "dpo":
            is_finite = (self.loss + self.step_preference.sum()).isfinite()
            self.preference += torch.where(is_finite, self.step_preference, 0)
            self.step_preference.zero_()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averages:
            changes = list(torch._foreach_sub([*self.parameters], self.averages))
            torch._foreach_mul_(changes, self.ema_rate)
            torch._foreach_add_(self.averages, changes)
        self.gradients.zero_()
        return grad_norm

    def whole_model(self, *, ema: bool = False, device: torch.device | None = None) -> GPT:
        """The model, or with `ema` the one with the running mean of the weights. With adapters it is a copy in which they are merged. With
        FSDP it is a copy on `device` that holds all weights, and all processes must call this."""
        if self.shards:
            return self.shards.whole_model(self.averages if ema else self.parameters, device or self.here.device)
        if self.base:
            return merged_model(self.model)
        model = self.ema if ema else self.model
        assert model is not None
        return model

    @torch.no_grad()
    def set_weights(self, model: GPT, *, ema: bool = False) -> None:
        """With FSDP, take this process's part of the weights of a whole model, which `whole_model` has returned."""
        if self.shards:
            for part, p, whole in zip(self.averages if ema else self.parameters, self.parameters, model.parameters(), strict=True):
                part.copy_(self.shards.part(whole, p))

    def release_memory(self) -> None:
        """Give back the memory that only the next step needs, before other work on the device."""
        for call in (self.forward_backward, self.clip_and_step):
            if isinstance(call, Graphed):
                call.release()

    def mean_preference(self) -> dict[str, float]:
        """STATISTICS of preference training, averaged over the pairs since the last call whose step has a finite loss. {} if there are
        none."""
        if self.config.objective != "dpo":
            return {}
        *sums, n_pairs = processes.total(self.preference).tolist()
        self.preference.zero_()
        return {name: value / n_pairs for name, value in zip(STATISTICS, sums, strict=True)} if n_pairs else {}

    def count(self) -> None:
        """Count the steps since the last call in `health`. Waits for the device."""
        for loss, norm in self.recorder.take(self.n_recorded):
            self.health.add(loss, norm, self.config.train.spike)
        self.n_recorded = 0

    def mean_loss(self) -> float:
        """The loss in nats per token, averaged over the processes and the steps since the last call in which it is finite; NaN if there was
        none."""
        self.count()
        return self.health.take_loss()

    def check_finite(self, step: int, **values: float) -> None:
        """Raises FloatingPointError if one of the values is not finite; without values, if a weight or the optimizers' state is not."""
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not values:
            tensors = [*self.parameters, *(t for o in self.optimizers for state in o.state.values() for t in state.values())]
            norms = torch._foreach_norm([t.detach() for t in tensors if t.numel()], math.inf)  # a process may have no part of a parameter
            is_finite = processes.total(torch.stack(norms).isfinite().logical_not().sum()) == 0
            if not is_finite:
                wrong = ["a weight or the optimizer's state is not finite"]
        if wrong:
            raise self.diverged(step, f"{', '.join(wrong)}; nothing of it was saved")

    def diverged(self, step: int, reason: str) -> FloatingPointError:
        """The error that ends the run, with the remedy."""
        rates = {"optim.lr": self.config.optim.lr, "optim.embedding_lr": self.config.optim.embedding_lr}
        options = " ".join(f"--{key} {rate / 3:.1g}" for key, rate in rates.items() if rate)
        return FloatingPointError(
            f"step {step}: {reason}. Lower the learning rate: add {options} --resume force, "
            "which resumes from the last checkpoint if there is one"
        )


def random_batch(planned: Plan, micro_batch: int) -> Batch:
    """A micro-batch of random tokens in documents of the data's mean length."""
    n = micro_batch * planned.sequence
    tokens = torch.randint(planned.shape.vocab_size, (1, n))
    if not planned.config.data.document_mask:
        rows = tokens.view(micro_batch, planned.sequence)
        return Batch(rows, rows.clone(), None)
    length = max(1, min(planned.sequence, round(planned.data.document_length(planned.sequence))))
    return Batch(tokens, tokens.clone(), torch.tensor([*range(0, n, length), n], dtype=torch.int32))


def measure(planned: Plan, here: processes.Processes, track: Callable[[Iterable[int], str], Iterable[int]]) -> tuple[float, int]:
    """(seconds of an optimizer step, the micro-batch it was measured with): medians over micro-batches of random tokens and over updates.

    A CPU reaches its full speed with 2,048 tokens at a time, so no more are measured there. Excludes communication between processes,
    validation and checkpoints."""
    largest = planned.largest_micro_batch or 1
    if here.device.type == "cpu":
        largest = min(largest, max(1, 2048 // planned.sequence))
    micro_batch = min(planned.config.train.micro_batch, largest)
    step, batch = TrainingStep(planned, here), random_batch(planned, micro_batch)

    def seconds(work: Callable[[], object]) -> float:
        processes.synchronize(here.device)
        start = time.perf_counter()
        work()
        processes.synchronize(here.device)
        return time.perf_counter() - start

    backwards, updates = [], []
    for i in track(range(9), "measuring a step"):
        if i < 6 or sum(backwards) + sum(updates) < MEASURE_SECONDS:
            timed = seconds(lambda: step.backward(batch)), seconds(step.update)
            if i > WARM_UP:  # the first compile, the next captures
                backwards.append(timed[0])
                updates.append(timed[1])
    per_process = planned.config.train.global_batch // planned.device.count
    return statistics.median(backwards) * per_process / micro_batch + statistics.median(updates), micro_batch
