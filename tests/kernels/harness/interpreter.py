"""The kernels under Triton's interpreter, on the CPU, with bf16 as a GPU computes it."""

import importlib
import importlib.util
import os
import pkgutil


def interpret_kernels() -> None:
    """Import all kernels, and Triton's own, decorated for the interpreter; leaves the environment as it was.

    Triton decides whether to interpret a kernel when it is decorated, that is on import. It must not be imported before."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import tritale.kernels

    for module in pkgutil.iter_modules(tritale.kernels.__path__, "tritale.kernels."):
        importlib.import_module(module.name)
    if importlib.util.find_spec("triton"):
        mend_bf16()
    if before is None:
        del os.environ["TRITON_INTERPRET"]


def mend_bf16() -> None:
    """Make bf16 in Triton's interpreter what it is on a GPU.

    As of triton 3.7 the interpreter truncates fp32 to bf16 instead of rounding to nearest even (twice the error, and a bias), reads the
    bits of fp64 as bf16, and `tl.dot` multiplies bf16 operands by their bit patterns, as if they were integers."""
    import numpy as np
    import triton.language as tl
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
