"""A thread that generates for many clients, from several checkpoints of a run.

`submit`, `cancel` and `status` may be called from any thread. The models and schedulers belong to the engine's thread; results go to
each request's `deliver`.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..common.errors import UserError
from ..common.run_folder import find_checkpoints, weights_of
from ..common.sampling import Sampling
from ..data.chat import Messages
from .detokenizer import Completion
from .llm import LLM
from .scheduler import Scheduler
from .sequence import Sequence

MAX_LOADED = 2  # checkpoints in memory: two can be compared without loading in turns
LOG = logging.getLogger("uvicorn.error")


class EngineError(Exception):
    """A request that the engine cannot complete. `reason`: "queue_full" (too many sequences wait), "stopping", "checkpoint_gone" (it was
    deleted, for example by the run's `keep_last`), "prompt" (it cannot be encoded or fills the context), or "failed"."""

    def __init__(self, message: str, reason: str = "failed"):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Started:
    """The prompts of a request are encoded."""

    prompt_tokens: list[int]  # of each sequence's prompt, with `<|endoftext|>`


@dataclass(frozen=True)
class Piece:
    """New text of one sequence. `completion` is set in the last piece only."""

    index: int  # of the sequence in its request
    text: str
    completion: Completion | None


@dataclass(eq=False)
class Request:
    """Sequences of one checkpoint, requested together."""

    folder: Path  # of the checkpoint, from `find_checkpoints`
    prompts: list[str | Messages]  # one for each sequence
    samplings: list[Sampling]
    deliver: Callable[[Started | Piece | EngineError], None]  # called in the engine's thread; must not block
    is_over: bool = False  # finished, cancelled or failed
    model: "LoadedModel | None" = None  # None: waits for its checkpoint
    sequences: list[Sequence] = field(default_factory=list)

    def count(self, status: str) -> int:
        """How many of the sequences have this status."""
        return sum(s.status == status for s in self.sequences) if self.model else len(self.prompts) * (status == "waiting")


class LoadedModel:
    """A checkpoint in memory."""

    def __init__(self, llm: LLM, version: tuple, slots: int):
        self.llm, self.version = llm, version
        self.scheduler = Scheduler(llm.decoder(slots=slots, limits_prefill=True), llm.tokenizer)
        self.is_leaving = False  # takes no new requests, because another checkpoint needs its place

    def remaining_tokens(self) -> int:
        """How many tokens its sequences may still generate."""
        return sum(s.n_prompt + s.sampling.max_new_tokens - len(s.ids) for s in self.scheduler.sequences())


class Engine:
    """Generates for requests, `slots` sequences of a checkpoint in one batch.

    A checkpoint is loaded at its first request, in a thread of its own; the newest is loaded at once. At most two are in memory. A third
    replaces one that is idle, the least recently used first. If none is idle, the one with the fewest tokens to generate takes no new
    requests until it is.

    Raises UserError or FileNotFoundError if there is no checkpoint, or the newest cannot be loaded."""

    def __init__(
        self, folder: Path, *, slots: int, queue: int, device: str | None = None, dtype: torch.dtype = torch.float32, ema: bool = False
    ):
        self.folder, self.slots, self.queue = folder, slots, queue
        self.n_steps = 0  # forward passes so far, each for all running sequences of a checkpoint
        self._device, self._dtype, self._ema = device, dtype, ema
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()  # the most recently used last
        self._is_loading = False
        self._changed = threading.Condition()  # guards the fields below
        self._requests: list[Request] = []  # in order of arrival
        self._arrived: list[tuple[Path, LoadedModel | EngineError]] = []  # what the loading thread loaded
        self._has_news = self._is_stopping = False
        newest = next(iter(find_checkpoints(folder).values()))
        try:
            self._models[newest.name] = self._load(newest)
        except EngineError as error:
            raise UserError(str(error)) from error
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Add a request to the queue. Raises EngineError if it is full or the engine stops."""
        n = len(request.prompts)
        with self._changed:
            if self._is_stopping:
                raise EngineError("the server is stopping", "stopping")
            n_waiting = sum(r.count("waiting") for r in self._requests if not r.is_over)
            if n_waiting + n > self.queue:
                message = f"{n_waiting} sequences wait already, {n} more exceed the limit of {self.queue}; try again soon"
                raise EngineError(message, "queue_full")
            self._requests.append(request)
            self._wake()

    def cancel(self, request: Request) -> None:
        """Remove a request before the next step. Nothing more is delivered for it."""
        with self._changed:
            request.is_over = True
            self._wake()

    def stop(self) -> None:
        """End the thread after the current step. Unfinished requests receive an EngineError."""
        with self._changed:
            self._is_stopping = True
            self._wake()
        self._thread.join()

    def status(self) -> dict:
        with self._changed:
            requests = [r for r in self._requests if not r.is_over]
            return {
                "status": "stopping" if self._is_stopping else "ok",
                "loaded": list(reversed(self._models)),
                "running": sum(r.count("running") for r in requests),
                "waiting": sum(r.count("waiting") for r in requests),
                "steps": self.n_steps,
            }

    def _wake(self) -> None:
        self._has_news = True
        self._changed.notify()

    # --- the engine's thread ---------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._has_news or any(m.scheduler.is_busy for m in self._models.values()))
                    if self._is_stopping:
                        return
                    has_news, self._has_news = self._has_news, False
                if has_news:
                    self._take_arrived()
                    self._remove_finished()
                    self._start_waiting()
                for name, model in list(self._models.items()):
                    if model.scheduler.is_busy:
                        self._step(name, model)
        finally:  # also after a bug in the engine: no client waits forever
            with self._changed:
                self._is_stopping = True
            for request in list(self._requests):
                self._end(request, EngineError("the server is stopping", "stopping"))

    def _end(self, request: Request, error: EngineError | None = None) -> None:
        if not request.is_over:
            request.is_over = True
            if error:
                request.deliver(error)
        with self._changed:
            self._wake()

    def _remove_finished(self) -> None:
        with self._changed:
            finished = [r for r in self._requests if r.is_over]
            self._requests = [r for r in self._requests if not r.is_over]
        for request in finished:
            if request.model:
                request.model.scheduler.remove(request)

    def _start_waiting(self) -> None:
        """Hand the requests over to the schedulers of their checkpoints, in order of arrival. Those without a model in memory wait."""
        for model in self._models.values():
            model.is_leaving = False
        for request in [r for r in self._requests if not r.model and not r.is_over]:
            try:
                model = self._find_model(request.folder)
                if model and not model.is_leaving:
                    self._start(request, model)
            except Exception as error:  # this request ends, the server continues
                if not isinstance(error, EngineError):
                    LOG.exception("a request to %s failed", request.folder.name)
                    error = EngineError(f"the request failed ({error})")
                self._end(request, error)

    def _start(self, request: Request, model: LoadedModel) -> None:
        try:
            ids: list[list[int]] = []
            for i, prompt in enumerate(request.prompts):  # the n sequences of a prompt are neighbours
                ids.append(ids[-1] if i and prompt == request.prompts[i - 1] else model.llm.encode_prompt(prompt))
        except UserError as error:
            raise EngineError(str(error), "prompt") from None
        pairs = zip(ids, request.samplings, strict=True)
        request.sequences = [Sequence(list(prompt), sampling, request, i) for i, (prompt, sampling) in enumerate(pairs)]
        request.model = model
        request.deliver(Started([len(s.ids) for s in request.sequences]))
        for sequence in request.sequences:
            model.scheduler.add(sequence)

    def _find_model(self, folder: Path) -> LoadedModel | None:
        """The checkpoint in memory. None while it is being loaded or waits for a place."""
        name, version = folder.name, self._version(folder)
        known = self._models.get(name)
        if known and known.version == version:
            self._models.move_to_end(name)
            return known
        if self._is_loading:
            return None
        if known or len(self._models) == MAX_LOADED:  # `known` is an earlier version, from before the run wrote this step again
            candidates = {name: known} if known else dict(self._models)
            idle = next((n for n, m in candidates.items() if not m.scheduler.is_busy), None)
            if idle is None:
                min(candidates.values(), key=LoadedModel.remaining_tokens).is_leaving = True
                return None
            del self._models[idle]
        self._is_loading = True
        threading.Thread(target=self._load_for_requests, args=(folder,), name="load", daemon=True).start()
        return None

    def _version(self, folder: Path) -> tuple:
        try:
            file = weights_of(folder).stat()
        except OSError:  # the run keeps its last few only
            message = f"the checkpoint {folder.name!r} was deleted; /v1/models lists the existing ones"
            raise EngineError(message, "checkpoint_gone") from None
        return file.st_ino, file.st_mtime_ns

    def _load(self, folder: Path) -> LoadedModel:
        version = self._version(folder)
        try:
            return LoadedModel(LLM.load(folder, device=self._device, dtype=self._dtype, ema=self._ema), version, self.slots)
        except Exception as error:  # a damaged file can raise anything
            if not isinstance(error, (UserError, OSError)):
                LOG.exception("%s cannot be loaded", folder.name)
            raise EngineError(f"{folder.name} cannot be loaded: {error}") from error

    def _load_for_requests(self, folder: Path) -> None:
        """Runs in a thread of its own, so that the other checkpoints continue."""
        try:
            result = self._load(folder)
        except EngineError as error:
            result = error
        with self._changed:
            self._arrived.append((folder, result))
            self._wake()

    def _take_arrived(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
        for folder, result in arrived:
            self._is_loading = False
            if isinstance(result, LoadedModel):
                self._models[folder.name] = result
                continue
            for request in [r for r in self._requests if r.folder == folder and not r.model]:
                self._end(request, result)

    def _step(self, name: str, model: LoadedModel) -> None:
        try:
            outputs = model.scheduler.step()
        except Exception as error:  # out of memory, for example: the requests of this checkpoint end, the server continues
            LOG.exception("a step of %s failed", name)
            del self._models[name]
            hint = "" if isinstance(error, UserError) else "; try again, with fewer or shorter sequences"
            for request in [r for r in self._requests if r.model is model]:
                self._end(request, EngineError(f"generating with {name} failed ({error}){hint}"))
            return
        self.n_steps += 1
        for sequence, text, completion in outputs:
            request = sequence.request
            assert isinstance(request, Request)
            if (completion or text) and not request.is_over:
                request.deliver(Piece(sequence.index, text, completion))
        for request in [r for r in self._requests if r.model is model and r.count("finished") == len(r.prompts)]:
            self._end(request)
