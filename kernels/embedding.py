"""Embedding lookup whose gradient is the same in every run.

`torch.compile` turns the backward of `F.embedding` into atomic additions. Their order, and with it the rounding, changes from run to run
as soon as several threads work. The backward here is a custom op, which the compiler leaves alone: PyTorch's own kernel, which adds the
rows of a token in a fixed order on CPUs and GPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import no_second_derivative, refuse_transforms


@torch.library.custom_op("tritale::embedding_backward", mutates_args=())
def _embedding_backward_op(dy: Tensor, ids: Tensor, n_rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, n_rows, -1, False)


_embedding_backward_op.register_fake(lambda dy, ids, n_rows: dy.new_empty(n_rows, dy.shape[-1]))
_embedding_backward_op.register_autograd(no_second_derivative("embedding"))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.n_rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, _embedding_backward_op(grads[0], *ctx.saved_tensors, ctx.n_rows)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]: (…, K) for ids (…) int64 and weight (V, K). The gradient of the weight is deterministic.

    Raises RuntimeError inside forward-mode AD or a transform of torch.func."""
    refuse_transforms("embedding", ids, weight)
    return _Embedding.apply(ids, weight)  # pyright: ignore[reportReturnType]  (apply is untyped)
