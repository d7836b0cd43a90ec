"""tritale serve: a page to play with, and OpenAI's /v1/completions, for the checkpoints of a run."""

import argparse
import contextlib
import errno
import importlib.util
import socket
import sys
from pathlib import Path

from ..common.errors import UserError

HELP = "serve a run's checkpoints: a page to play with, and OpenAI's /v1/completions"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("dir", metavar="DIR", type=Path, help="a run, such as out/quickstart, or one of its step-… folders")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: whoever reaches this machine can use the server")
    p.add_argument("--port", type=int, default=8000, help="0: any that is free")
    p.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this machine that browsers may use; repeatable"
    )
    p.add_argument(
        "--slots", type=int, default=16, help="texts of a checkpoint written side by side, and the most that one request may ask for"
    )
    p.add_argument("--queue", type=int, default=64, help="texts that may wait; more are refused (429)")
    p.add_argument("--max-tokens", type=int, default=2048, help="most tokens a text may ask for")
    p.add_argument("--device", default=None, help="cuda, cpu; chosen by itself where not given")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights in memory")


def run(args: argparse.Namespace) -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found; run: pip install fastapi uvicorn")
    for name in ("slots", "queue", "max_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.queue < args.slots:
        raise UserError(f"--queue is {args.queue}; it must be at least --slots ({args.slots}), or a request could never fit")
    with contextlib.closing(listen(args.host, args.port)) as listener:  # first: it is the quickest to fail
        serve(args, listener)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises ValueError or OSError that says what to choose instead."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; it must be between 1 and 65535, or 0 for any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {host} is taken, by another server perhaps; stop that one, or choose another with --port"
            ) from None
        if error.errno == errno.EACCES:
            raise OSError(f"port {port} is not for users (those below 1024 rarely are); choose another with --port") from None
        raise OSError(f"cannot listen on {host} ({error}); --host takes an address of this machine, such as 127.0.0.1") from None


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    import torch
    import uvicorn

    from ..inference import native
    from ..inference.scheduler import Engine, find_checkpoints
    from ..serve.app import make_app

    found = find_checkpoints(args.dir)
    engine = Engine(args.dir, slots=args.slots, queue=args.queue, device=args.device, dtype=getattr(torch, args.dtype))
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    newest = next(iter(found))
    print(
        f"http://{shown}:{port}  {len(found)} checkpoint{'s' if len(found) > 1 else ''} of {args.dir}, newest {newest}; Ctrl-C ends",
        flush=True,
    )
    if not (host.startswith("127.") or host == "::1"):
        print(f"listening on {host}: whoever reaches this machine can use the server, there is no password", file=sys.stderr)
    if args.device in (None, "cpu") and not torch.cuda.is_available() and isinstance(native.library(), str):
        print(native.library(), file=sys.stderr)
    app = make_app(engine, names=[args.host, *args.allow_host], max_tokens=args.max_tokens)
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=2)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        engine.stop()
