"""The uvicorn server, which closes connections that send no complete request head. uvicorn itself has no such limit."""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 10.0


class Protocol(AutoHTTPProtocol):  # pyright: ignore[reportGeneralTypeIssues] (one of two classes, chosen by what is installed)
    """Closes a connection that has waited for a request head for HEAD_SECONDS to twice as long."""

    cycle: Any
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._idle_cycle: Any = ...
        self._check = self.loop.call_later(HEAD_SECONDS, self._close_if_idle, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._check.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self, transport: asyncio.Transport) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._idle_cycle is self.cycle:
            transport.close()
            return
        self._idle_cycle = self.cycle if is_idle else ...
        self._check = self.loop.call_later(HEAD_SECONDS, self._close_if_idle, transport)


def make_server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, http=Protocol, log_level="warning", server_header=False, timeout_graceful_shutdown=2))
