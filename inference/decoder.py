"""One forward pass for a batch of sequences; sequences can be added and removed between steps (continuous batching).

    decoder = Decoder(model, slots=32)
    sequence = Sequence(prompt_ids, Sampling(seed=1))
    decoder.add(sequence)
    decoder.step()  # {sequence: token}
    decoder.remove(sequence)

Each sequence has a row of the KV cache. The rows in use are always the first ones: when a sequence is removed, the last row moves into its
place.
"""

import torch

from ..common.errors import UserError
from ..kernels.dispatch import uses_triton
from ..model.gpt import GPT
from . import native
from .cpu_runner import CPURunner
from .gpu_runner import GPURunner
from .sequence import Sequence


class Decoder:
    """Up to `slots` sequences in one batch. `capacity` is the longest sequence, prompt included; the default is the model's context. The
    cache holds slots · capacity · layers · 2 · H_kv · D numbers. With `limits_prefill` long prompts are processed over several steps, so
    that the other sequences continue meanwhile (with `native.c` only; on a GPU a prompt is fast).

    Raises UserError if the capacity exceeds the context."""

    def __init__(self, model: GPT, *, slots: int, capacity: int | None = None, n_token: int | None = None, limits_prefill: bool = False):
        c = model.config
        self.capacity = c.context if capacity is None else capacity
        if not 1 <= self.capacity <= c.context:
            raise UserError(f"capacity is {capacity}; it must be between 1 and the model's context of {c.context}")
        sizes = {"slots": slots, "capacity": self.capacity, "n_token": n_token or c.vocab_size}
        self._slots, self._sequences = slots, []  # in the order of their rows
        if native.can_run(model) or not (model.embedding.is_cuda or uses_triton(model.embedding)):
            self._runner = CPURunner(model, **sizes, limits_prefill=limits_prefill)
        else:
            self._runner = GPURunner(model, **sizes)

    @property
    def free(self) -> int:
        """How many sequences can still be added."""
        return self._slots - len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence whose `ids` are a prompt that begins with `<|endoftext|>`. The caller applies `max_new_tokens` and `stop`.

        Raises ValueError if no slot is free, or if the prompt is empty or fills the capacity."""
        if not self.free:
            raise ValueError(f"all {self._slots} slots are taken; remove a sequence first")
        if not 1 <= len(sequence.ids) < self.capacity:
            raise ValueError(f"the prompt has {len(sequence.ids)} tokens; between 1 and {self.capacity - 1} fit")
        self._sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence and free its slot. Raises ValueError if it was not added."""
        if sequence not in self._sequences:
            raise ValueError(f"this sequence is not among the {len(self._sequences)} of the decoder; add it first")
        row, last = self._sequences.index(sequence), self._sequences.pop()
        if last is not sequence:
            self._runner.move(len(self._sequences), row, last.n_cached)
            self._sequences[row] = last

    @torch.inference_mode()
    def step(self) -> dict[Sequence, int]:
        """Append the next token to every sequence and return the tokens. Long prompts may need several steps.

        Raises ValueError if a sequence fills its capacity, UserError if the logits are not finite."""
        if full := [row for row, s in enumerate(self._sequences) if len(s.ids) > self.capacity]:
            raise ValueError(f"the sequences {full} fill their {self.capacity} tokens; remove them")
        chosen = self._runner.run(self._sequences) if self._sequences else {}
        for sequence, token in chosen.items():
            sequence.ids.append(token)
        return chosen
