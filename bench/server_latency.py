"""The longest pause of a stream of `tritale serve` while others use the server, and the tokens/s of 32 clients:

    python -m bench.server_latency [--path DIR]

The server runs in a process of its own, with two checkpoints of 44 M parameters (random weights, a context of 2,048, one token for each
character). A pause is the time between two events of a stream. It is measured on a stream that runs before, while and after

- nothing else happens,
- eight prompts of 1,500 characters arrive, until each has its first token,
- the other checkpoint is loaded, until its first token,
- 900 clients connect and send half of a request head, for three seconds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path

from tritale.model import GPTConfig

from .measure import ROOT
from .random_model import random_prompts, save_random_model

N_LONG, LONG = 8, 1500  # prompts, characters of each
N_HALF_OPEN, N_CLIENTS, N_TOKENS = 900, 32, 100


@contextlib.contextmanager
def serving(run: Path, path: Path) -> Iterator[int]:
    """The port of a server for the checkpoints of `run`. It imports tritale from `path`."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * N_HALF_OPEN), hard))  # the server inherits it
    command = [sys.executable, "-m", "tritale.cli.main", "serve", str(run), "--port", "0", "--slots", str(N_CLIENTS)]
    environment = os.environ | {"PYTHONPATH": str(path.resolve())}
    process = subprocess.Popen(command, cwd=run, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert process.stdout
        found = re.match(r"http://127\.0\.0\.1:(\d+) ", process.stdout.readline())
        if not found:
            sys.exit("bench.server_latency: the server did not start")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


async def events(port: int, prompt: str = "", **settings) -> AsyncGenerator[tuple[float, dict], None]:
    """Send a request and yield (time, event) of each event of its stream."""
    body = json.dumps({"prompt": prompt, "stream": True, "seed": 1, **settings}).encode()
    head = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}", "\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("\r\n".join(head).encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the server answered {status.decode().strip()}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield time.perf_counter(), event
    finally:
        writer.close()  # ends the request


async def first_event(port: int, prompt: str, **settings) -> None:
    async with contextlib.aclosing(events(port, prompt, **settings)) as stream:
        await anext(stream)


async def longest_pause(port: int, disturb: Callable[[], Awaitable[object]]) -> float:
    """The longest time in seconds between two events of a stream, from its 20th event until `disturb` has returned."""
    longest, previous, disturbing = 0.0, 0.0, None
    async with contextlib.aclosing(events(port, max_tokens=2000)) as stream:
        n = 0
        async for now, _ in stream:
            n += 1
            if disturbing:
                longest = max(longest, now - previous)
                if disturbing.done():
                    await disturbing
                    return longest
            elif n == 20:
                disturbing = asyncio.ensure_future(disturb())
            previous = now
    raise RuntimeError("the stream ended too early")


async def half_open(port: int) -> None:
    writers = []
    for _ in range(N_HALF_OPEN):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: ")
        writers.append(writer)
    await asyncio.sleep(3)
    for writer in writers:
        writer.close()


async def throughput(port: int) -> float:
    """Tokens/s of all clients together."""
    prompts = random_prompts([1 + 13 * i % 40 for i in range(N_CLIENTS)])

    async def count(prompt: str) -> int:
        usage = {}
        async for _, event in events(port, prompt, max_tokens=N_TOKENS, stream_options={"include_usage": True}):
            usage = event.get("usage") or usage
        return usage["completion_tokens"]

    began = time.perf_counter()
    counts = await asyncio.gather(*map(count, prompts))
    return sum(counts) / (time.perf_counter() - began)


async def measure(port: int, other: str) -> None:
    long = random_prompts([LONG] * N_LONG)
    await throughput(port)  # warms up
    disturbances: dict[str, Callable[[], Awaitable[object]]] = {
        "alone": lambda: asyncio.sleep(3),
        f"{N_LONG} prompts of {LONG:,} characters": lambda: asyncio.gather(*(first_event(port, prompt) for prompt in long)),
        "a checkpoint is loaded": lambda: first_event(port, "", model=other),
        f"{N_HALF_OPEN} half-open connections": lambda: half_open(port),
    }
    for name, disturb in disturbances.items():
        print(f"{name + ':':40} longest pause {await longest_pause(port, disturb):.3f} s", flush=True)
    rates = sorted([await throughput(port) for _ in range(3)])
    print(f"{f'{N_CLIENTS} clients:':40} {rates[1]:,.0f} tokens/s (median of 3; {rates[0]:,.0f} to {rates[2]:,.0f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=ROOT, help="the server's PYTHONPATH, to measure another version")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = [Path(folder) / f"step-{step:08d}" for step in (1, 2)]
        for step in steps:
            save_random_model(step, GPTConfig.preset("microstories-44m", context=2048))
        with serving(Path(folder), args.path) as port:
            asyncio.run(measure(port, steps[0].name))


if __name__ == "__main__":
    main()
