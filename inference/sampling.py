"""The choice of the next token: Hugging Face's parameters with Hugging Face's meaning, in Hugging Face's order."""

import torch
from torch import Tensor

from ..common.errors import UserError
from ..kernels.reference import COLDEST

NOT_FINITE = "the logits are not finite: the checkpoint's weights hold NaN or infinity; use another step"
FIRST_LOOK = 1024  # top-p and min-p usually keep fewer tokens; sorting a large vocabulary takes longer than the model


def candidates(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """(probabilities (B, W), ids (B, W)): W tokens of each row, with probability 0 for those that a filter drops. ids is None if W is V.

    logits (B, V) of any dtype, temperature above 0. Ties with the k-th token are kept, as in `transformers`."""
    scores = logits.float() / max(temperature, COLDEST)
    n, ids = scores.shape[-1], None
    if top_k is not None and top_k < n:
        values, ids = scores.topk(top_k + 1)
        kth = values[:, top_k - 1 : top_k]
        if (values[:, -1:] == kth).any():
            values, ids = scores.topk(int((scores >= kth).sum(-1).max()))
        p = values.masked_fill(values < kth, -torch.inf).softmax(-1)
    elif top_p < 1 or min_p > 0:
        p, ids = scores.softmax(-1).topk(min(n, FIRST_LOOK))
        needs_more = (p.sum(-1) < top_p) if top_p < 1 else (p[:, -1] >= min_p * p[:, 0])
        if ids.shape[-1] < n and needs_more.any():
            p, ids = scores.softmax(-1).sort(descending=True, stable=True)
    else:
        return scores.softmax(-1), None
    if top_p < 1:
        before = p.cumsum(-1) - p  # a token is kept if the more likely ones do not reach top_p
        p = p.masked_fill(before >= top_p, 0.0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p[:, :1], 0.0)
    return p / p.sum(-1, keepdim=True), ids


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Apply a repetition penalty in place to logits (V,). `seen`: the ids in the sequence, without duplicates."""
    score = logits[seen]
    logits[seen] = torch.where(score < 0, score * penalty, score / penalty)


def draw(p: Tensor, ids: Tensor | None, u: Tensor) -> Tensor:
    """One token of each row (B,): the inverse of the cumulative distribution at u (B, 1) fp64 in [0, 1).

    Raises UserError if a probability is NaN."""
    total = p.double().cumsum(-1)
    if not total[:, -1].isfinite().all():
        raise UserError(NOT_FINITE)
    index = (total <= u * total[:, -1:]).sum(-1, keepdim=True)
    return (index if ids is None else ids.gather(-1, index)).squeeze(-1)
