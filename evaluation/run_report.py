"""report.html of a run: its state, diagnoses, curves and samples on one page that makes no network request and has no script."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from markupsafe import Markup

from ..common.charts import line_chart, render_page
from ..common.console import duration
from ..common.files import atomic_file
from ..training.record import REPORT
from .doctor import diagnose
from .run_facts import RunFacts, is_finite

POINTS = 200  # of a curve; a longer one is averaged
DOTS = 40  # points up to which they are drawn
SAMPLE_STEPS = 30  # with samples on the page, evenly spread
SAMPLE_LENGTH = 3000  # characters shown of a sample


def buckets(steps: np.ndarray, values: np.ndarray, reduce: Callable = np.mean) -> tuple[list[int], list[float]]:
    """At most POINTS points: `reduce` of the values of successive steps, at the last of these steps."""
    if not len(steps):
        return [], []
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    return [int(steps[part[-1]]) for part in parts], [float(reduce(values[part])) for part in parts]


def merged(lines: dict[str, tuple[list[int], list[float]]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """Lines with their own steps as lines over the steps of all: None where a line has no value."""
    xs = sorted({step for steps, _ in lines.values() for step in steps})
    tables = {name: dict(zip(steps, values, strict=True)) for name, (steps, values) in lines.items()}
    return xs, {name: [table.get(step) for step in xs] for name, table in tables.items()}


def charts(f: RunFacts) -> list[Markup]:
    """The charts that the run has values for."""
    found = []

    def add(title: str, unit: str, lines: dict[str, tuple[list[int], list[float]]], *, from_zero: bool = True) -> None:
        if lines := {name: line for name, line in lines.items() if line[0]}:
            xs, values = merged(lines)
            found.append(line_chart(title, unit, "step", xs, values, from_zero=from_zero, max_dots=DOTS))

    def curve(name: str, reduce: Callable = np.mean) -> tuple[list[int], list[float]]:
        return buckets(*f.column(name), reduce)

    def validation(key: str, after: float = 0) -> tuple[list[int], list[float]]:
        points = [(v["step"], v[key]) for v in f.validations if v["step"] > after and is_finite(v.get(key))]
        return [int(step) for step, _ in points], [value for _, value in points]

    steps, losses = f.column("loss")
    second = steps > f.step / 2
    add("Loss", "nats per token", {"training": curve("loss"), "validation": validation("val_loss")})
    if second.sum() >= 5:
        lines = {"training": buckets(steps[second], losses[second]), "validation": validation("val_loss", after=f.step / 2)}
        add("Loss, second half", "nats per token, enlarged", lines, from_zero=False)
    add("Validation", "bits per character", {"validation": validation("val_bits_per_char")})
    add("Learning rate", "of the matrices", {"rate": curve("lr")})
    for title, unit, name, extreme, reduce in (
        ("Gradient norm", "before clipping", "grad_norm", "highest", np.max),
        ("Throughput", "tokens per second", "tokens_per_second", "lowest", np.min),
    ):
        lines = {"median": curve(name, np.median)}
        if len(f.lines) > POINTS:  # a point stands for several lines
            lines[extreme] = curve(name, reduce)
        add(title, unit, lines)
    add("Memory", "GiB, peak so far", {"memory": curve("memory_gib", np.max)})
    add("Bad steps", "skipped so far", {"bad steps": curve("bad_steps", np.max)})
    return found


def sample_steps(f: RunFacts) -> tuple[list[tuple[int, list[dict]]], int]:
    """([(step, its samples)] of at most SAMPLE_STEPS steps, newest first, and the number of steps left out)."""
    by_step: dict[int, list[dict]] = {}
    for sample in f.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step, reverse=True)
    shown = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(SAMPLE_STEPS, len(steps)))}, reverse=True)
    return [(step, by_step[step]) for step in shown], len(steps) - len(shown)


def page(f: RunFacts) -> str:
    """The report as HTML. All text of models and users is escaped."""
    samples, left_out = sample_steps(f)
    return render_page(
        Path(__file__).with_name("run_report.html"),
        f=f,
        written=time.strftime("%Y-%m-%d %H:%M"),
        diagnoses=diagnose(f),
        charts=charts(f),
        samples=samples,
        left_out=left_out,
        sample_length=SAMPLE_LENGTH,
        duration=duration,
    )


def write_report(folder: Path, warn: Callable[[str], object] = lambda text: None) -> Path:
    """Write report.html into the folder of a run. An error is passed to `warn` as text: a page does not end a run."""
    path = folder / REPORT
    try:
        text = page(RunFacts.read(folder))
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except Exception as error:
        warn(f"{path} could not be written ({type(error).__name__}: {error})")
    return path
