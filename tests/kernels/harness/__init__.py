"""What every kernel is checked with; one call each in an op's test.

check_numbers(op, definition, inputs, options)    error against float64 ≤ 2 × that of the definition in the same dtype
check_memory(op, inputs, options)                 guard bands, unwritten outputs, races, order of the grid, forward and backward
traffic(op, inputs, cached=…)                     bytes the kernels load and store, counted in the interpreter
compile_matrix.readings()                         machine code of all kernels for all generations (a process of its own)
"""

from .memory import Recorder, check_memory, grid_order, guard, guarded_outputs, traffic
from .numbers import check_numbers, differentiate

__all__ = ["Recorder", "check_memory", "check_numbers", "differentiate", "grid_order", "guard", "guarded_outputs", "traffic"]
