"""What every kernel is checked with; one call each in an op's test.

check_numbers(op, definition, inputs, options)    error against float64 ≤ 2 × that of the definition in the same dtype
check_memory(op, inputs, options)                 guard bands, unwritten outputs, races, order of the grid, forward and backward
traffic(op, inputs, cached=…)                     bytes the kernels load and store, counted in the interpreter
interpreter.interpret_kernels()                   the kernels decorated for the interpreter (tests/conftest.py)

The machine code of all kernels comes from bench/machine_code.py.
"""

from bench.recorder import Recorder, traffic

from .memory import check_memory, grid_order, guard, guarded_outputs
from .numbers import check_numbers, differentiate

__all__ = ["Recorder", "check_memory", "check_numbers", "differentiate", "grid_order", "guard", "guarded_outputs", "traffic"]
