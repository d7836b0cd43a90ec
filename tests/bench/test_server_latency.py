"""The longest pause of a stream is found, and a server's error is not taken for a pause."""

import asyncio

import pytest

from bench.server_latency import longest_pause

PAUSE = 0.4


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """100 events, with PAUSE before the 5th, which is not measured yet, and before the 50th."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for i in range(1, 101):
        await asyncio.sleep({5: 2 * PAUSE, 50: PAUSE}.get(i, 0.005))
        writer.write(b'data: {"choices": []}\n\n')
        await writer.drain()
    writer.write(b'data: {"error": {"message": "the model is gone"}}\n\n')


async def measure(seconds: float) -> float:
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        return await longest_pause(server.sockets[0].getsockname()[1], lambda: asyncio.sleep(seconds))


def test_the_longest_pause_while_something_happens():
    assert PAUSE <= asyncio.run(measure(0.5)) < 2 * PAUSE


def test_an_error_of_the_server_is_raised():
    with pytest.raises(RuntimeError, match="the model is gone"):
        asyncio.run(measure(60))
