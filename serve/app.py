"""The HTTP side: the page, `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/judge`, `/health`; errors in OpenAI's JSON."""

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..common.errors import UserError
from ..common.run_folder import find_checkpoints, weights_of
from ..common.sampling import Sampling
from ..data.chat import Messages, problem
from ..inference import Completion
from ..inference.engine import Engine, EngineError, Piece, Request, Started
from ..instructions.requirements import DIALOGUE, FEATURES, Requirement, judge
from ..instructions.wording import CHINESE

MAX_BODY = 256 * 1024  # bytes; a prompt that fills a context of 32,000 tokens fits
BODY_SECONDS, MAX_FIELDS = 30, 50
MAX_STOPS, MAX_STOP = 16, 200  # strings, characters: each is searched for at every token
PAGE = Path(__file__).with_name("page.html")
MOST_JUDGED, LONGEST_STORY = 20, 20_000  # requirements; characters of a story and of each of its requirements
FINISH = {"end": "stop", "stop": "stop", "length": "length"}  # OpenAI does not distinguish the first two
DEFAULT = Sampling()
Body = TypeVar("Body", bound=BaseModel)


class RequestError(Exception):
    """An error response: an HTTP status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def request_error(error: Exception) -> RequestError:
    """The response for any error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, str(error.detail))
    if not isinstance(error, EngineError):
        return RequestError(500, "internal error; see the server's log")
    status, param, code = {
        "queue_full": (429, None, "rate_limit_exceeded"),
        "stopping": (503, None, None),
        "checkpoint_gone": (404, "model", "model_not_found"),
        "prompt": (400, "prompt", "context_length_exceeded"),
        "failed": (500, None, None),
    }[error.reason]
    return RequestError(status, str(error), param=param, code=code)


class StopAtFirst(FailFast):
    """FailFast that can be part of a union: typing needs a hash."""

    def __hash__(self) -> int:
        return hash(StopAtFirst)


Strings = Annotated[list[str], StopAtFirst()]  # refuses a body of 100,000 wrong values quickly


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Settings(BaseModel):
    """What the bodies of both endpoints have. OpenAI's other fields are accepted only with their neutral values."""

    model_config = ConfigDict(extra="forbid", strict=True)
    NEUTRAL: ClassVar[dict[str, tuple]] = {"frequency_penalty": (None, 0), "logit_bias": (None, {}), "presence_penalty": (None, 0)}

    model: str | None = None  # None: the newest checkpoint
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: str | Strings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # ignored
    # not among OpenAI's
    top_k: int | None = None  # 0 or −1: all
    min_p: float | None = None
    repetition_penalty: float | None = None

    @model_validator(mode="before")
    @classmethod
    def without_neutral_settings(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        neutral = cls.NEUTRAL | Settings.NEUTRAL
        for name, values in neutral.items():
            if name in body and body[name] not in values:
                raise UserError(f"{name} is {repr(body[name])[:50]}, which this server does not support; leave it out")
        if len(body) > MAX_FIELDS:  # pydantic would report each unknown one
            raise UserError(f"the body has {len(body)} fields; the fields are {', '.join(cls.model_fields)}")
        return {name: value for name, value in body.items() if name not in neutral}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self) -> Sampling:
        """Raises UserError if a setting is out of range."""
        given = {
            "max_new_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "stop": self.stops,
        }  # fmt: skip
        top_k = DEFAULT.top_k if self.top_k is None else None if self.top_k in (0, -1) else self.top_k
        return Sampling(top_k=top_k, **{name: value for name, value in given.items() if value is not None})


class CompletionRequest(Settings):
    """The body of `/v1/completions`."""

    NEUTRAL: ClassVar[dict[str, tuple]] = {"best_of": (None, 1), "echo": (None, False), "logprobs": (None,), "suffix": (None, "")}

    prompt: str | Strings = ""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str


