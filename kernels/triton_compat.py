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


def _mend_interpreter() -> None:
    """Make bf16 in Triton's interpreter what it is on a GPU.

    As of triton 3.7 it truncates fp32 to bf16 instead of rounding to nearest even (twice the error, and a bias), takes the bits of fp64 for
    those of bf16, and `tl.dot` multiplies bf16 operands by their bit patterns, as if they were integers."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(a: TensorHandle) -> TensorHandle:
        return TensorHandle((a.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return widened(src)
        if pair == (tl.bfloat16, tl.float64):
            return cast(self, widened(src), dst_type)
        if pair == (tl.float64, tl.bfloat16):
            return cast_impl(self, TensorHandle(src.data.astype(np.float32), tl.float32), dst_type)
        if pair == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
            rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
            return TensorHandle(rounded.astype(np.uint16).reshape(src.data.shape), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (widened(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


if triton is not None and triton.knobs.runtime.interpret:
    _mend_interpreter()
