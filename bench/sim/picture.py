"""The comparison as one HTML page: tables and SVG drawn by hand, nothing fetched, no script."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from bench.sim.metrics import Figures
from bench.sim.report import COLUMNS, Rows

_COLOURS = ("#1f6feb", "#8a8f98", "#d1495b", "#2a9d8f", "#b07aa1", "#e08e0b")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 400, 230, 52, 14, 34
_TOPS = (1, 1.2, 1.6, 2, 2.4, 2.8, 3.2, 4, 5, 6, 8, 10)
# title, key, unit, is less better
_CHARTS = (
    ("Mean wait", "mean_wait_s", "s", True),
    ("p99 wait", "p99_wait_s", "s", True),
    ("Longest wait for the rare model", "rare_max_wait_s", "s", True),
    ("Model loads in a run", "switches", "", True),
    ("First token within the SLO", "attainment", "", False),
    ("Worst tenant's share of its fair share", "worst_share", "", False),
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #667; --line: #d8dbe0; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --dim: #9aa3ad; --line: #3a4048; --back: #15181c; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto;
  padding: 0 1rem; color: var(--ink); background: var(--back); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
figcaption small, .dim { color: var(--dim); font-weight: 400; }
figcaption small { display: block; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 11px; }
.grid { stroke: var(--line); } .bound { stroke: var(--ink); stroke-dasharray: 4 4; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } .wide { overflow-x: auto; }
.key { display: flex; flex-wrap: wrap; gap: 1rem; } .key i { display: inline-block;
  width: 1.6em; height: .25em; margin-right: .4em; vertical-align: middle; }
.key .promise { height: 0; border-top: 2px dashed var(--ink); }
"""

Line = tuple[str, str, list[tuple[float, float]]]  # (name, colour, points)


def page(rows: Rows, about: Mapping[str, object]) -> str:
    """The whole page."""
    policies = list(next(iter(rows.values())))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(policies)}
    charts = [_load_chart(chart, rows, colours) for chart in _CHARTS]
    charts += [_wait_chart(load, by_policy, colours) for load, by_policy in rows.items()]
    tables = [_table(load, by_policy) for load, by_policy in rows.items()]
    settings = ", ".join(f"{key} {value}" for key, value in about.items() if value != "")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Headway: policies compared</title><style>{_STYLE}</style>"
        "<h1>Who waits, and how long</h1>"
        f'<p class="dim">Simulated with the production core. {escape(settings)}</p>'
        f"{_key(colours, rows)}"
        f'<div class="charts">{"".join(charts)}</div>{"".join(tables)}</html>\n'
    )


def _key(colours: Mapping[str, str], rows: Rows) -> str:
    items = [
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    ]
    items += [
        f'<span><i class="promise"></i>{escape(name)}, for the rare model</span>'
        for name, _, _ in _bounds(rows)
    ]
    return f'<p class="key">{"".join(items)}</p>'


def _load_chart(
    chart: tuple[str, str, str, bool],
    rows: Rows,
    colours: Mapping[str, str],
) -> str:
    """One figure over the loads."""
    title, key, unit, is_less_better = chart
    lines: list[Line] = [
        (name, colour, [(load, by_policy[name][key]) for load, by_policy in rows.items()])
        for name, colour in colours.items()
    ]
    if key == "rare_max_wait_s":
        lines += _bounds(rows)
    better = "less is better" if is_less_better else "more is better"
    return _figure(title, f"over load in %; {better}", lines, f"{{:g}} {unit}".strip(), list(rows))


def _bounds(rows: Rows) -> list[Line]:
    """What is promised, of each policy that promises something."""
    names = list(next(iter(rows.values())))
    return [
        (
            f"bound of {name}",
            "",
            [(load, of_load[name]["bound_s"]) for load, of_load in rows.items()],
        )
        for name in names
        if all(of_load[name]["bound_s"] is not None for of_load in rows.values())
    ]


def _wait_chart(load: int, by_policy: Mapping[str, Figures], colours: Mapping[str, str]) -> str:
    """The distribution of waits at one load."""
    lines: list[Line] = [
        (name, colours[name], list(enumerate(row["wait_quantiles_s"][:100])))
        for name, row in by_policy.items()
    ]
    note = "percentile of requests; less is better"
    return _figure(f"Waits at {load} % load", note, lines, "{:g} s", [0, 25, 50, 75, 99])


def _figure(title: str, note: str, lines: Sequence[Line], unit: str, ticks: Sequence[float]) -> str:
    xs = [x for _, _, points in lines for x, _ in points]
    top = _round_up(max((y for _, _, points in lines for _, y in points), default=0))
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        wide = (x - first) / (last - first) if last > first else 0.5
        return (
            round(_LEFT + wide * (_WIDTH - _LEFT - 12), 1),
            round(_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    drawn = "".join(_draw(line, place) for line in reversed(lines))  # the first one on top
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_axes(place, top, unit, ticks)}{drawn}</svg></figure>"
    )


def _round_up(largest: float) -> float:
    """A top of the axis whose quarters are short numbers."""
    if largest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return next(step * unit for step in _TOPS if step * unit >= largest)


def _axes(
    place: Callable[[float, float], tuple[float, float]],
    top: float,
    unit: str,
    ticks: Sequence[float],
) -> str:
    parts = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        _, y = place(ticks[0], top * part)
        label = unit.format(round(top * part, 6))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for tick in ticks:
        x, _ = place(tick, 0)
        parts.append(f'<text x="{x}" y="{_HEIGHT - 14}" text-anchor="middle">{tick:g}</text>')
    return "".join(parts)


def _draw(line: Line, place: Callable[[float, float], tuple[float, float]]) -> str:
    name, colour, points = line
    at = [place(x, y) for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in at)
    look = f'stroke="{colour}" stroke-width="2"' if colour else 'class="bound"'
    marks = ""
    if len(points) <= 12 and colour:
        marks = "".join(
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}">'
            f"<title>{escape(name)}: {value:.3g} at {load:g}</title></circle>"
            for (x, y), (load, value) in zip(at, points, strict=True)
        )
    title = f"<title>{escape(name)}</title>"
    return f'<polyline points="{path}" fill="none" {look}>{title}</polyline>{marks}'


def _table(load: int, by_policy: Mapping[str, Figures]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading, _, _ in COLUMNS)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{text.format(row[key])}</td>" for _, key, text in COLUMNS)
        + "</tr>"
        for name, row in by_policy.items()
    )
    return (
        f'<h2>Load {load} %</h2><div class="wide"><table>'
        f"<tr><th>policy</th>{head}</tr>{body}</table></div>"
    )
