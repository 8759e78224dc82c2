from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest

from quantbench.reports.gather import read_run
from quantbench.reports.html import environment, page, render_html
from quantbench.reports.report import build_report

VOID = {"meta", "br", "link", "img", "hr", "input", "path", "use", "image", "rect", "stop"}


class Page(HTMLParser):
    """Checks nesting, collects ids, links and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def report(sample: Path) -> dict[str, Any]:
    return build_report(read_run(sample))


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return render_html(report)


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_it_is_well_nested_and_ids_are_unique(parsed: Page) -> None:
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))


def test_it_needs_no_other_file(html: str, parsed: Page) -> None:
    assert [link for link in parsed.links if not link.startswith(("#", "data:image/"))] == []
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\((?!#)", html)


def test_the_sections(parsed: Page) -> None:
    sections = ["summary", "key-figures", "findings", "layers", "gates", "accuracy", "speed", "memory", "ranges",
                "parity", "conditions"]  # fmt: skip
    assert [name for name in parsed.ids if name in sections] == sections
    figures = ["accuracy_speed", "activation_ranges", "sqnr", "throughput", "memory", "cache_heads"]
    assert [
        name.removeprefix("figure-") for name in parsed.ids if name.startswith("figure-") and name[7:] in figures
    ] == figures


def test_the_first_screen_tells_the_disaster(parsed: Page) -> None:
    first = parsed.text.partition("What the variants mean")[0]
    assert "2 of 12 gates fail" in first
    assert "Do not deploy a8w8" in first
    assert "model.layers.11.mlp.down_proj reaches 3,537 while 99.9% of its values are below" in first
    assert "weight_only_int8 take this" in first


def test_no_none_and_no_nan_reach_the_reader(parsed: Page) -> None:
    assert not re.search(r"\bNone\b|\bnan\b|\bUndefined\b", parsed.text)


def test_the_same_report_gives_the_same_bytes(report: dict[str, Any]) -> None:
    again = json.loads(json.dumps(report))
    assert page("report.html.j2", again, ["memory"]) == page("report.html.j2", report, ["memory"])


def test_names_are_escaped(report: dict[str, Any]) -> None:
    evil = '<script>alert("x")</script>'
    text = json.dumps(report).replace("demo:smollm2", json.dumps(evil)[1:-1])
    text = text.replace("model.layers.11.mlp.down_proj", "<b>x</b>")
    html = page("report.html.j2", json.loads(text), ())
    assert "<script>alert" not in html
    assert "<b>x</b>" not in html
    assert "&lt;script&gt;alert" in html
    assert Page(html).open == []


def test_variant_names_in_figures_are_escaped(report: dict[str, Any]) -> None:
    renamed = {name.replace("a8w8_fp8", "<i>x</i>"): record for name, record in report["variants"].items()}
    html = page("report.html.j2", report | {"variants": renamed}, ["accuracy_speed", "sqnr"])
    assert "<i>x</i>" not in html


@pytest.mark.parametrize("name", ["accuracy.json", "throughput.json", "parity.json", "plan.json", "gates.json"])
def test_without_a_stage(scratch: Path, name: str) -> None:
    (scratch / name).unlink()
    seen = Page(page("report.html.j2", build_report(read_run(scratch)), ()))
    assert seen.open == []
    assert ("Not in this run: " + name in seen.text) == (name != "gates.json")
    assert not re.search(r"\bNone\b|\bnan\b", seen.text)


def test_only_a_plan(scratch: Path) -> None:
    import shutil

    for path in list(scratch.iterdir()):
        if path.name != "plan.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    seen = Page(render_html(build_report(read_run(scratch))))
    assert "no gates set" in seen.text
    assert "figure-accuracy_speed" not in seen.ids


def test_a_misspelt_name_in_a_template_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        environment().from_string("{{ nothing }}").render()
