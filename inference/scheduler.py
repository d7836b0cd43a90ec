"""The one thread that writes: the texts of all requests side by side, joining and leaving between two steps.

Requests come in from the server's threads by `submit` and `cancel`, which only touch a list and a flag; everything else, the models
among it, belongs to the engine's thread. What is written goes back through each request's `deliver`.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..common.errors import UserError
from ..model.run_folder import find_checkpoints
from .llm import LLM, Completion, Writer
from .sampling import Sampling

LOADED = 2  # checkpoints in memory at a time: enough to compare two without loading at every turn
LOG = logging.getLogger("uvicorn.error")


class RequestError(Exception):
    """What a client did wrong, or could not get: an HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True)
class Started:
    """The first text of a request has its slot."""

    prompt_tokens: list[int]  # of each text's prompt, `<|endoftext|>` in front among them


@dataclass(frozen=True)
class Piece:
    """More of one text; `completion` comes with the last piece."""

    index: int  # which of the request's texts
    text: str
    completion: Completion | None


@dataclass(eq=False)
class Request:
    """Texts asked for together, of one checkpoint."""

    folder: Path  # of the checkpoint, from `find_checkpoints`
    prompts: Sequence[str]  # one for each text
    samplings: Sequence[Sampling]
    deliver: Callable[[Started | Piece | RequestError], None]  # called in the engine's thread; must not block
    is_over: bool = False  # cancelled, or failed
    ids: list[list[int]] | None = None  # of the prompts, once the checkpoint's tokenizer is there …
    ids_version: tuple | None = None  # … and which version of the checkpoint's


@dataclass(eq=False)
class _Loaded:
    llm: LLM
    version: tuple
    slots: int
    writers: dict[int, tuple[Request, int, Writer]] = field(default_factory=dict)  # by the decoder's handle; the int is the text's index

    def __post_init__(self):
        self.decoder = self.llm.decoder(slots=self.slots)


def _encode(llm: LLM, prompts: Sequence[str]) -> list[list[int]]:
    try:
        ids = {prompt: llm.encode_prompt(prompt) for prompt in set(prompts)}
    except ValueError as error:
        raise RequestError(400, str(error), param="prompt", code="context_length_exceeded") from None
    return [ids[prompt] for prompt in prompts]


