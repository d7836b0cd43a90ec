"""What several ops share: memory layouts, accumulator dtypes, the error for second derivatives, and tanh inside a kernel."""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from .triton_compat import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · LOG2E); exp2 is one instruction, exp takes five


@jit
def tanh(x, IS_EXACT: tl.constexpr):
    """tanh by one exponential, to an absolute 1e-7 in fp32; IS_EXACT: to 1.5 ulp of fp32. Triton's own needs libdevice, which the
    interpreter lacks."""
    if IS_EXACT:
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))  # no overflow
        y = (1 - e) / (1 + e)
        y = tl.where(x < 0, -y, y)
        if x.dtype == tl.float32:  # 1 − e cancels near 0: there a polynomial (least squares to 0.6); float64 has digits to spare
            u = x * x
            p = -0.005893897326590947 * u + 0.02079457971270554
            p = p * u - 0.05378328274105938
            p = p * u + 0.13331915191092936
            p = p * u - 0.33333297506666293
            y = tl.where(tl.abs(x) < 0.55, x + x * (u * p), y)
    else:
        y = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)
    return y


def accumulator(*tensors: Tensor | None) -> tl.dtype:
    """Triton's dtype for sums over these tensors: float64 if one of them is, else float32."""
    return tl.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else tl.float32


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """PyTorch's dtype for sums over these tensors: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous memory of x's shape, in x's dtype unless another is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def all_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(contiguous_like(t) for t in tensors)


def unit_stride(x: Tensor) -> Tensor:
    """x if its last dimension has adjacent entries, otherwise a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """x as (M, N) with one row stride and adjacent columns: a view if x's strides allow it."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def _has_tangent(*tensors: Tensor | None) -> bool:
    return forward_ad._current_level >= 0 and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor is inside forward-mode AD or a transform of torch.func, which custom ops do not support."""
    in_transform = (functorch.is_gradtrackingtensor, functorch.is_batchedtensor)
    return _has_tangent(*tensors) or any(t is not None and check(t) for t in tensors for check in in_transform)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a tensor has a tangent of forward-mode AD."""
    if not torch.compiler.is_compiling() and _has_tangent(*tensors):
        raise RuntimeError(f"{op} has no forward-mode derivative; use its definition, tritale.kernels.reference.{op}")


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a tensor is inside forward-mode AD or a transform of torch.func."""
    if torch.compiler.is_compiling():
        return
    refuse_forward_mode(op, *tensors)
    if is_transformed(*tensors):
        raise RuntimeError(
            f"{op} does not support torch.func transforms (grad, vmap, …); use torch.autograd.grad, or use its definition, "
            f"tritale.kernels.reference.{op}"
        )


def no_second_derivative(op: str) -> Callable[..., NoReturn]:
    """The autograd formula of op's backward: raises RuntimeError."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{op} has no second derivative: its backward is not differentiable. Use its definition, tritale.kernels.reference.{op}, "
            "which autograd differentiates any number of times"
        )

    return backward
