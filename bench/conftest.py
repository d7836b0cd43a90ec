"""`pytest bench --benchmark` measures and prints the tables; without the option each file runs one tiny case, to keep it alive.

Contenders are timed in turns inside one test session, and pytest-benchmark gets the recorded rounds of each through its timer, so that
--benchmark-json, --benchmark-compare and -k work as everywhere.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.measure import ROOT, copy_rate, describe_machine, product_rate, write_results
from bench.report import tables

ROWS = pytest.StashKey[list[dict]]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="measure, instead of one tiny case per file")


def pytest_configure(config):
    config.stash[ROWS], config.stash[STARTED] = [], time.monotonic()
    if not config.getoption("verbose") > 0 and not config.getoption("benchmark_compare", None):
        config.option.benchmark_quiet = True  # its table has a line for every test; ours are printed at the end


class Recorded:
    """A clock that stands still but for the recorded rounds it is told to play: pytest-benchmark's timer."""

    now = 0.0

    def __call__(self) -> float:
        return Recorded.now


def pytest_collection_modifyitems(items):
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()) and item.path.parent == ROOT / "bench":
            item.add_marker(pytest.mark.benchmark(timer=Recorded()))


@pytest.fixture
def report(request, benchmark) -> Callable[[dict, list[float] | None], None]:
    """report(row, seconds): put a row into the results and its rounds into pytest-benchmark. Skips where the contender cannot run,
    and marks as expected failure where a peer fails or is wrong; where ours does, the test fails."""

    def play(row: dict, seconds: list[float] | None) -> None:
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


@pytest.fixture
def benchmarking(request) -> bool:
    return request.config.getoption("--benchmark")


def selected(request: pytest.FixtureRequest, **fixed: str) -> list[str]:
    """The contenders of this test's function that the session runs (all, or those of -k), where the other parameters are the same."""
    found = []
    for item in request.session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and item.originalname == request.node.originalname and all(params.get(k) == v for k, v in fixed.items()):
            found.append(params["contender"])
    return list(dict.fromkeys(found))


@pytest.fixture(scope="session")
def rates(request) -> Callable[[str], dict]:
    """rates(dtype): bytes/s of a copy and FLOP/s of a matrix product on this machine, measured once in the session."""
    known: dict[str, float] = {}

    def of(dtype: torch.dtype) -> dict[str, float]:
        if "copy" not in known:
            known["copy"] = copy_rate()
        if str(dtype) not in known:
            known[str(dtype)] = product_rate(dtype)
        return {"copy": known["copy"], "product": known[str(dtype)]}

    return of


@pytest.fixture(scope="session")
def progress(request):
    """progress(what, steps): a bar on the terminal while something takes longer; gives a function that advances it."""
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
    is_all = {row["suite"] for row in rows} == suites and not terminalreporter.stats.get("deselected")
    is_whole = is_all and exitstatus == pytest.ExitCode.OK
    folder = ROOT / "bench/results" if is_whole else ROOT / "out/bench"
    file = folder / f"{machine['slug']}.json"
    write_results(file, machine, rows)
    console = Console(width=None if Console().is_terminal else 180)
    console.print()
    for table in tables(rows):
        console.print(table.rich())
    minutes = machine["seconds"] / 60
    part = "" if is_whole else " (not the whole suite, or not all of it passed, so not into bench/results)"
    console.print(f"{machine['name']}, PyTorch {machine['torch']}, commit {machine['commit']}, {minutes:.1f} min. Written: {file}{part}")
    console.print(f"Charts: python -m bench.report {file.relative_to(ROOT)}")
