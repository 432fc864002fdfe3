"""report.html: complete from the run's files, and harmless whatever the data says."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.run_folder import RunFolder
from trainkit.training.report import MOST_POINTS, escape, report_page, thinned, ticks, write_report

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' & \x1b[31m \x00 ]]> 日本"
VOID = {"meta", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The files of a short run over hostile data."""
    folder = RunFolder(tmp_path / "quick<b>start")
    folder.root.mkdir()
    steps: list[dict[str, Any]] = [
        {"step": step, "loss": 4.0 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0 + step}
        for step in range(1, 11)
    ]
    steps[4] |= {"loss": None, "not_finite": {"loss": "nan"}}
    before = {"step": 0, "eval_loss": 4.25, "eval_tokens": 10, "exact_match": 0.0}
    after = {"step": 10, "eval_loss": 2.125, "eval_tokens": 10, "exact_match": 0.75}
    folder.metrics.write_text(lines([before, *steps, after]))
    sample = {"place": f"eval.jsonl:1 {HOSTILE}", "prompt": HOSTILE, "reference": HOSTILE}
    folder.samples.write_text(
        lines(
            [
                sample | {"step": 0, "answer": f"before {HOSTILE}", "match": False},
                sample | {"step": 10, "answer": "after", "match": True},
            ]
        )
    )
    ledger = {
        "rows": 2,
        "trained": 1200,
        "masked": 600,
        "separators": 10,
        "overlap": 0,
        "padding": 190,
        "dropped": {HOSTILE: 3},
    }
    folder.ledger.write_text(json.dumps(ledger))
    folder.recipe.write_text(f"model: {{name: tiny}}  # {HOSTILE}\n")
    folder.environment.write_text(json.dumps({"versions": {"torch": "2.13.0"}, "devices": [HOSTILE]}))
    return folder


def test_the_page_holds_everything_that_the_run_left(run: RunFolder) -> None:
    write_report(run)
    page = Page(run.report.read_text(encoding="utf-8"))
    for text in [
        "evaluation loss4.2500 (step 0)2.1250 (step 10)",
        "exact match0.0000 (step 0)0.7500 (step 10)",
        "✗ before",
        "✓ after",
        "trained 60.0%",
        "model: {name: tiny}",
        "versions.torch2.13.0",
    ]:
        assert text in page.text, text
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels[0] == "Loss over steps: training from 4 to 0.4; evaluation from 4.25 to 2.125"
    assert [str(label).split(" over")[0] for label in labels[1:]] == [
        "Exact match",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens per second",
    ]


def test_text_from_the_data_stays_text(run: RunFolder) -> None:
    page = Page(report_page(run))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "b", "iframe", "link"})
    assert not [
        name for _, attributes in page.tags for name in attributes if name.startswith("on") or name in {"src", "href"}
    ]
    assert page.text.count("<script>alert(1)</script>") == 7
    assert "\x1b" not in page.text
    assert "\x00" not in page.text
    assert (
        next(attributes for tag, attributes in page.tags if "http-equiv" in attributes)["content"]
        == "default-src 'none'; style-src 'unsafe-inline'"
    )


def test_a_value_that_is_not_finite_breaks_the_curve(run: RunFolder) -> None:
    curves = [attributes["points"] for tag, attributes in Page(report_page(run)).tags if tag == "polyline"]
    assert [len(str(points).split()) for points in curves[:3]] == [4, 5, 2]


def test_points_lie_inside_the_chart(run: RunFolder) -> None:
    for tag, attributes in Page(report_page(run)).tags:
        if tag == "polyline":
            for point in str(attributes["points"]).split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 720
                assert 0 <= y <= 240


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    page = Page(report_page(RunFolder(tmp_path)))
    assert [tag for tag, _ in page.tags if tag in {"h1", "h2"}] == ["h1"]


def test_a_run_of_one_step_has_a_point(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines([{"step": 1, "loss": 2.0}]))
    assert "circle" in {tag for tag, _ in Page(report_page(RunFolder(tmp_path))).tags}


def test_a_lone_surrogate_can_be_written(run: RunFolder) -> None:
    run.recipe.write_text("x")
    run.samples.write_text(
        '{"step": 0, "place": "p", "prompt": "\\ud800", "reference": "", "answer": "", "match": null}\n'
    )
    write_report(run)
    assert "\\ud800" in run.report.read_text(encoding="utf-8")


@given(st.text())
def test_an_escaped_text_reads_back_without_a_tag(text: str) -> None:
    page = Page(f"<p>{escape(text)}</p>")
    assert [tag for tag, _ in page.tags] == ["p"]


@given(low=st.floats(-1e9, 1e9), width=st.floats(1e-6, 1e9))
def test_ticks_enclose_the_values(low: float, width: float) -> None:
    high = low + width
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 8


def test_a_long_curve_keeps_its_spikes() -> None:
    points: list[tuple[float, float | None]] = [(step, 1.0) for step in range(100_000)]
    points[70_001] = (70_001, 99.0)
    points[80_001] = (80_001, None)
    kept = thinned(points)
    assert (70_001, 99.0) in kept
    assert (80_001, None) in kept
    assert len(kept) <= MOST_POINTS + 2
