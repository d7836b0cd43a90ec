"""tritale serve: a server for the checkpoints of a run, with a page to try them and OpenAI's /v1/completions."""

import argparse
import contextlib
import errno
import gc
import importlib.util
import socket
import sys

from ..common.errors import UserError
from . import options

HELP = "serve a run's checkpoints: a page to try them, and OpenAI's /v1/completions"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "dir", "a run, such as out/quickstart, or one of its step-… folders")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 gives access to everyone who can reach this machine")
    p.add_argument("--port", type=int, default=8000, help="0: any free port")
    p.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="accept this host name too; may be given several times"
    )
    p.add_argument("--slots", type=int, default=16, help="sequences of a checkpoint in one batch; also the limit per request")
    p.add_argument("--queue", type=int, default=64, help="sequences that may wait; more are refused (429)")
    p.add_argument("--max-tokens", type=int, default=2048, help="limit of max_tokens in a request")
    options.add_ema(p)
    options.add_device(p)


def run(args: argparse.Namespace) -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found; run: pip install fastapi uvicorn")
    for name in ("slots", "queue", "max_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.queue < args.slots:
        raise UserError(f"--queue is {args.queue}; it must be at least --slots ({args.slots}), or a request could never fit")
    with contextlib.closing(listen(args.host, args.port)) as listener:  # before the slow loading
        serve(args, listener)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises UserError or OSError if that is not possible."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; it must be between 1 and 65535, or 0 for any that is free")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {host} is taken, perhaps by another server; stop it, or choose another port with --port"
            ) from None
        if error.errno == errno.EACCES:
            raise OSError(f"port {port} is not permitted (ports below 1024 usually are not); choose another with --port") from None
        raise OSError(f"cannot listen on {host} ({error}); --host takes an address of this machine, such as 127.0.0.1") from None


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    import torch

    from ..common.run_folder import find_checkpoints
    from ..inference import native
    from ..inference.engine import Engine
    from ..serve.app import make_app
    from ..serve.connections import make_server

    found = find_checkpoints(args.dir)
    engine = Engine(args.dir, slots=args.slots, queue=args.queue, device=args.device, dtype=getattr(torch, args.dtype), ema=args.ema)
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    newest = next(iter(found))
    print(
        f"http://{shown}:{port}  {len(found)} checkpoint{'s' if len(found) > 1 else ''} of {args.dir}, newest {newest}; Ctrl-C ends",
        flush=True,
    )
    if not (host.startswith("127.") or host == "::1"):
        print(f"listening on {host}: everyone who can reach this machine can use the server, there is no password", file=sys.stderr)
    if args.device in (None, "cpu") and not torch.cuda.is_available() and (problem := native.problem()):
        print(problem, file=sys.stderr)
    app = make_app(engine, names=[args.host, *args.allow_host], max_tokens=args.max_tokens)
    gc.collect()
    gc.freeze()  # else a full collection, of 200,000 objects with PyTorch, stops all streams for 0.4 s
    try:
        make_server(app).run(sockets=[listener])
    finally:
        engine.stop()
