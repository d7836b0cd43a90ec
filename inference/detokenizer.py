"""From the tokens of a sequence to its text, one token at a time."""

import codecs
from dataclasses import dataclass

from ..common.sampling import Sampling
from ..data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt."""

    text: str
    tokens: list[int]  # without the one that ends it
    finish_reason: str  # "end": `<|endoftext|>` or `<|im_end|>`; "stop": a stop string; "length": max_new_tokens, or the context is full


class Detokenizer:
    """The text of one sequence as its tokens arrive. It holds back incomplete characters and a partial match of a stop string.

    Bytes that never form a character are dropped."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, n_prompt: int, capacity: int):
        self._tokenizer, self._stop = tokenizer, sampling.stop
        self._max_tokens = min(sampling.max_new_tokens, capacity - n_prompt)
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._held = ""  # may be the beginning of a stop string
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """The text that one more token completes, often empty. Sets `finish_reason` if the sequence ends here."""
        if token in self._tokenizer.end_ids:
            self.finish_reason = "end"
        else:
            self._tokens.append(token)
            self._held += self._bytes.decode(self._tokenizer.token_bytes(token))
            found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
            if found:
                self.finish_reason, self._held = "stop", self._held[: min(found)]
            elif len(self._tokens) >= self._max_tokens:
                self.finish_reason = "length"
        n_held = 0
        if self.finish_reason is None:
            n_held = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        piece, self._held = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion("".join(self._pieces), self._tokens, self.finish_reason or "length")
