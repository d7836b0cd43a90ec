"""The optimizers and the learning-rate schedule."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* and torch._fused_sgd_ are the functions that torch.optim is built on.

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.newton_schulz import is_fused, newton_schulz
from ..model.gpt import GPT
from .config import OptimConfig
from .sharding import Shards


class Muon(torch.optim.Muon):
    """torch.optim.Muon with the Newton–Schulz iteration in a given dtype, for many matrices at once.

    PyTorch's Muon iterates in bf16, one matrix at a time. A CPU without bf16 instructions multiplies bf16 about 100 times slower than
    fp32 (docs/log.md), and small matrices do not fill a GPU. In bf16 on a GPU, kernels iterate all matrices of at most `FUSED` rows or
    columns together; other matrices are batched by shape. Update, state and settings are PyTorch's. Muon: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/. The update is scaled to the size of AdamW's: arXiv 2502.16982.

    With `found_inf`, a scalar on the device as of PyTorch's fused optimizers, a step where it is 1 changes neither weights nor state. With
    `shards` the parameters are parts of matrices; each process gathers the updates and orthogonalizes whole matrices.
    """

    FUSED = 2048  # of the smaller dimension; larger matrices fill a GPU one by one, and PyTorch's products are faster

    def __init__(self, params, *, dtype: torch.dtype, **options):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.dtype = dtype
        self.found_inf: Tensor | None = None
        self.shards: Shards | None = None

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, buffers = [cast(Tensor, p.grad) for p in params], [self._momentum(p) for p in params]
            settings: dict[str, Any] = dict(momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False, found_inf=self.found_inf)
            # buffers ← buffers − (1 − momentum) (buffers − grads), in one pass that found_inf skips
            torch._fused_sgd_(buffers, grads, [], lr=1 - group["momentum"], weight_decay=1.0, maximize=True, **settings)
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
            if self.shards:
                whole = [self.shards.whole(u, p) for u, p in zip(updates, params, strict=True)]
                changes = [self.shards.part(d, p) for d, p in zip(self._directions(whole, group), params, strict=True)]
            else:
                changes = self._directions(list(updates), group)
            # params ← params − lr (changes + weight_decay · params); lr may be a tensor on the device
            torch._fused_sgd_(params, changes, [], lr=group["lr"], weight_decay=group["weight_decay"], maximize=False, **settings)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _directions(self, updates: list[Tensor], group: dict) -> list[Tensor]:
        """The orthogonalized updates, each times 0.2 √(larger dimension), in their order and dtype."""
        options = dict(coefficients=group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"])
        by_shape: dict[torch.Size | None, list[int]] = {}  # None: all matrices that one call of the kernels takes
        for i, u in enumerate(updates):
            fits = is_fused(u, self.dtype) and min(u.shape) <= self.FUSED
            by_shape.setdefault(None if fits else u.shape, []).append(i)
        directions = list(updates)
        for shape, places in by_shape.items():
            if shape is None:
                factors = tuple(0.2 * math.sqrt(max(updates[i].shape)) for i in places)
                results = newton_schulz([updates[i] for i in places], factors, **options)
            else:
                x = reference.newton_schulz(torch.stack([updates[i] for i in places]).to(self.dtype), **options)
                x = x.contiguous()  # _fused_sgd_ on a CPU takes no strides into account
                results = (x.to(updates[0].dtype) * (0.2 * math.sqrt(max(shape)))).unbind()
            for i, result in zip(places, results, strict=True):
                directions[i] = result
        return directions


def build_optimizers(model: GPT, config: OptimConfig, *, bf16: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon if the config chooses it. Only matrices of the blocks decay. Each group has its peak learning rate in "peak_lr".

    On a GPU the learning rates are tensors there, so that a CUDA graph of a step reads the current ones."""
    device = model.embedding.device
    on_gpu = device.type == "cuda"
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": rest, "lr": embedding_lr, "weight_decay": 0.0}]
    if config.matrices == "adamw":
        groups.append({"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay})
    beta1, beta2 = config.betas
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(beta1, beta2), eps=1e-8, fused=True, capturable=on_gpu)]
    if config.matrices == "muon":
        options = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        optimizers.append(Muon(matrices, dtype=torch.bfloat16 if bf16 else torch.float32, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
            if on_gpu:
                group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every group to `factor` times its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rate = factor * group["peak_lr"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Together(torch.optim.Optimizer):
    """Several optimizers as one for the gradient scaler, so that an overflow in the gradients of one skips the step of all."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure
        for optimizer in self.optimizers:
            optimizer.step()


def state_shapes(optimizers: list[torch.optim.Optimizer], names: dict[Tensor, str]) -> dict[str, torch.Size]:
    """{"parameter/key": shape} of the optimizers' state after a step; all tensors are fp32."""
    shapes = {}
    for optimizer in optimizers:
        keys = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            shapes |= {f"{names[p]}/{key}": torch.Size() if key == "step" else p.shape for key in keys}
    return shapes


def lr_factor(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate of a 0-based step, divided by its peak: linear warm-up, then the schedule, which ends at min_lr_ratio."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low, last = config.min_lr_ratio, max(max_steps - 1, config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (last - config.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = max(1, round(config.decay_fraction * max_steps))
    return max(low, min(1.0, low + (1 - low) * (last - step) / decay_steps))
