from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantbench.reports import print_report
from quantbench.reports.gather import read_run
from quantbench.reports.report import build_report
from quantbench.reports.terminal import render_text


@pytest.fixture(scope="module")
def report(sample: Path) -> dict[str, Any]:
    return build_report(read_run(sample))


def test_plain_text_fits_80_columns_and_is_ascii(report: dict[str, Any]) -> None:
    text = render_text(report)
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_the_disaster_is_on_the_first_screen(report: dict[str, Any]) -> None:
    first = render_text(report).splitlines()[:24]
    said = " ".join(" ".join(first).split())
    assert said.startswith("BAD 2 of 12 gates fail: a8w8: perplexity_increase")
    assert "Do not deploy a8w8: perplexity on demo:wikipedia-heldout is 59.30, +150%" in said
    assert "input of model.layers.11.mlp.down_proj reaches 3,537 while 99.9% of its values are below" in said
    assert "weight_only_int8 is the one to take" in said
    assert sum(line.split()[:1] == [name] for line in first for name in report["variants"]) == 8


def test_what_each_finding_says_is_printed_with_what_to_try(report: dict[str, Any]) -> None:
    said = " ".join(render_text(report).split())
    for finding in report["findings"]:
        assert finding["what"] in said
    assert 'rules: [{match: "model.layers.11.mlp.down_proj", variants: [a8w8], mode: float}]' in said
    assert "served against simulated: 0 of 6,000,000 codes differ, top-1 at least 99.950%" in said


def test_long_lists_are_cut(report: dict[str, Any]) -> None:
    finding = next(f for f in report["findings"] if f["rule"] == "outlier_input")
    many = report | {"findings": [finding | {"what": f"finding {i}"} for i in range(9)]}
    text = render_text(many)
    assert "finding 2" in text
    assert "finding 3" not in text
    assert "a8w8: and 6 more like these" in text


def test_narrow_tables_lose_columns_from_the_right(report: dict[str, Any]) -> None:
    wide, narrow = render_text(report, 200), render_text(report, 50)
    assert "KL" in wide
    assert "top-1" not in narrow.split("Decode")[0].split("variant")[1]
    assert "increase" in narrow
    assert max(map(len, narrow.splitlines())) <= 50


def test_a_terminal_gets_colours(report: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_report(report, Console(file=stream, force_terminal=True, width=100, color_system="truecolor"))
    assert "\x1b[" in stream.getvalue()


def test_markup_in_names_is_printed_as_it_is(report: dict[str, Any]) -> None:
    odd = report | {"run": report["run"] | {"model": "[red]x[/red]"}}
    assert "[red]x[/red]" in render_text(odd)


@pytest.mark.parametrize("name", ["accuracy.json", "throughput.json", "parity.json", "plan.json"])
def test_without_a_stage(scratch: Path, name: str) -> None:
    (scratch / name).unlink()
    text = render_text(build_report(read_run(scratch)))
    assert f"not in this run: {name}" in text
    assert "None" not in text
    assert "a8w8_fp8" in text


def test_a_slow_variant_says_why(report: dict[str, Any]) -> None:
    decode = report["variants"]["a8w8_fp8"]["speed"]["decode"]
    slow = decode | {"1": decode["1"] | {"speedup": 1.05, "why": "decoding e4m3 costs more than it saves"}}
    record = report["variants"]["a8w8_fp8"] | {"speed": report["variants"]["a8w8_fp8"]["speed"] | {"decode": slow}}
    text = render_text(report | {"variants": report["variants"] | {"a8w8_fp8": record}})
    assert "a8w8_fp8 at 1.05x: decoding e4m3 costs more than it saves" in " ".join(text.split())
