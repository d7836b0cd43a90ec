"""The HTTP side: the page, `/v1/completions`, `/v1/models`, `/health`; errors in OpenAI's JSON."""

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from ..common.errors import UserError
from ..inference import Completion, Sampling
from ..inference.scheduler import Engine, Piece, Request, RequestError, Started, find_checkpoints

MAX_BODY = 256 * 1024  # bytes; a prompt that fills a context of 32,000 tokens fits
MAX_STOPS, MAX_STOP = 16, 200  # strings, characters: each is looked for at every token
PAGE = Path(__file__).with_name("page.html")
FINISH = {"end": "stop", "stop": "stop", "length": "length"}  # OpenAI knows no difference between the first two
DEFAULT = Sampling()


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `/v1/completions`. What OpenAI knows and this server does not is accepted where it asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None  # the newest checkpoint
    prompt: str | list[str] = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # not looked at
    # beyond OpenAI's
    top_k: int | None = None  # 0 or -1: all
    min_p: float | None = None
    repetition_penalty: float | None = None

    @model_validator(mode="before")
    @classmethod
    def without_neutral_settings(cls, body: Any) -> Any:
        neutral = {
            "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0), "logit_bias": (None, {}), "logprobs": (None,),
            "presence_penalty": (None, 0), "suffix": (None, ""),
        }  # fmt: skip
        if not isinstance(body, dict):
            return body
        for name, values in neutral.items():
            if name in body and body[name] not in values:
                raise UserError(f"{name} is {body[name]!r}, which this server cannot do; leave it out")
        return {name: value for name, value in body.items() if name not in neutral}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self) -> Sampling:
        """Raises ValueError for a setting out of range."""
        given = {
            "max_new_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "stop": self.stops,
        }  # fmt: skip
        top_k = DEFAULT.top_k if self.top_k is None else None if self.top_k in (0, -1) else self.top_k
        return Sampling(top_k=top_k, **{name: value for name, value in given.items() if value is not None})


def error_object(error: RequestError) -> dict:
    kinds = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    return JSONResponse(error_object(error), error.status, {"Retry-After": "1"} if error.status == 429 else None)


async def read_body(http: HTTPRequest) -> CompletionRequest:
    """Raises RequestError for a body that is too large, not JSON, or not what `/v1/completions` takes."""
    # A page of another site can send JSON only as another type, or after a preflight that is never answered.
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "Content-Type must be application/json")
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RequestError(413, f"the body is longer than {MAX_BODY} bytes; shorten the prompt")
    try:
        return CompletionRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{param}: {message}" if param else message, param=param) from None


def texts(body: CompletionRequest, *, max_texts: int, max_tokens: int) -> tuple[list[str], list[Sampling]]:
    """The prompt and the settings of each text: the n of the first prompt, then those of the second; text i draws with seed + i.

    Raises RequestError for what is over a limit or out of range."""
    prompts, n = [body.prompt] if isinstance(body.prompt, str) else body.prompt, body.n or 1
    if not prompts:
        raise RequestError(400, "prompt is an empty list; give at least one text ('' lets the model begin)", param="prompt")
    if len(prompts) * n > max_texts:
        raise RequestError(400, f"{len(prompts)} prompts with n = {n} are over the limit of {max_texts} texts a request", param="n")
    if body.max_tokens is not None and body.max_tokens > max_tokens:
        raise RequestError(400, f"max_tokens is {body.max_tokens}; this server writes at most {max_tokens}", param="max_tokens")
    if len(body.stops) > MAX_STOPS or any(len(s) > MAX_STOP for s in body.stops):
        raise RequestError(400, f"stop takes at most {MAX_STOPS} texts of at most {MAX_STOP} characters", param="stop")
    try:
        sampling = body.sampling()
    except ValueError as error:
        message = str(error).replace("max_new_tokens", "max_tokens")
        raise RequestError(400, message, param=message.split()[0]) from None
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, max_tokens))
    samplings = [sampling if body.seed is None else replace(sampling, seed=body.seed + i) for i in range(len(prompts) * n)]
    return [prompt for prompt in prompts for _ in range(n)], samplings