class Engine:
    """Writes what requests ask for, first come, first served, `slots` texts of a checkpoint at a time.

    A checkpoint is loaded when it is first asked for, and at most two are in memory: for a third, the one not used for longest goes as soon
    as its texts are done, and what came later waits. The newest is loaded at once.

    Raises ValueError or FileNotFoundError where there is no checkpoint, or the newest cannot be loaded."""

    def __init__(self, folder: Path, *, slots: int, queue: int, device: str | None = None, dtype: torch.dtype = torch.float32):
        self.folder, self.slots, self.queue = folder, slots, queue
        self.n_steps = 0  # forward passes so far, each for all texts of a checkpoint
        self._device, self._dtype = device, dtype
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the one used last at the end
        self._waiting: deque[tuple[Request, int]] = deque()  # texts
        self._changed = threading.Condition()  # guards _waiting and _is_stopping
        self._is_stopping = False
        try:
            self._load(next(iter(find_checkpoints(folder).values())))
        except RequestError as error:
            raise UserError(error.message) from error
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Put the request's texts in the queue. Raises RequestError 429 where they do not fit, 503 where the engine has ended."""
        n = len(request.prompts)
        with self._changed:
            if self._is_stopping:
                raise RequestError(503, "the server is stopping")
            n_waiting = sum(not waiting.is_over for waiting, _ in self._waiting)
            if n_waiting + n > self.queue:
                raise RequestError(
                    429,
                    f"{n_waiting} texts wait already, {n} more are over the limit of {self.queue}; try again soon",
                    code="rate_limit_exceeded",
                )
            self._waiting.extend((request, i) for i in range(n))
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Forget a request: its texts leave before the next step. Nothing is delivered for it any more."""
        with self._changed:
            request.is_over = True
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the step it is in; requests that are not done get RequestError 503."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def status(self) -> dict:
        loaded = list(self._loaded.items())
        with self._changed:
            waiting = sum(not request.is_over for request, _ in self._waiting)
        return {
            "status": "stopping" if self._is_stopping else "ok",
            "loaded": [name for name, _ in reversed(loaded)],
            "running": sum(len(model.writers) for _, model in loaded),
            "waiting": waiting,
            "steps": self.n_steps,
        }

    # --- the engine's thread ---------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    is_busy = lambda: self._is_stopping or self._waiting or any(model.writers for model in self._loaded.values())
                    self._changed.wait_for(is_busy)
                    if self._is_stopping:
                        return
                self._drop_what_is_over()
                self._admit()
                for name, model in list(self._loaded.items()):
                    if model.writers:
                        self._step(name, model)
        finally:  # the server stops, or a fault of the engine: nobody waits for ever
            with self._changed:
                self._is_stopping = True
            running = [request for model in self._loaded.values() for request, _, _ in model.writers.values()]
            for request in [*running, *(request for request, _ in self._waiting)]:
                self._fail(request, RequestError(503, "the server is stopping"))

    def _fail(self, request: Request, error: Exception) -> None:
        if not request.is_over:
            request.is_over = True
            request.deliver(error if isinstance(error, RequestError) else RequestError(500, f"the request failed ({error})"))

    def _drop_what_is_over(self) -> None:
        for model in self._loaded.values():
            for handle in [handle for handle, (request, _, _) in model.writers.items() if request.is_over]:
                model.decoder.remove(handle)
                del model.writers[handle]
        with self._changed:
            self._waiting = deque(item for item in self._waiting if not item[0].is_over)

    def _admit(self) -> None:
        """Give free slots to those who wait, in their order. The first that has to wait holds up the others, so none waits for ever."""
        while True:
            with self._changed:
                while self._waiting and self._waiting[0][0].is_over:
                    self._waiting.popleft()
                if not self._waiting:
                    return
                request, index = self._waiting[0]
            try:
                model = self._load(request.folder)
                if model is None or not model.decoder.free:
                    return
                if request.ids_version != model.version:
                    is_first = request.ids is None
                    request.ids, request.ids_version = _encode(model.llm, request.prompts), model.version
                    if is_first:
                        request.deliver(Started([len(ids) for ids in request.ids]))
                ids, sampling = request.ids[index], request.samplings[index]
                writer = Writer(model.llm.tokenizer, sampling, len(ids), model.llm.model.config.context)
                model.writers[model.decoder.add(ids, sampling)] = request, index, writer
            except Exception as error:  # this request ends, the server goes on
                if not isinstance(error, RequestError):
                    LOG.exception("a request to %s failed", request.folder.name)
                self._fail(request, error)
                continue
            with self._changed:
                self._waiting.popleft()

    def _load(self, folder: Path) -> _Loaded | None:
        """The checkpoint, from memory or disk; None where it has to wait until another one's texts are done."""
        name = folder.name
        try:
            file = (folder / "model.safetensors").stat()
        except OSError:  # the run keeps its last few only
            message = f"the checkpoint {name!r} is gone; /v1/models lists those that are there"
            raise RequestError(404, message, param="model", code="model_not_found") from None
        version = (file.st_ino, file.st_mtime_ns)
        known = self._loaded.get(name)
        if known and known.version == version:
            self._loaded.move_to_end(name)
            return known
        if known or len(self._loaded) == LOADED:  # `known` is from before the run wrote that step again
            leaving = [n for n, model in self._loaded.items() if not model.writers and (not known or n == name)]
            if not leaving:
                return None
            del self._loaded[leaving[0]]
            known = None
        try:
            self._loaded[name] = _Loaded(LLM.load(folder, device=self._device, dtype=self._dtype), version, self.slots)
        except Exception as error:  # whatever a damaged file leads to
            raise RequestError(500, f"{name} cannot be loaded: {error}") from error
        return self._loaded[name]

    def _step(self, name: str, model: _Loaded) -> None:
        try:
            tokens = model.decoder.step()
        except Exception as error:  # memory, say: the texts of this checkpoint end, the server goes on
            LOG.exception("a step of %s failed", name)
            del self._loaded[name]
            hint = "" if isinstance(error, ValueError) else "; try again, with fewer or shorter texts"
            for request, _, _ in model.writers.values():
                self._fail(request, RequestError(500, f"writing with {name} failed ({error}){hint}"))
            return
        self.n_steps += 1
        for handle, token in tokens.items():
            request, index, writer = model.writers[handle]
            try:
                text = writer.push(token)
            except Exception as error:  # the texts of this request leave before the next step
                LOG.exception("a text of %s failed", name)
                self._fail(request, RequestError(500, f"writing with {name} failed ({error})"))
                continue
            is_done = writer.finish_reason is not None
            if is_done:
                model.decoder.remove(handle)
                del model.writers[handle]
            if (is_done or text) and not request.is_over:
                request.deliver(Piece(index, text, writer.completion() if is_done else None))
