"""One prompt and its continuation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ..common.sampling import Sampling


@dataclass(eq=False)
class Sequence:
    """The token ids of one prompt and of its continuation. `Decoder` appends to `ids`, `Scheduler` sets `status`."""

    ids: list[int]
    sampling: Sampling
    request: object = None  # sequences of one request; the scheduler divides the slots between requests
    index: int = 0  # the sequence's place in its request
    n_cached: int = 0  # leading tokens whose keys and values are in the cache
    status: Literal["waiting", "running", "finished"] = "waiting"

    def __post_init__(self):
        self.n_prompt = len(self.ids)

    @cached_property
    def generator(self) -> torch.Generator:
        generator, seed = torch.Generator(), self.sampling.seed
        generator.seed() if seed is None else generator.manual_seed(seed)
        return generator
