"""What a process on the null GPU has done: launches, waits of the host with the line that waited, faults.

Import it only in a process that runs in `build.environment()`.
"""

import ctypes
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from tritale.training.health import Recorder

REPOSITORY = Path(__file__).resolve().parents[2]
_library = ctypes.CDLL("libcuda.so.1")
_library.nullgpu_launches.restype = ctypes.c_long
_library.nullgpu_launch.restype = _library.nullgpu_faults.restype = ctypes.c_char_p
_ON_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Launch(NamedTuple):
    """A launch, or a node of a captured graph."""

    kind: str  # kernel, triton, product, copy, fill, graph or collective
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # bytes
    is_captured: bool
    amount: float  # bytes of a copy or fill, FLOPs of a product, nodes of a graph


@dataclass
class Record:
    """What happened inside `recorded`."""

    launches: list[Launch] = field(default_factory=list)  # without the nodes of captures
    captured: list[Launch] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)  # "function file:line" → number
    faults: str = ""

    @property
    def nodes(self) -> int:
        """Operations on the device: launches, with each graph counted as its nodes."""
        return sum(int(x.amount) if x.kind == "graph" else 1 for x in self.launches)


def _line() -> str:
    """The innermost line of this repository's packages on the stack."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename).resolve()  # tritale/training is a link to training
        if REPOSITORY in path.parents and "tests" not in path.parts and "site-packages" not in path.parts:
            return f"{path.relative_to(REPOSITORY)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _launches() -> Iterator[Launch]:
    numbers, amount, name = (ctypes.c_uint * 8)(), ctypes.c_double(), ctypes.c_char_p()
    for i in range(_library.nullgpu_launches()):
        kind = _library.nullgpu_launch(ctypes.c_long(i), ctypes.byref(name), numbers, ctypes.byref(amount)).decode()
        *n, shared, is_captured = numbers
        yield Launch(kind, (name.value or b"").decode(), tuple(n[:3]), tuple(n[3:]), shared, bool(is_captured), amount.value)


@contextmanager
def recorded() -> Iterator[Record]:
    """Record what the block does. The record is complete after the block."""
    record = Record()
    on_wait = _ON_WAIT(lambda function: record.waits.update([f"{function.decode()} {_line()}"]))
    _library.nullgpu_reset()
    _library.nullgpu_on_wait(on_wait)
    try:
        yield record
    finally:
        _library.nullgpu_on_wait(_ON_WAIT())
        for launch in _launches():
            (record.captured if launch.is_captured else record.launches).append(launch)
        record.faults = _library.nullgpu_faults().decode()


def never_overflows() -> None:
    """Make the gradient scaler take every step: it reads from the device whether a gradient overflowed, which no kernel has computed."""
    torch.amp.GradScaler._maybe_opt_step = lambda self, optimizer, *args, **kwargs: optimizer.step()  # pyright: ignore


def losses_fall() -> None:
    """Make the losses of training fall: they are read in pairs with the norms, whose 8 bytes the null GPU fills as it does a token's."""
    take, numbers = Recorder.take, itertools.count()
    Recorder.take = lambda self, n: [[1 + 400 / (100 + next(numbers)), 1.0] for _ in take(self, n)]


def host_ms(call: Callable[[], object], repetitions: int = 40) -> float:
    """Milliseconds of CPU time of the process, of the fastest of some calls."""
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)
