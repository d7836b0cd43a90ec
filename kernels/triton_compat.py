"""Triton where it is installed (Linux wheels only), and elsewhere just enough of it for the op files to be imported.

    from .triton_compat import jit, tl, triton

`jit` decorates the kernels; without Triton it leaves the function alone, and `dispatch.uses_triton` never chooses it.
"""

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:

    class _Names:
        """Stands for triton.language in the signatures of kernels that are never run."""

        constexpr = dtype = object

    triton, tl = None, _Names
    jit = lambda fn: fn

__all__ = ["jit", "tl", "triton"]
