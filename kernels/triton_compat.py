"""Triton if it is installed (Linux wheels only), otherwise just enough of it to import the op files.

    from .triton_compat import jit, tl, triton

`jit` decorates the kernels. Without Triton it returns the function unchanged, and `dispatch.uses_triton` is never true.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    def jit(fn: Callable) -> Any: ...  # a kernel takes a grid in brackets, and constexpr parameters as plain values

else:
    try:
        import triton
        import triton.language as tl

        jit = triton.jit
    except ImportError:

        class _Names:
            """Stands for triton.language in the signatures and constants of kernels that never run."""

            constexpr, dtype = float, object

        triton, tl = None, _Names
        jit = lambda fn: fn

__all__ = ["jit", "tl", "triton"]
