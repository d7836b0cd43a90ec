"""The optimizers and the learning rate: AdamW for embedding, head and norms, AdamW or Muon for the matrices."""

import math

import torch
from torch import Tensor, nn

from .config import OptimConfig


class Muon(torch.optim.Muon):
    """torch.optim.Muon with its Newton–Schulz iteration in a chosen dtype and over all matrices of one shape at once.

    PyTorch's own iterates in bf16, one matrix after another. A CPU without bf16 instructions multiplies bf16 about 100 times slower than
    fp32 (docs/log.md), and small matrices leave a GPU idle. Same update, state and settings otherwise; Muon: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/; scaling of the step to AdamW's size: arXiv 2502.16982.
    """

    def __init__(self, params, *, dtype: torch.dtype, **options):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # Nesterov
                directions = self.orthogonalize(updates, group)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(directions.to(params[0].dtype).unbind()), alpha=-rate)

    def orthogonalize(self, g: Tensor, group: dict) -> Tensor:
        """U Vᵀ of each matrix of g (n, rows, columns), by the quintic Newton–Schulz iteration; singular values end in about 0.7 … 1.2."""
        a, b, c = group["ns_coefficients"]
        is_tall = g.shape[-2] > g.shape[-1]
        x = (g.mT if is_tall else g).to(self.dtype)
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if is_tall else x


def build_optimizers(model: nn.Module, config: OptimConfig, *, bf16: bool) -> list[torch.optim.Optimizer]:
    """AdamW and, where asked for, Muon. Weight decay is on matrices of the blocks only. Each group keeps its peak rate in "peak_lr"."""
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": rest, "lr": embedding_lr, "weight_decay": 0.0}]
    if config.matrices == "adamw":
        groups.append({"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay})
    optimizers = [torch.optim.AdamW(groups, betas=tuple(config.betas), eps=1e-8, fused=True)]
    if config.matrices == "muon":
        options = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        optimizers.append(Muon(matrices, dtype=torch.bfloat16 if bf16 else torch.float32, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, max_steps: int, config: OptimConfig) -> float:
    """The rate of 0-based `step` over its peak: linear warm-up, then cosine, or stable and linear decay; the last step has min_lr_ratio."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low, last = config.min_lr_ratio, max(max_steps - 1, config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (last - config.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = max(1, round(config.decay_fraction * max_steps))
    return max(low, min(1.0, low + (1 - low) * (last - step) / decay_steps))