def make_app(engine: Engine, *, names: Sequence[str] = (), max_tokens: int = 2048) -> FastAPI:
    """The server's application. `names`: host names by which it may be called, beside `localhost` and IP addresses.

    A page of another site must not use a server on the reader's own machine: a name that is made to point here (DNS rebinding) stands in
    the Host header, another site in the Origin header, and nothing allows a cross-origin request (CORS)."""
    names = {"localhost", *(name.lower() for name in names)}

    def guard(http: HTTPRequest) -> None:
        host, origin = http.headers.get("host", ""), http.headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in names and not is_address(name):
            raise RequestError(403, f"host {name!r} is not known here; start the server with --allow-host {name}", code="unknown_host")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError(403, f"requests from pages of another site ({origin}) are not answered", code="cross_origin")

    app = FastAPI(title="tritale", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(guard)])
    app.add_exception_handler(RequestError, lambda _, error: error_response(error))
    app.add_exception_handler(HTTPException, lambda _, error: error_response(RequestError(error.status_code, str(error.detail))))
    app.add_exception_handler(Exception, lambda _, error: error_response(RequestError(500, "the server failed; its log says why")))

    page = PAGE.read_text(encoding="utf-8")
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
        except (ValueError, OSError):  # all are gone
            return {}

    def find(name: str | None) -> Path:
        found = checkpoints()
        if not found or name not in (None, *found):
            message = f"there is no checkpoint {name!r}; /v1/models lists those that are there"
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
        body = await read_body(http)
        folder = await asyncio.to_thread(find, body.model)
        prompts, samplings = texts(body, max_texts=engine.slots, max_tokens=max_tokens)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Started | Piece | RequestError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        request = Request(folder, prompts, samplings, deliver)
        engine.submit(request)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(engine.cancel, request)
            cleanup.callback(asyncio.create_task(leave_with_client(http, engine, request)).cancel)
            started = await receive(events)
            n_prompt = sum(started.prompt_tokens[:: body.n or 1])  # a prompt counts once, however many texts follow it
            head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": folder.name}
            if body.stream:
                asks_usage = body.stream_options is not None and body.stream_options.include_usage
                lines = server_sent_events(head, events, len(prompts), n_prompt if asks_usage else None, cleanup.pop_all())
                headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second for nginx
                return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
            done = {piece.index: piece.completion async for piece in pieces(events, len(prompts)) if piece.completion}
            choices = [choice(i, done[i].text, done[i]) for i in sorted(done)]
            return JSONResponse({**head, "choices": choices, "usage": usage(n_prompt, sum(len(c.tokens) for c in done.values()))})

    return app


async def receive(events: asyncio.Queue) -> Started | Piece:
    event = await events.get()
    if isinstance(event, RequestError):
        raise event
    return event


async def pieces(events: asyncio.Queue, n_texts: int) -> AsyncIterator[Piece]:
    """Until all texts are done. Raises RequestError where the engine reports one."""
    while n_texts:
        piece = await receive(events)
        n_texts -= piece.completion is not None
        yield piece


async def leave_with_client(http: HTTPRequest, engine: Engine, request: Request) -> None:
    """Where the client goes away first, its texts leave the engine."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(request)
    request.deliver(RequestError(499, "the client has gone"))  # wakes the handler


async def server_sent_events(
    head: dict, events: asyncio.Queue, n_texts: int, n_prompt: int | None, cleanup: contextlib.ExitStack
) -> AsyncIterator[str]:
    """The pieces as OpenAI sends them; with `n_prompt` also how many tokens it took."""
    # ASCII: some clients take U+0085 or U+2028 inside a line for its end.
    line = lambda value: f"data: {json.dumps(value)}\n\n"
    with cleanup:
        n_written = 0
        try:
            async for piece in pieces(events, n_texts):
                n_written += len(piece.completion.tokens) if piece.completion else 0
                yield line({**head, "choices": [choice(piece.index, piece.text, piece.completion)]})
        except RequestError as error:
            yield line(error_object(error))
            return
        if n_prompt is not None:
            yield line({**head, "choices": [], "usage": usage(n_prompt, n_written)})
        yield "data: [DONE]\n\n"


def choice(index: int, text: str, completion: Completion | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": FINISH[completion.finish_reason] if completion else None}


def usage(n_prompt: int, n_written: int) -> dict:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_written, "total_tokens": n_prompt + n_written}


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def model_object(folder: Path) -> dict:
    try:
        created = int((folder / "model.safetensors").stat().st_mtime)
    except OSError:  # removed at this moment
        created = 0
    return {"id": folder.name, "object": "model", "created": created, "owned_by": "tritale"}


def content_security_policy(page: str) -> str:
    """The page's own script and style, requests to this server, and nothing else."""
    digest = lambda tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