class ChatRequest(Settings):
    """The body of `/v1/chat/completions`."""

    NEUTRAL: ClassVar[dict[str, tuple]] = {
        "logprobs": (None, False), "top_logprobs": (None, 0), "response_format": (None, {"type": "text"}), "tools": (None, []),
        "tool_choice": (None, "none"), "modalities": (None, ["text"]), "store": (None, False), "metadata": (None, {}),
    }  # fmt: skip

    messages: Annotated[list[Message], StopAtFirst()]
    max_completion_tokens: int | None = None

    @model_validator(mode="after")
    def with_valid_messages(self) -> "ChatRequest":
        if what := problem([message.model_dump() for message in self.messages]):
            raise UserError(what)
        self.max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self


class JudgeRequest(BaseModel):
    """The body of `/judge`: a story, and what was required of it, as in the files of `tritale instruct`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    story: str = Field(max_length=LONGEST_STORY)
    requirements: Annotated[list[dict], StopAtFirst()] = Field(max_length=MOST_JUDGED)

    @model_validator(mode="after")
    def with_valid_requirements(self) -> "JudgeRequest":
        for requirement in self.requirements:
            if len(json.dumps(requirement)) > LONGEST_STORY:
                raise UserError(f"a requirement is longer than {LONGEST_STORY} characters")
            Requirement.from_json(requirement)
        return self

    def verdicts(self) -> list[bool | None]:
        """Whether each requirement is met; None if the text does not tell. Features other than dialogue are recognised by sentences of
        the built-in stories, so that a story of another model may have one without being recognised."""
        found = []
        for requirement in map(Requirement.from_json, self.requirements):
            is_met = judge(requirement, self.story, is_built_in=True).is_met
            is_certain = requirement.kind != "feature" or requirement.text == DIALOGUE
            found.append(is_met if is_met or is_certain else None)
        return found


def page_with_settings() -> str:
    """The page, with the default settings and the words of an instruction."""
    page = PAGE.read_text(encoding="utf-8")
    for name in ("temperature", "top_p", "top_k", "max_new_tokens"):
        page = page.replace("{{" + name + "}}", str(getattr(DEFAULT, name)))
    fields = {kind: names[0] for kind, names in CHINESE.fields.items()}
    words = {"opening": CHINESE.openings[0], "fields": fields, "features": FEATURES, "length": CHINESE.length}
    return page.replace("{{wording}}", json.dumps(words, ensure_ascii=False))


def error_object(error: RequestError) -> dict:
    kinds = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(_: HTTPRequest, error: Exception) -> JSONResponse:
    found = request_error(error)
    return JSONResponse(error_object(found), found.status, {"Retry-After": "1"} if found.status == 429 else None)


def choice(index: int, text: str, completion: Completion | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": FINISH[completion.finish_reason] if completion else None}


def chat_choice(index: int, text: str, completion: Completion | None) -> dict:
    found = choice(index, text, completion)
    message = {"role": "assistant", "content": found.pop("text"), "refusal": None}
    return found | {"message": message}


def chat_part(index: int, text: str, completion: Completion | None) -> dict:
    found = choice(index, text, completion)
    return found | {"delta": {"content": found.pop("text")}}


class Form(NamedTuple):
    """How an endpoint writes its answers: complete ones (`choice`), and the parts of streamed ones."""

    id: str
    object: str
    chunk: str  # the object of a part
    choice: Callable[[int, str, Completion | None], dict]
    part: Callable[[int, str, Completion | None], dict]


TEXT = Form("cmpl", "text_completion", "text_completion", choice, choice)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", chat_choice, chat_part)


async def read_body(http: HTTPRequest, kind: type[Body]) -> Body:
    """Raises RequestError if the body is too large, not JSON, or not a valid request."""
    # A page of another site can send JSON only with another Content-Type, or after a preflight request, which is refused.
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "Content-Type must be application/json")
    body = bytearray()

    async def receive() -> None:
        async for chunk in http.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY:
                raise RequestError(413, f"the body is longer than {MAX_BODY} bytes; shorten the prompt")

    try:
        await asyncio.wait_for(receive(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RequestError(408, f"the body was not complete after {BODY_SECONDS} s; send it again") from None
    except ClientDisconnect:
        raise RequestError(400, "the client disconnected before the body was complete") from None
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{param}: {message}" if param else message, param=param) from None


def sequences(
    body: Settings, prompts: Sequence[str | Messages], *, max_sequences: int, max_tokens: int
) -> tuple[list[str | Messages], list[Sampling]]:
    """The prompt and the settings of each sequence: n for the first prompt, then n for the second, …; sequence i uses seed + i.

    Raises RequestError if a limit is exceeded or a setting is out of range."""
    n = body.n or 1
    if not prompts:
        raise RequestError(400, "prompt is an empty list; give at least one prompt ('' generates without a prompt)", param="prompt")
    if len(prompts) * n > max_sequences:
        raise RequestError(400, f"{len(prompts)} prompts with n = {n} exceed the limit of {max_sequences} sequences per request", param="n")
    if body.max_tokens is not None and body.max_tokens > max_tokens:
        raise RequestError(400, f"max_tokens is {body.max_tokens}; this server allows at most {max_tokens}", param="max_tokens")
    if len(body.stops) > MAX_STOPS or any(len(s) > MAX_STOP for s in body.stops):
        raise RequestError(400, f"stop takes at most {MAX_STOPS} strings of at most {MAX_STOP} characters", param="stop")
    try:
        sampling = body.sampling()
    except UserError as error:
        message = str(error).replace("max_new_tokens", "max_tokens")
        raise RequestError(400, message, param=message.split()[0]) from None
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, max_tokens))
    samplings = [sampling if body.seed is None else replace(sampling, seed=body.seed + i) for i in range(len(prompts) * n)]
    return [prompt for prompt in prompts for _ in range(n)], samplings


def make_app(engine: Engine, *, names: Iterable[str] = (), max_tokens: int = 2048) -> FastAPI:
    """The server's application. `names`: accepted host names, in addition to `localhost` and IP addresses.

    A page of another site must not use a server on the reader's machine. The Host header reveals a foreign name that resolves to this
    machine (DNS rebinding), the Origin header reveals another site, and no cross-origin request (CORS) is allowed."""
    hosts = {"localhost", *(name.lower() for name in names)}

    def guard(http: HTTPRequest) -> None:
        host, origin = http.headers.get("host", ""), http.headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in hosts and not is_address(name):
            raise RequestError(403, f"host {name!r} is not allowed; start the server with --allow-host {name}", code="unknown_host")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError(403, f"requests from another site ({origin}) are not allowed", code="cross_origin")

    app = FastAPI(title="tritale", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(guard)])
    for kind in (RequestError, EngineError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)

    page = page_with_settings()
    policy = content_security_policy(page)

    @app.get("/")
    def playground() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    def health() -> Response:
        status = engine.status()
        return JSONResponse(status, 200 if status["status"] == "ok" else 503)

    def checkpoints() -> dict[str, Path]:
        try:
            return find_checkpoints(engine.folder)
        except (UserError, OSError):  # all were deleted
            return {}

    def find(name: str | None) -> Path:
        found = checkpoints()
        if not found or name not in (None, *found):
            message = f"there is no checkpoint {name!r}; /v1/models lists the existing ones"
            raise RequestError(404, message, param="model", code="model_not_found")
        return found[name] if name is not None else next(iter(found.values()))

    @app.get("/v1/models")
    def list_models() -> dict:
        return {"object": "list", "data": [model_object(folder) for folder in checkpoints().values()]}

    @app.get("/v1/models/{name}")
    def retrieve_model(name: str) -> dict:
        return model_object(find(name))

    @app.post("/v1/completions")
    async def completions(http: HTTPRequest) -> Response:
        body = await read_body(http, CompletionRequest)
        return await answer(http, body, [body.prompt] if isinstance(body.prompt, str) else body.prompt, TEXT)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HTTPRequest) -> Response:
        body = await read_body(http, ChatRequest)
        return await answer(http, body, [[message.model_dump() for message in body.messages]], CHAT)

    @app.post("/judge")
    async def judge_story(http: HTTPRequest) -> dict:
        body = await read_body(http, JudgeRequest)
        return {"is_met": await asyncio.to_thread(body.verdicts)}

    async def answer(http: HTTPRequest, body: Settings, prompts: Sequence[str | Messages], form: Form) -> Response:
        folder = await asyncio.to_thread(find, body.model)
        prompts, samplings = sequences(body, prompts, max_sequences=engine.slots, max_tokens=max_tokens)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Started | Piece | EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        request = Request(folder, prompts, samplings, deliver)
        engine.submit(request)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(engine.cancel, request)
            cleanup.callback(asyncio.create_task(cancel_with_client(http, engine, request)).cancel)
            try:
                started = await receive(events)
            except EngineError as error:
                if form is CHAT and error.reason == "prompt":
                    raise RequestError(400, str(error), param="messages") from None
                raise
            assert isinstance(started, Started)
            n_prompt = sum(started.prompt_tokens[:: body.n or 1])  # a prompt counts once, also with n > 1
            head = {"id": f"{form.id}-{uuid.uuid4().hex}", "created": int(time.time()), "model": folder.name}
            if body.stream:
                wants_usage = body.stream_options is not None and body.stream_options.include_usage
                head |= {"object": form.chunk}
                lines = server_sent_events(form, head, events, len(prompts), n_prompt if wants_usage else None, cleanup.pop_all())
                headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second is for nginx
                return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
            done = {piece.index: piece.completion async for piece in pieces(events, len(prompts)) if piece.completion}
            choices = [form.choice(i, done[i].text, done[i]) for i in sorted(done)]
            n_generated = sum(len(c.tokens) for c in done.values())
            return JSONResponse({**head, "object": form.object, "choices": choices, "usage": usage(n_prompt, n_generated)})

    return app


async def receive(events: asyncio.Queue) -> Started | Piece:
    """The next event. Raises EngineError if it is one."""
    event = await events.get()
    if isinstance(event, EngineError):
        raise event
    return event


async def pieces(events: asyncio.Queue, n_sequences: int) -> AsyncIterator[Piece]:
    """The pieces of a request until all its sequences are complete. Raises EngineError if the engine reports one."""
    while n_sequences:
        piece = await receive(events)
        assert isinstance(piece, Piece)
        n_sequences -= piece.completion is not None
        yield piece


async def cancel_with_client(http: HTTPRequest, engine: Engine, request: Request) -> None:
    """Cancel the request when the client disconnects."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(request)
    request.deliver(EngineError("the client disconnected"))  # ends the handler


