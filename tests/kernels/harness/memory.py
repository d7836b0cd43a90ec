"""Memory safety of a kernel: guard bands (on any device), and in the interpreter the addresses of all loads and stores.

`guard` puts a tensor between bands of poison, NaN or a large integer, which also fill the gaps of its strides. `guarded_outputs` does this
to what an op allocates with torch.empty and its relatives. `check_bounds` and `check_races` look through the addresses of a `Recorder`:
accesses outside a tensor, two programs at one address. `grid_order` runs the programs in another order. `check_memory` does all of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.recorder import BAND, Recorder

from .numbers import differentiate


def _poison(dtype: torch.dtype):
    return math.nan if dtype.is_floating_point else dtype != torch.bool and torch.iinfo(dtype).max // 2 + 5


@dataclass
class Guarded:
    """A tensor between poisoned bands."""

    view: Tensor
    buffer: Tensor  # 1-D, the memory around it
    is_ours: np.ndarray  # bool for each element of the buffer: one of the view's
    start: int = field(init=False)  # address of the buffer

    def __post_init__(self):
        self.start = self.buffer.data_ptr()
        self.before = self.bits().clone()

    def bits(self) -> Tensor:
        return self.buffer.detach().view(torch.uint8).view(self.buffer.numel(), -1)

    def check(self) -> None:
        changed = (self.bits() != self.before).any(1).cpu().numpy() & ~self.is_ours
        assert not changed.any(), f"{int(changed.sum())} elements outside {tuple(self.view.shape)} {self.view.dtype} were written"


def guard(x: Tensor, strides: Sequence[int] | None = None, fill: bool = True) -> Guarded:
    """A copy of x, its strides kept (or as given), between bands of poison; `fill=False` leaves the copy itself poisoned too."""
    strides = tuple(x.stride() if strides is None else strides)
    band = BAND // x.element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if x.numel() else 0
    buffer = torch.full((2 * band + extent,), _poison(x.dtype), dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, strides, band)
    ours = torch.zeros(buffer.shape, dtype=torch.bool)
    ours.as_strided(x.shape, strides, band).fill_(True)
    if fill:
        view.copy_(x.detach())
    return Guarded(view.detach(), buffer, ours.numpy())


@contextmanager
def guarded_outputs(store: list[Guarded]) -> Iterator[None]:
    """Inside, torch.empty, empty_like and Tensor.new_empty return poisoned memory between poisoned bands, noted in `store`."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    is_inside = False

    def guarded(make: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            nonlocal is_inside
            x = make(*args, **kwargs)
            if is_inside or not isinstance(x, Tensor) or x.device.type == "meta" or type(x) is not Tensor:
                return x
            is_inside = True
            try:
                store.append(guard(x, fill=False))
            finally:
                is_inside = False
            return store[-1].view

        return wrapper

    with (
        mock.patch.object(torch, "empty", guarded(empty)),
        mock.patch.object(torch, "empty_like", guarded(empty_like)),
        mock.patch.object(Tensor, "new_empty", guarded(new_empty)),
    ):
        yield


@contextmanager
def grid_order(order: str) -> Iterator[None]:
    """Run the programs of each launch "forward", "reversed" or "shuffled". Only the interpreter has an order; elsewhere nothing changes."""
    if torch.cuda.is_available() or order == "forward":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    set_dim, set_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    permutation = np.arange(0)

    def set_grid_dim(self, *dims):
        nonlocal permutation
        n = math.prod(dims)
        permutation = np.arange(n)[::-1] if order == "reversed" else np.random.default_rng(n).permutation(n)
        set_dim(self, *dims)

    def set_grid_idx(self, *index):
        place = permutation[np.ravel_multi_index(index, self.grid_dim)]
        set_idx(self, *(int(i) for i in np.unravel_index(place, self.grid_dim)))

    with mock.patch.multiple(InterpreterBuilder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
        yield


def check_bounds(recorder: Recorder, guards: Sequence[Guarded]) -> None:
    """No access outside the elements of a guarded tensor, were it masked or multiplied by zero afterwards; and none outside the tensors
    of the launch where those are copies that the op made on its way."""
    guards = sorted(guards, key=lambda g: g.start)
    starts = np.array([g.start for g in guards], dtype=np.uint64)
    for launch in recorder.launches:
        for kind, accesses in (("loaded", launch.loads), ("stored", launch.stores)):
            for program, addresses, _ in accesses:
                which = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
                outside = np.ones(addresses.shape, dtype=bool)
                for i in np.unique(which[which >= 0]):
                    g, here = guards[i], which == i
                    index = ((addresses[here] - np.uint64(g.start)) // np.uint64(g.buffer.element_size())).astype(np.int64)
                    is_past = index >= g.is_ours.size
                    outside[here] = np.where(is_past, True, ~g.is_ours[np.where(is_past, 0, index)])
                    which[here] = np.where(is_past, -1, i)
                for start, end in launch.spans:
                    outside &= ~((which < 0) & (addresses >= start) & (addresses < end))
                if outside.any():
                    at = int(addresses[outside][0])
                    near = ", ".join(
                        f"{at - g.start} of {g.buffer.nbytes} bytes of the guarded {tuple(g.view.shape)} {g.view.dtype}"
                        for g in guards
                        if g.start <= at < g.start + g.buffer.nbytes
                    )
                    raise AssertionError(
                        f"program {program} of grid {launch.grid} {kind} {int(outside.sum())} elements outside its tensors, "
                        f"the first at {near or 'memory of no guarded tensor'}"
                    )


def check_races(recorder: Recorder) -> None:
    """No element is stored by two programs of a launch, and none is loaded by a program when another stores it."""
    for launch in recorder.launches:
        stored = [(np.repeat(np.uint64(p), a.size), a) for p, a, _ in launch.stores if a.size]
        if not stored:
            continue
        programs, addresses = (np.concatenate(parts) for parts in zip(*stored, strict=True))
        pairs = np.unique(np.stack((addresses, programs)), axis=1)
        twice = pairs[0][1:][pairs[0][1:] == pairs[0][:-1]]
        assert not twice.size, f"{twice.size} elements are stored by more than one program of grid {launch.grid}"
        for program, loaded, _ in launch.loads:
            at = np.minimum(np.searchsorted(pairs[0], loaded), pairs.shape[1] - 1)
            others = (pairs[0][at] == loaded) & (pairs[1][at] != program)
            assert not others.any(), f"program {program} of grid {launch.grid} loads {int(others.sum())} elements that others store"


def _guarded(t: Any, guards: list[Guarded]) -> Any:
    if not isinstance(t, Tensor):
        return t
    guards.append(guard(t))
    return guards[-1].view.requires_grad_(t.requires_grad)


def check_memory(op: Callable, inputs: Sequence, *, pull_strides: Callable[[Tensor], Sequence[int]] | None = None, **options) -> None:
    """Run op(*inputs, **options), forward and backward, in three orders of the grid, and assert that
    nothing outside a tensor is loaded or stored, every element of an output and of a gradient is written, no two programs meet at an
    address, and the results are bit for bit the same in every order. Inputs keep their strides; tensors in `options` are guarded too.
    `pull_strides` gives the strides of the incoming gradients (contiguous by default)."""
    results, pulls = {}, None
    for order in ("forward", "reversed", "shuffled"):
        guards = []
        arguments = [_guarded(t, guards) for t in inputs]
        named = {k: _guarded(v, guards) for k, v in options.items()}
        with grid_order(order), Recorder() as recorder, guarded_outputs(guards):
            outputs, _ = differentiate(op, arguments, **named)
            wanted = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
            grads = ()
            if wanted:
                if pulls is None:
                    pulls = [torch.randn_like(o.detach()) if o.requires_grad else None for o in outputs]
                incoming = []
                for o, p in zip(outputs, pulls, strict=True):
                    if o.requires_grad:
                        assert p is not None
                        guards.append(guard(p, strides=None if pull_strides is None else pull_strides(p)))
                        incoming.append(guards[-1].view)
                grads = torch.autograd.grad([o for o in outputs if o.requires_grad], wanted, incoming, allow_unused=True)
        for g in guards:
            g.check()
        check_bounds(recorder, guards)
        check_races(recorder)
        results[order] = [t.detach().clone() for t in (*outputs, *grads) if t is not None]
        for i, t in enumerate(results[order]):
            poison = t.isnan() if t.is_floating_point() else (t == _poison(t.dtype) if t.dtype != torch.bool else torch.zeros_like(t))
            assert not poison.any(), f"result {i} {tuple(t.shape)}: {int(poison.sum())} elements were not written, or made from poison"
            assert torch.equal(t, results["forward"][i]), f"result {i} {tuple(t.shape)} depends on the order of the programs"
    if not torch.cuda.is_available():
        assert recorder.launches or not any(isinstance(t, Tensor) and t.numel() for t in inputs), "no kernel ran"
