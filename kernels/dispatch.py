"""Which implementation an op runs. Today that is PyTorch's on every device: the Triton kernels are not part of the package yet."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "torch")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one implementation: "auto" (by device) or "torch".

    Raises ValueError for another name, "triton" among them until there are kernels."""
    if name == "triton":
        raise ValueError("backend 'triton' has no kernels in this version; choose one of auto, torch")
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    yield


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on (fp64 stays), unchanged elsewhere; what a matrix product of torch does."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
