"""Which addresses the kernels load and store, recorded in Triton's interpreter, and the bytes they move."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor

BAND = 256  # bytes before and after a tensor that are recorded too; a multiple of the alignment of loads


@dataclass
class Launch:
    grid: tuple[int, int, int]
    spans: list[tuple[int, int]]  # addresses of the tensors it was given, first and past the last
    loads: list[tuple[int, np.ndarray, int]] = field(default_factory=list)  # (program, addresses, bytes each)
    stores: list[tuple[int, np.ndarray, int]] = field(default_factory=list)


def _span(t: Tensor) -> tuple[int, int]:
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + extent * t.element_size()


def _all_near(addresses: np.ndarray, spans: list[tuple[int, int]]) -> bool:
    near = np.zeros(addresses.shape, dtype=bool)
    for start, end in spans:
        near |= (addresses >= start - BAND) & (addresses < end + BAND)
    return bool(near.all())


class Recorder:
    """The addresses that kernels load and store inside a `with`, per launch. On a GPU nothing is recorded.

    Raises AssertionError at an access far outside the tensors of the launch, before it is made, and at an atomic operation."""

    def __init__(self):
        self.launches: list[Launch] = []
        self._alive: list[Tensor] = []  # what was launched on: freed, its memory could become a guarded tensor's
        self._stack = ExitStack()

    def __enter__(self):
        if torch.cuda.is_available():
            return self
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        launches, spans, alive = self.launches, [], self._alive
        arguments, load, store = GridExecutor._init_args_hst, Builder.create_masked_load, Builder.create_masked_store
        set_dim = Builder.set_grid_dim

        def init_args(self, args, kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.numel()]
            alive.extend(tensors)
            spans[:] = [_span(t) for t in tensors]
            return arguments(self, args, kwargs)

        def note(builder, accesses: list, ptrs, mask) -> None:
            width = ptrs.get_element_ty().primitive_bitwidth // 8 or 1
            addresses, chosen = np.broadcast_arrays(ptrs.data, mask.data.astype(bool))
            addresses = addresses[chosen]
            accesses.append((int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim)), addresses, width))
            if addresses.size:  # an access far outside would crash this process before any assertion
                first, last = int(addresses.min()), int(addresses.max())
                is_near = any(start - BAND <= first and last < end + BAND for start, end in spans)
                assert is_near or _all_near(addresses, spans), "a kernel goes far outside the tensors it was given"

        def create_masked_load(self, ptrs, mask, *args):
            note(self, launches[-1].loads, ptrs, mask)
            return load(self, ptrs, mask, *args)

        def create_masked_store(self, ptrs, value, mask, *args):
            note(self, launches[-1].stores, ptrs, mask)
            return store(self, ptrs, value, mask, *args)

        def atomic(self, *args):
            raise AssertionError("a kernel uses an atomic operation; their order changes sums from run to run")

        def set_grid_dim(self, *dims):
            launches.append(Launch(dims, spans.copy()))
            set_dim(self, *dims)

        patches = {
            "create_masked_load": create_masked_load, "create_masked_store": create_masked_store,
            "create_atomic_rmw": atomic, "create_atomic_cas": atomic, "set_grid_dim": set_grid_dim,
        }  # fmt: skip
        self._stack.enter_context(mock.patch.object(GridExecutor, "_init_args_hst", init_args))
        self._stack.enter_context(mock.patch.multiple(Builder, **patches))
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def bytes(self, cached: Sequence[Tensor] = ()) -> dict[str, int]:
        """{"loaded", "stored", "cached"}: bytes; loads from the tensors in `cached` are counted apart."""
        spans = [(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in cached]
        total = {"loaded": 0, "stored": 0, "cached": 0}
        for launch in self.launches:
            for _, addresses, width in launch.loads:
                in_cache = np.zeros(addresses.shape, dtype=bool)
                for start, end in spans:
                    in_cache |= (addresses >= start) & (addresses < end)
                total["cached"] += int(in_cache.sum()) * width
                total["loaded"] += int((~in_cache).sum()) * width
            total["stored"] += sum(addresses.size * width for _, addresses, width in launch.stores)
        return total


def traffic(run: Callable[[], object], cached: Sequence[Tensor] = ()) -> dict[str, int]:
    """Bytes that the kernels of run() load and store, counted in the interpreter; loads of the tensors in `cached` are counted apart."""
    with Recorder() as recorder:
        run()
    return recorder.bytes(cached)
