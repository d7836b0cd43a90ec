"""`pytest bench --benchmark` measures and prints the tables. Without the option each file runs one tiny case, which tests the benchmark.

Contenders take turns within one test session. pytest-benchmark then replays the recorded rounds of each through its timer, so that
--benchmark-json, --benchmark-compare and -k work as usual.
"""

import functools
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import pytest

if "torch" not in sys.modules:  # it limits the spinning of OpenMP's threads
    importlib.import_module("tritale.common")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.measure import ROOT, copy_rate, describe_machine, product_rate, write_results
from bench.report import tables

ROWS = pytest.StashKey[list[dict]]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="measure (default: one tiny case per file)")


def pytest_configure(config):
    config.stash[ROWS], config.stash[STARTED] = [], time.monotonic()
    if not config.getoption("verbose") > 0 and not config.getoption("benchmark_compare", None):
        config.option.benchmark_quiet = True  # hide its table of one line per test; our tables are printed at the end


class Recorded:
    """pytest-benchmark's timer: a clock that only advances by the recorded rounds."""

    now = 0.0

    def __call__(self) -> float:
        return Recorded.now


def pytest_collection_modifyitems(items):
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()) and item.path.parent == ROOT / "bench":
            item.add_marker(pytest.mark.benchmark(timer=Recorded()))


Report = Callable[..., None]


@pytest.fixture
def report(request, benchmark) -> Report:
    """report(row, seconds=()): add a row to the results and its rounds to pytest-benchmark.

    Skips the test if the contender cannot run. A peer that fails or is wrong is an expected failure; if it is ours, the test fails."""

    def play(row: dict, seconds: Sequence[float] = ()) -> None:
        request.config.stash[ROWS].append(row)
        if row["status"] == "cannot run":
            pytest.skip(row["note"])
        if row["status"] in ("failed", "wrong"):
            (pytest.fail if row["contender"].startswith("ours") else pytest.xfail)(row["note"])
        rounds = iter(seconds)

        def advance():
            Recorded.now += next(rounds)

        benchmark.group = " ".join(str(row[k]) for k in ("suite", "case", "model", "pass") if row.get(k))
        benchmark.extra_info.update({k: v for k, v in row.items() if k != "seconds"})
        benchmark.pedantic(advance, rounds=len(seconds))

    return play


@pytest.fixture(scope="session")
def benchmarking(request) -> bool:
    return request.config.getoption("--benchmark")


@pytest.fixture(scope="module")
def measured() -> dict:
    """{case: what was measured for all its contenders}, filled by the first test of each case."""
    return {}


def parameters(session: pytest.Session, function: str) -> list[dict]:
    """The parameters of all tests of this function that the session runs."""
    found = [item for item in session.items if isinstance(item, pytest.Function) and item.originalname == function]
    return [item.callspec.params for item in found]


def selected(request: pytest.FixtureRequest, **fixed) -> list[str]:
    """The contenders of this test's function that the session runs with the parameters `fixed`: all, or those that -k selects."""
    found = [p for p in parameters(request.session, request.node.originalname) if all(p[k] == v for k, v in fixed.items())]
    return list(dict.fromkeys(p["contender"] for p in found))


@pytest.fixture(scope="session")
def rates() -> Callable[[torch.dtype], dict[str, float]]:
    """rates(dtype): bytes/s of a copy and FLOP/s of a matrix product on this machine, each measured once in the session."""
    copy, product = functools.cache(copy_rate), functools.cache(product_rate)
    return lambda dtype: {"copy": copy(), "product": product(dtype)}


@pytest.fixture(scope="session")
def progress(request):
    """progress(what, steps): a progress bar on the terminal; yields a function that advances it."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    @contextmanager
    def bar(what: str, steps: int):
        with capture.global_and_fixture_disabled(), Progress(*columns, console=Console(stderr=True)) as shown:
            task = shown.add_task(what, total=steps)
            yield lambda n=1: shown.advance(task, n)

    return bar


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows = config.stash[ROWS]
    if not config.getoption("--benchmark") or not rows:
        return
    machine = describe_machine() | {"seconds": round(time.monotonic() - config.stash[STARTED])}
    suites = {"generation", "ops", "training step", "scaling"}
    has_all = {row["suite"] for row in rows} == suites and not terminalreporter.stats.get("deselected")
    is_complete = has_all and exitstatus == pytest.ExitCode.OK
    file = ROOT / ("bench/results" if is_complete else "out/bench") / f"{machine['slug']}.json"
    write_results(file, machine, rows)
    console = Console(width=None if Console().is_terminal else 180)
    console.print()
    for table in tables(rows):
        console.print(table.rich())
    minutes = machine["seconds"] / 60
    part = "" if is_complete else " (incomplete or failed runs are not written to bench/results)"
    console.print(f"{machine['name']}, PyTorch {machine['torch']}, commit {machine['commit']}, {minutes:.1f} min. Written: {file}{part}")
    console.print(f"Charts: python -m bench.report {file.relative_to(ROOT)}")
