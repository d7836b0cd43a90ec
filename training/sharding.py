"""Weights, gradients and optimizer state divided among the processes: FSDP, by PyTorch's `fully_shard`.

Each process holds a part of the rows of each parameter. The weights of a block are gathered before its forward and its backward pass and
freed afterwards, and its gradients are summed over the processes to those of the parts. The optimizers work on the parts as plain tensors.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.checkpoint import empty_model
from ..model.gpt import GPT
from .processes import Processes


class Shards:
    """The parts of a GPT's parameters in this process. All processes make the same calls in the same order."""

    def __init__(self, model: GPT, here: Processes):
        self.config, mesh = model.config, init_device_mesh(here.device.type, (here.world_size,))
        for module in (*cast(nn.ModuleList, model.blocks), model):
            sharded = cast(FSDPModule, fully_shard(module, mesh=mesh))
            sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the targets of all processes
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._sharded = [cast(DTensor, p) for p in model.parameters()]
        self.parts: list[nn.Parameter] = [nn.Parameter(cast(DTensor, p.detach()).to_local()) for p in self._sharded]  # the same memory
        self._layout: dict[Tensor, DTensor] = dict(zip(self.parts, self._sharded, strict=True))

    def take_gradients(self) -> list[Tensor]:
        """The gradients of the parts, after a backward pass."""
        gradients = [cast(DTensor, p.grad).to_local() for p in self._sharded]
        for p in self._sharded:
            p.grad = None
        return gradients

    def whole(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Gather a tensor that is divided as `parameter`, one of `parts`."""
        p = self._layout[parameter]
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()).full_tensor()

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """This process's part of a tensor that is to be divided as `parameter`, one of `parts`."""
        p = self._layout[parameter]
        return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()

    @torch.no_grad()
    def whole_model(self, parts: Sequence[Tensor], device: torch.device) -> GPT:
        """A model with all the weights, gathered from `parts`, one parameter after the other."""
        model = empty_model(self.config, device).requires_grad_(False)
        for p, part, parameter in zip(model.parameters(), parts, self.parts, strict=True):
            p.copy_(self.whole(part, parameter))
        return model
