"""report.html: one run on one page that needs nothing but itself.

Everything on it is read from the files of the run folder, so that it can be written again at any time. There is no
script on the page and nothing is fetched; curves are SVG drawn here. Text that came from the user's data is escaped.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainkit.run_folder import write_atomically
from trainkit.training.metrics import read_metrics, read_samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from trainkit.run_folder import RunFolder

WIDTH, HEIGHT = 720, 240  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 32  # margins that hold the axes
MOST_INCIDENTS = 50  # shown of the steps that stand out
MOST_POINTS = 600  # a longer curve shows the lowest and highest value of each stretch, so that no spike is lost

# Parts of the rows in the order of ledger.json's second sum, and the colour of each.
ROW_PARTS = {"trained": "a", "masked": "b", "separators": "c", "overlap": "d", "padding": "e"}

STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --faint: #667085; --line: #d7dbe3; --page: #ffffff; --box: #f5f6f9;
  --a: #2563c9; --b: #d9730d; --c: #23845c; --d: #8a4fc7; --e: #b6bcc8; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9f0; --faint: #98a2b3; --line: #343b4a; --page: #12151c;
  --box: #1b202b; --a: #6ea8fe; --b: #f0a35e; --c: #5cc795; --d: #c39af2; --e: #545d6e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; } th { color: var(--faint); font-weight: 500; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre, td.text { white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; }
pre { background: var(--box); padding: .8rem; border-radius: .4rem; }
figure { margin: 1rem 0; } figcaption { color: var(--faint); } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 11px; } .axis { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.6; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin: 0 .35em 0 .9em; }
.bar { display: flex; height: 1.4rem; border-radius: .3rem; overflow: hidden; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Curve:
    """A named series over steps; a point without a value breaks the line."""

    name: str
    colour: str
    points: Sequence[tuple[float, float | None]]


def write_report(folder: RunFolder) -> None:
    """Write report.html from the run's own files; a file that is not there leaves its section out.

    Raises CheckpointError when a file of the run is damaged, OSError when the page cannot be written.
    """
    write_atomically(folder.report, report_page(folder).encode("utf-8", "backslashreplace"))


def report_page(folder: RunFolder) -> str:
    """The page as text."""
    metrics = read_metrics(folder.metrics) if folder.metrics.exists() else []
    samples = read_samples(folder.samples) if folder.samples.exists() else []
    title = f"trainkit run: {folder.root.name}"
    sections = [
        _summary(metrics),
        _charts(metrics),
        _incidents(metrics),
        _samples(samples),
        _ledger(_json_or_none(folder.ledger)),
        _recipe(folder.recipe),
        _environment(_json_or_none(folder.environment)),
    ]
    body = "\n".join(filter(None, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        # Should an escape ever be forgotten, the browser still runs and fetches nothing.
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">\n"""
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Text for HTML: no markup, and control characters as the signs that show them.

    >>> escape('<b> & "x"')
    '&lt;b&gt; &amp; &quot;x&quot;'
    """
    shown = str(text).translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"})
    return html.escape(shown)


def _json_or_none(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else None


def _column(records: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """(step, value) of every record that has this key; None where the value was not finite."""
    return [(float(record["step"]), record[name]) for record in records if name in record and "step" in record]


def _summary(metrics: list[dict[str, Any]]) -> str:
    """First and last value of what matters."""
    names = {"loss": "training loss", "eval_loss": "evaluation loss"} | {
        name: _label(name) for name in _scores(metrics)
    }
    rows = []
    for name, label in names.items():
        values = [(step, value) for step, value in _column(metrics, name) if value is not None]
        if values:
            cells = (
                f'<td class="number">{value:.4f} (step {step:,.0f})</td>' for step, value in (values[0], values[-1])
            )
            rows.append(f"<tr><td>{escape(label)}</td>{''.join(cells)}</tr>")
    if not rows:
        return ""
    return f"<h2>Result</h2>\n<table><tr><th></th><th>first</th><th>last</th></tr>{''.join(rows)}</table>"


def _scores(metrics: list[dict[str, Any]]) -> list[str]:
    """Names of the numbers on evaluation lines other than the loss and its token count."""
    lines = (record for record in metrics if "eval_loss" in record)
    names = dict.fromkeys(name for record in lines for name, value in record.items() if _is_number(value))
    return [
        name for name in names if name not in {"step", "epoch", "eval_loss", "eval_tokens"} and "seconds" not in name
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(name: str) -> str:
    return name.replace("_", " ")


def _charts(metrics: list[dict[str, Any]]) -> str:
    training = [record for record in metrics if "eval_loss" not in record]
    charts = [
        (
            "Loss",
            [Curve("training", "a", _column(metrics, "loss")), Curve("evaluation", "b", _column(metrics, "eval_loss"))],
        ),
        *((_label(name).capitalize(), [Curve(_label(name), "c", _column(metrics, name))]) for name in _scores(metrics)),
        ("Learning rate", [Curve("learning rate", "a", _column(training, "learning_rate"))]),
        ("Gradient norm before clipping", [Curve("gradient norm", "d", _column(training, "grad_norm"))]),
        ("Tokens per second", [Curve("tokens per second", "c", _column(training, "tokens_per_second"))]),
    ]
    drawn = "\n".join(filter(None, (chart(title, curves) for title, curves in charts)))
    return f"<h2>Curves</h2>\n{drawn}" if drawn else ""


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure with the curves that have a value to show; an empty string when none has."""
    curves = [curve for curve in curves if any(value is not None for _, value in curve.points)]
    if not curves:
        return ""
    steps = [step for curve in curves for step, _ in curve.points]
    values = [value for curve in curves for _, value in curve.points if value is not None]
    across, upwards = ticks(min(steps), max(steps)), ticks(min(values), max(values))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - upwards[0]) / (upwards[-1] - upwards[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = []
    for value in upwards:
        x, y = place(across[0], value)
        parts.append(f'<line class="axis" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>')
    for step in across:
        x, y = place(step, upwards[0])
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{step:,.4g}</text>')
    for curve in curves:
        runs = unbroken(thinned(curve.points))
        parts += [_line([place(step, value) for step, value in run], curve.colour) for run in runs]
    keys = "".join(_key(curve.colour, curve.name) for curve in curves) if len(curves) > 1 else ""
    label = escape(f"{title} over steps: " + "; ".join(_in_words(curve) for curve in curves))
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong>{keys}</figcaption>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _line(places: Sequence[tuple[float, float]], colour: str) -> str:
    if len(places) == 1:
        return f'<circle cx="{places[0][0]}" cy="{places[0][1]}" r="3" style="fill: var(--{colour})"/>'
    path = " ".join(f"{x},{y}" for x, y in places)
    return f'<polyline class="curve" style="stroke: var(--{colour})" points="{path}"/>'


def _key(colour: str, name: str) -> str:
    """A coloured square and what it stands for."""
    return f'<span class="key" style="background: var(--{colour})"></span>{escape(name)}'


def _in_words(curve: Curve) -> str:
    values = [value for _, value in curve.points if value is not None]
    return f"{curve.name} from {values[0]:.4g} to {values[-1]:.4g}"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, from at most ``low`` to at least ``high``.

    >>> ticks(0, 97)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    >>> ticks(3.0, 3.0)
    [2.0, 3.0, 4.0]
    """
    if low == high:
        around = abs(low) / 3 or 1.0
        return [low - around, low, low + around]
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    space = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough * 0.999)
    first, last = math.floor(low / space + 1e-9), math.ceil(high / space - 1e-9)
    return [round(index * space, 12) if space > 1e-9 else index * space for index in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about ``MOST_POINTS`` points: of each stretch the lowest, the highest, and any that has no value."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [(value, index) for index, (_, value) in enumerate(part) if value is not None]
        indices = {index for index, (_, value) in enumerate(part) if value is None}
        if finite:
            indices |= {min(finite)[1], max(finite)[1]}
        kept += [part[index] for index in sorted(indices)]
    return kept


def unbroken(points: Iterable[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """The runs of points that have a value.

    >>> list(unbroken([(1, 2.0), (2, None), (3, 4.0), (4, 5.0)]))
    [[(1, 2.0)], [(3, 4.0), (4, 5.0)]]
    """
    run: list[tuple[float, float]] = []
    for step, value in points:
        if value is not None:
            run.append((step, value))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _incidents(metrics: list[dict[str, Any]]) -> str:
    """Steps whose update was left out, and steps whose loss jumped, with their rows; the first of very many."""
    rows = []
    for record in metrics:
        if "fault" in record:
            what = f"no update: {record['fault']}"
        elif "spike" in record:
            what = "no update: " if record.get("skipped") else ""
            what += f"loss {record['loss']:.4g}, {record['spike']:.1f} standard deviations above the last ones"
        else:
            continue
        numbers = ", ".join(map(str, record["rows"]))
        cells = (what, record["documents"], numbers)
        shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><td class="number">{record["step"]:,}</td>{shown}</tr>')
    if not rows:
        return ""
    more = f"<p>and {len(rows) - MOST_INCIDENTS:,} more in metrics.jsonl</p>" if len(rows) > MOST_INCIDENTS else ""
    head = "".join(f"<th>{name}</th>" for name in ("step", "what happened", "documents", "rows"))
    return f"<h2>Steps that stand out</h2>\n<table><tr>{head}</tr>{''.join(rows[:MOST_INCIDENTS])}</table>{more}"


def _samples(samples: list[dict[str, Any]]) -> str:
    """Each held-out prompt with the answer of the first evaluation beside that of the last."""
    if not samples:
        return ""
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in samples:
        answers.setdefault((sample["place"], sample["prompt"]), []).append(sample)
    first_step, last_step = samples[0]["step"], samples[-1]["step"]
    rows = []
    for (place, prompt), given in answers.items():
        cells = [f"{escape(prompt)}<br><small>{escape(place)}</small>", escape(given[0]["reference"])]
        cells += [_answer(given[0]), _answer(given[-1])]
        rows.append("<tr>" + "".join(f'<td class="text">{cell}</td>' for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ["prompt", "reference", f"step {first_step}", f"step {last_step}"])
    return f"<h2>Answers before and after</h2>\n<table><tr>{head}</tr>{''.join(rows)}</table>"


def _answer(sample: Mapping[str, Any]) -> str:
    sign = {True: "✓ ", False: "✗ "}.get(sample["match"], "")
    return sign + escape(sample["answer"])


def _ledger(ledger: dict[str, Any] | None) -> str:
    if ledger is None:
        return ""
    parts = {name: ledger[name] for name in ROW_PARTS if isinstance(ledger.get(name), int)}
    bar = ""
    if sum(parts.values()):
        pieces = "".join(
            f'<span style="flex: {count}; background: var(--{ROW_PARTS[name]})" title="{name}: {count:,}"></span>'
            for name, count in parts.items()
            if count
        )
        slots = sum(parts.values())
        keys = "".join(_key(ROW_PARTS[name], f"{name} {count / slots:.1%}") for name, count in parts.items())
        bar = f'<div class="bar">{pieces}</div><p>{keys}</p>\n'
    return f"<h2>Token ledger</h2>\n{bar}{_table_of(ledger)}"


def _recipe(path: Path) -> str:
    if not path.exists():
        return ""
    return f"<h2>Recipe</h2>\n<pre>{escape(path.read_text(encoding='utf-8', errors='backslashreplace'))}</pre>"


def _environment(environment: dict[str, Any] | None) -> str:
    if environment is None:
        return ""
    return f"<h2>Environment</h2>\n<details><summary>versions and devices</summary>{_table_of(environment)}</details>"


def _table_of(value: Mapping[str, Any]) -> str:
    """Names and values of a nested mapping, a row each."""
    rows = []
    for name, entry in _leaves(value):
        cell = f'<td class="number">{entry:,}</td>' if _is_number(entry) else f"<td>{escape(entry)}</td>"
        rows.append(f"<tr><td>{escape(_label(name))}</td>{cell}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what a nested JSON value holds; empty ones are left out.

    >>> list(_leaves({"a": {"b": 1}, "c": [2], "d": {}}))
    [('a.b', 1), ('c.1', 2)]
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, entry in enumerate(value, 1):
            yield from _leaves(entry, f"{name}.{number}")
    else:
        yield name, value
