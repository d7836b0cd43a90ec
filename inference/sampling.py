"""How the next token is chosen: Hugging Face's parameters with Hugging Face's meaning, in Hugging Face's order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What one text is written with. The order is repetition penalty, temperature, top-k, top-p, min-p, as `transformers` has it.

    Raises ValueError for a setting out of range."""

    max_new_tokens: int = 500
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = 30  # keep the k likeliest; None: all
    top_p: float = 0.9  # keep the smallest set of likeliest tokens that together reach this probability (arXiv 1904.09751)
    min_p: float = 0.0  # drop tokens below this share of the likeliest one's probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen, prompt included, multiplies negative ones (arXiv 1909.05858)
    seed: int | None = None  # None: another text each time
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings that it writes

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (always the likeliest token) or more, usually 0.7 to 1")
        if self.top_p == 0:
            raise UserError(
                "top_p is 0, which keeps no token; it must be in (0, 1]. Always the likeliest token is temperature=0, no filter is top_p=1"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1]. 1 keeps all tokens; for the likeliest only, use temperature=0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1, or None to keep all tokens")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must be in [0, 1], usually 0.05 to 0.1; 0 switches it off")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, usually 1 (off) to 1.3")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not all(isinstance(s, str) and s for s in stop):
            raise UserError(f"stop is {self.stop!r}; it must be a text or a list of texts, none of them empty")

    @property
    def filters(self) -> dict:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


NOT_FINITE = "the logits are not finite: the checkpoint's weights hold NaN or infinity; use another step"
COLDEST = 1e-30  # from here on the likeliest token has it all; below it the quotient overflows
FIRST_LOOK = 1024  # top-p and min-p mostly keep fewer tokens than this; sorting all of a large vocabulary takes longer than the model


def candidates(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, W) of the tokens that pass the filters, 0 for others among them, and their ids (B, W); ids None: W is V.

    logits (B, V) of any dtype, temperature above 0. Tokens as likely as the k-th stay, as in `transformers`."""
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
        before = p.cumsum(-1) - p  # a token stays if those above it do not reach top_p yet
        p = p.masked_fill(before >= top_p, 0.0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p[:, :1], 0.0)
    return p / p.sum(-1, keepdim=True), ids


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Apply a repetition penalty in place: logits (V,), seen: ids, each once."""
    score = logits[seen]
    logits[seen] = torch.where(score < 0, score * penalty, score / penalty)


def draw(p: Tensor, ids: Tensor | None, u: Tensor) -> Tensor:
    """One token of each row (B,), by the inverse of the distribution function at u (B, 1) fp64 in [0, 1).

    Raises ValueError where a probability is NaN."""
    total = p.double().cumsum(-1)
    if not total[:, -1].isfinite().all():
        raise UserError(NOT_FINITE)
    index = (total <= u * total[:, -1:]).sum(-1, keepdim=True)
    return (index if ids is None else ids.gather(-1, index)).squeeze(-1)