async def server_sent_events(
    form: Form, head: dict, events: asyncio.Queue, n_sequences: int, n_prompt: int | None, cleanup: contextlib.ExitStack
) -> AsyncIterator[str]:
    """The pieces in OpenAI's form; with `n_prompt` the usage at the end."""
    # ASCII only: some clients end a line at U+0085 or U+2028.
    line = lambda value: f"data: {json.dumps(value)}\n\n"
    with cleanup:
        n_generated = 0
        if form is CHAT:
            for i in range(n_sequences):
                yield line({**head, "choices": [{**form.part(i, "", None), "delta": {"role": "assistant", "content": ""}}]})
        try:
            async for piece in pieces(events, n_sequences):
                n_generated += len(piece.completion.tokens) if piece.completion else 0
                yield line({**head, "choices": [form.part(piece.index, piece.text, piece.completion)]})
        except EngineError as error:
            yield line(error_object(request_error(error)))
            return
        if n_prompt is not None:
            yield line({**head, "choices": [], "usage": usage(n_prompt, n_generated)})
        yield "data: [DONE]\n\n"


def usage(n_prompt: int, n_generated: int) -> dict:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def model_object(folder: Path) -> dict:
    try:
        created = int(weights_of(folder).stat().st_mtime)
    except OSError:  # deleted meanwhile
        created = 0
    return {"id": folder.name, "object": "model", "created": created, "owned_by": "tritale"}


def content_security_policy(page: str) -> str:
    """Allows the page's own script and style, and requests to this server."""

    def digest(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
