"""The settings of sampling, with the defaults that the Python API, the commands, the server and generation_config.json share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from .errors import UserError


class SamplingSettings(TypedDict, total=False):
    """The settings of `Sampling` without the seed, as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """The settings of one sequence. They apply in the order of `transformers`: repetition penalty, temperature, top-k, top-p, min-p.

    Raises UserError if a setting is out of range."""

    max_new_tokens: int = 500
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int | None = 30  # keep the k most likely tokens; None: all
    top_p: float = 0.9  # keep the smallest set of most likely tokens that reaches this probability (arXiv 1904.09751); 0: as temperature 0
    min_p: float = 0.0  # drop tokens below this fraction of the highest probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already seen (arXiv 1909.05858)
    seed: int | None = None  # None: a new random seed
    stop: str | Sequence[str] = ()  # the sequence ends before the first of these strings

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (always the most likely token) or more, usually 0.7 to 1")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in [0, 1]. 1 keeps all tokens, 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1, or None to keep all tokens")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must be in [0, 1], usually 0.05 to 0.1; 0 keeps all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, usually 1 (off) to 1.3")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not all(isinstance(s, str) and s for s in stop):
            raise UserError(f"stop is {self.stop!r}; it must be a string or a list of strings, none of them empty")

    @property
    def filters(self) -> dict:
        temperature = self.temperature if self.top_p else 0.0
        return {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
