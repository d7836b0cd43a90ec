"""Low-rank adapters (LoRA, arXiv 2106.09685): beside a frozen matrix W, two small ones are trained.

    y = x Wᵀ + alpha / rank · (x Aᵀ) Bᵀ        A: (rank, columns of W)        B: (rows of W, rank)

Each projection that is packed in a matrix of a block has its own A and B, so that they are an adapter of PEFT.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpt import GPT

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # of the names in a file of PEFT


class LoRALinear(nn.Module):
    """A frozen matrix with an adapter for some of the projections in it. `parts` has the shapes of all of them, in order."""

    def __init__(self, linear: nn.Linear, parts: dict[str, tuple[int, int]], targets: Sequence[str], rank: int, scale: float):
        super().__init__()
        self.weight, self.scale = linear.weight, scale
        self.rows = [n for n, _ in parts.values()]
        self.targets = [name for name in parts if name.split(".")[1] in targets]
        self.places = [list(parts).index(name) for name in self.targets]
        new = lambda *shape: nn.Parameter(torch.zeros(shape, device=linear.weight.device))
        self.a = nn.ParameterList(new(rank, parts[name][1]) for name in self.targets)
        self.b = nn.ParameterList(new(parts[name][0], rank) for name in self.targets)
        for a in self.a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # (…, columns) → (…, rows)
        parts = list(F.linear(x, self.weight).split(self.rows, dim=-1))
        for place, a, b in zip(self.places, self.a, self.b, strict=True):
            parts[place] = parts[place] + self.scale * F.linear(F.linear(x, a), b)
        return torch.cat(parts, dim=-1)


def add_adapters(model: GPT, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze a model and add an adapter to each target of each block. Until it is trained the model computes what it did, since B is 0."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, parts in model.config.projections.items():
            if any(part.split(".")[1] in targets for part in parts):
                setattr(block, name, LoRALinear(getattr(block, name), parts, targets, rank, alpha / rank))
    model.adapters = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}


def adapter_state(model: GPT) -> dict[str, Tensor]:
    """A and B of each target under PEFT's names."""
    state = {}
    for i, block in enumerate(model.blocks):
        for module in (module for module in block.children() if isinstance(module, LoRALinear)):
            for name, a, b in zip(module.targets, module.a, module.b, strict=True):
                prefix = f"{PREFIX}model.layers.{i}.{name}"
                state |= {f"{prefix}.lora_A.weight": a.detach(), f"{prefix}.lora_B.weight": b.detach()}
    return state


def merged(weights: dict[str, Tensor], adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, with scale · B A added to those of the targets, in fp32. Raises KeyError or RuntimeError if the
    adapter does not fit."""
    result = dict(weights)
    for name in (name for name in adapter if name.endswith(".lora_A.weight")):
        target, b = name.removeprefix(PREFIX).replace("lora_A.", ""), adapter[name.replace("lora_A", "lora_B")]
        result[target] = weights[target].float() + b @ adapter[name] * scale
    return result
