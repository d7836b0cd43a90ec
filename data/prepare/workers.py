"""Worker processes."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any

from ...common.errors import UserError


class Workers:
    """A pool of `n` processes, by default one for each core and at most 8. With one, this process does the work."""

    def __init__(self, n: int | None):
        if n is not None and n < 1:
            raise UserError(f"--workers {n} must be at least 1; the default is one for each core, at most 8")
        self._n = n or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def map(self, function: Callable, items: Iterable[tuple[Any, tuple]], name: Callable[[Any], str] = str) -> Iterator[tuple[Any, Any]]:
        """Yield (item, function(*arguments)) for each (item, arguments), in order, computing a few ahead.

        Raises UserError, with the `name` of the first item without a result, if a process is killed."""
        if self._n == 1:
            yield from ((item, function(*arguments)) for item, arguments in items)
            return
        if not self._pool:
            # Not forked: this process may have threads.
            self._pool = ProcessPoolExecutor(self._n, get_context("spawn"), _set_up)
        ahead, items = deque(), iter(items)
        while True:
            try:
                for item, arguments in islice(items, 1 + 2 * self._n - len(ahead)):
                    ahead.append((item, self._pool.submit(function, *arguments)))
                if not ahead:
                    return
                result = ahead[0][1].result()
            except BrokenProcessPool:
                place = f"at {name(ahead[0][0])} or after" if ahead else "at its start"
                raise UserError(
                    f"a worker process was killed {place}, perhaps for its memory; use fewer --workers than {self._n}"
                ) from None
            yield ahead.popleft()[0], result

    def stop(self) -> None:
        """End the processes and free their memory; the next call of `map` starts new ones."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _set_up() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at Ctrl-C without a traceback
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # the processes share the cores already
    if parent := parent_process():  # end with it, also if it is killed
        Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
