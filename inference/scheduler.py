"""Which sequences of a model run and which wait. `LLM` and the server's `Engine` both use this scheduler."""

from collections import Counter, deque
from collections.abc import Iterator

from ..data.tokenizer import Tokenizer
from .decoder import Decoder
from .detokenizer import Completion, Detokenizer
from .sequence import Sequence


class Scheduler:
    """Runs as many sequences as the decoder has slots; the others wait.

    A free slot goes to the request with the fewest running sequences, and among equals to the one that came first."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer):
        self._decoder, self._tokenizer = decoder, tokenizer
        self._waiting: dict[object, deque[Sequence]] = {}  # by request
        self._running: dict[Sequence, Detokenizer] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    def sequences(self) -> Iterator[Sequence]:
        yield from self._running
        for waiting in self._waiting.values():
            yield from waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.setdefault(sequence.request, deque()).append(sequence)

    def remove(self, request: object) -> None:
        """Remove the sequences of a request."""
        self._waiting.pop(request, None)
        for sequence in [s for s in self._running if s.request is request]:
            self._finish(sequence)

    def step(self) -> list[tuple[Sequence, str, Completion | None]]:
        """Start sequences that wait and run one step: (sequence, new text, completion) of each that runs. The new text may be empty; the
        completion comes with the last piece."""
        while self._waiting and self._decoder.free:
            self._start_one()
        outputs = []
        for sequence, token in self._decoder.step().items():
            detokenizer = self._running[sequence]
            text, completion = detokenizer.push(token), None
            if detokenizer.finish_reason:
                completion = detokenizer.completion()
                self._finish(sequence)
            outputs.append((sequence, text, completion))
        return outputs

    def _start_one(self) -> None:
        n_running = Counter(sequence.request for sequence in self._running)
        request = min(self._waiting, key=lambda request: n_running[request])  # the first of the smallest
        sequence = self._waiting[request].popleft()
        if not self._waiting[request]:
            del self._waiting[request]
        self._decoder.add(sequence)
        self._running[sequence] = Detokenizer(self._tokenizer, sequence.sampling, len(sequence.ids), self._decoder.capacity)
        sequence.status = "running"

    def _finish(self, sequence: Sequence) -> None:
        self._decoder.remove(sequence)
        del self._running[sequence]
        sequence.status = "finished"
