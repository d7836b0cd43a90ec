"""Line and bar charts as SVG, and the HTML pages that contain them.

A chart has a fixed coordinate system, which the page scales. `page.html` defines its colours for light and dark mode. All text is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 22, 12, 34  # margins of the plot area
LINE_HEIGHT, CHARACTER_WIDTH = 12, 6.2  # upper bounds for the labels' font


def render_page(template: Path, **values: object) -> str:
    """Render a Jinja template that extends `page.html`. Values are escaped, and an undefined one raises UndefinedError."""
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    return environment.get_template(template.name).render(values)


def line_chart(
    title: str,
    unit: str,
    x_name: str,
    xs: Sequence[float],  # ascending
    lines: Mapping[str, Sequence[float | None]],  # at most three; one shorter than xs ends early, None leaves a point out
    *,
    references: Mapping[str, float] | None = None,  # dashed horizontal lines, labelled at the right
    log_x: bool = False,  # logarithmic x axis with a tick at each of xs, instead of a linear one from 0
    from_zero: bool = True,  # whether the axes begin at 0, or at the lowest value
    max_dots: float = math.inf,  # a line with more points is drawn without dots and their tooltips
    cursors: Sequence[str] = (),  # vertical lines of class cursor-<name> that a script moves to one of data-xs
) -> Markup:
    """A <figure> with a caption, the chart and, for several lines, a key."""
    references = dict(sorted((references or {}).items(), key=lambda item: -item[1]))
    labels = [f"{name} {number(value)}" for name, value in references.items()]
    right = WIDTH - max(RIGHT, *(10 + CHARACTER_WIDTH * len(label) for label in labels), 0)
    heights = [v for line in lines.values() for v in line if v is not None] + list(references.values())
    y_ticks = ticks(max(heights, default=1), 0 if from_zero else min(heights, default=0))
    low, high = (math.log(xs[0]), math.log(xs[-1])) if log_x else (0 if from_zero else xs[0], xs[-1])

    def x(value: float) -> float:
        return round(LEFT + (right - LEFT) * ((math.log(value) if log_x else value) - low) / ((high - low) or 1), 1)

    x_ticks = xs if log_x else [t for t in ticks(high, low) if low <= t <= xs[-1] * 1.001 and t == int(t)]
    parts = _axes([(x(t), f"{t:,.0f}" if log_x else number(t)) for t in x_ticks], y_ticks, x_name, right)
    label_ys = [_y(value, y_ticks) for value in references.values()]
    for y, label_y, label in zip(label_ys, spread(label_ys), labels, strict=True):
        parts.append(_element("line", class_="dashed", x1=LEFT, x2=right, y1=y, y2=y))
        parts.append(_element("text", label, class_="label", x=right + 6, y=label_y + 3.5))
    parts += (_element("line", class_=f"cursor-{name}", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM) for name in cursors)
    for i, (name, values) in enumerate(lines.items(), 1):
        pairs = [(at, value) for at, value in zip(xs, values, strict=False) if value is not None]
        points = [(x(at), _y(value, y_ticks), f"{x_name} {at:,}: {name} {number(value)}") for at, value in pairs]
        parts.append(_element("polyline", class_=f"line c{i}", points=" ".join(f"{px},{py}" for px, py, _ in points)))
        if len(points) <= max_dots:
            parts += (_element("circle", _element("title", tooltip), class_=f"c{i}", cx=px, cy=py, r=2.6) for px, py, tooltip in points)
    key = [_element("span", _element("i", class_=f"c{i}"), name) for i, name in enumerate(lines, 1)] if len(lines) > 1 else []
    return _figure(title, unit, x_name, parts, key, data_xs=" ".join(str(x(at)) for at in xs))


def bar_chart(title: str, unit: str, x_name: str, bars: Sequence[tuple[str, str, float]]) -> Markup:
    """A <figure> with a caption and one bar for each (tick label, tooltip, value). Labels that would overlap are left out."""
    y_ticks = ticks(max(value for _, _, value in bars))
    width = (WIDTH - RIGHT - LEFT) / len(bars)
    parts = _axes([(LEFT + i * width, label) for i, (label, _, _) in enumerate(bars)], y_ticks, x_name, WIDTH - RIGHT)
    for i, (_, tooltip, value) in enumerate(bars):
        x, y, height = round(LEFT + i * width, 1), _y(value, y_ticks), round(HEIGHT - BOTTOM - _y(value, y_ticks), 1)
        parts.append(_element("rect", _element("title", tooltip), class_="c1", x=x, y=y, width=round(0.9 * width, 1), height=height))
    return _figure(title, unit, x_name, parts)


def ticks(high: float, low: float = 0) -> list[float]:
    """Round numbers, about four steps, from 0 or at most `low` to at least `high`."""
    raw = (high - low or abs(high) or 1) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil((low + 4 * raw) / step - 1e-9) + 1)]


def spread(ys: Sequence[float]) -> list[float]:
    """Positions for labels at `ys`, in ascending order: near their own, LINE_HEIGHT apart, and not below the plot area."""
    ys = list(ys)
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + LINE_HEIGHT)
    return [min(y, HEIGHT - BOTTOM - LINE_HEIGHT * (len(ys) - 1 - i)) for i, y in enumerate(ys)]


def number(value: float) -> str:
    """At most six characters, with k for thousands from 10,000 on and M for millions."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _y(value: float, y_ticks: Sequence[float]) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)


def _axes(x_labels: Sequence[tuple[float, str]], y_ticks: Sequence[float], x_name: str, right: float) -> list[Markup]:
    # Horizontal grid lines with labels, the name of the x axis, and its labels: all, or each second, third, …, so that none overlap.
    parts = [_element("text", x_name, x=right, y=HEIGHT - 4, text_anchor="end")]
    for tick, y in ((tick, _y(tick, y_ticks)) for tick in y_ticks):
        parts.append(_element("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y))
        parts.append(_element("text", number(tick), x=LEFT - 6, y=y + 3.5, text_anchor="end"))
    distance = lambda a, b: b[0] - a[0] - CHARACTER_WIDTH * (len(a[1]) + len(b[1])) / 2
    spaced = (x_labels[::n] for n in range(1, len(x_labels) + 1))
    shown = next(labels for labels in spaced if all(distance(a, b) >= 4 for a, b in pairwise(labels)))
    return parts + [_element("text", label, x=round(x, 1), y=HEIGHT - BOTTOM + 15, text_anchor="middle") for x, label in shown]


def _figure(title: str, unit: str, x_name: str, parts: Sequence[Markup], key: Sequence[Markup] = (), **attributes: str) -> Markup:
    description = f"{title} by {x_name}, {unit}"
    chart = _element("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=description, **attributes)
    caption = _element("figcaption", f"{title} ", _element("small", unit))
    return _element("figure", caption, chart, _element("div", *key, class_="key"))


def _element(name: str, *children: str, **attributes: object) -> Markup:
    # `class_` is the attribute class, `text_anchor` text-anchor. Markup.format escapes what is not Markup.
    pairs = Markup("").join(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    return Markup("<{0}{1}>{2}</{0}>").format(name, pairs, Markup("").join(children))
