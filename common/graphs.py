"""CUDA graphs: a whole sequence of kernels is launched by one call, so that the speed of Python does not limit a small model."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

WARM_UP = 2  # calls


class Graphed:
    """A function of tensors on a GPU that is captured as a CUDA graph at its third call. From then on a call is one launch.

    The first two calls run the function: they compile, and create the tensors that stay. All tensors that the function reads or writes,
    except its arguments, must stay where they are. The arguments are copied into fixed memory; a call whose arguments have other shapes
    than those of the first runs the function. The result is in memory that the next call overwrites. The graph keeps the memory that the
    function needed."""

    def __init__(self, function: Callable[..., Tensor]):
        self._function, self._calls = function, 0
        self._inputs: list[Tensor | None] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        if not self._calls:
            self._inputs = [None if t is None else t.clone() for t in arguments]
        self._calls += 1
        if self._calls <= WARM_UP or list(map(_shape, arguments)) != list(map(_shape, self._inputs)):
            return self._function(*arguments)
        for own, given in zip(self._inputs, arguments, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: the server's other thread may load a checkpoint meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = self._function(*self._inputs)
        self._graph.replay()
        return cast(Tensor, self._result)

    def release(self) -> None:
        """Give back the memory of the graph. The next call but one captures again."""
        self._graph, self._result, self._calls = None, None, min(self._calls, WARM_UP - 1)


def _shape(t: Tensor | None) -> torch.Size | None:
    return None if t is None else t.shape
