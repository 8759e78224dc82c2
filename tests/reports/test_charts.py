from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quantbench.reports.charts import CHARTS, charts
from quantbench.reports.gather import read_run
from quantbench.reports.report import build_report


@pytest.fixture(scope="module")
def report(sample: Path) -> dict[str, Any]:
    return build_report(read_run(sample))


@pytest.fixture(scope="module")
def drawn(report: dict[str, Any]) -> dict[str, str]:
    return charts(report, CHARTS)


def words(text: str) -> set[str]:
    return set(re.findall(r">([^<>]+)</text>", text))


def test_every_figure_of_a_complete_run(drawn: dict[str, str]) -> None:
    assert list(drawn) == list(CHARTS)


def test_accuracy_against_speed_names_every_variant_and_the_gate(drawn: dict[str, str], report: dict[str, Any]) -> None:
    assert set(report["variants"]) < words(drawn["accuracy_speed"])
    assert "gate 5.00%" in words(drawn["accuracy_speed"])


def test_outliers_are_named_in_the_ranges(drawn: dict[str, str]) -> None:
    assert {"3,537", "2,389", "514"} < words(drawn["activation_ranges"])
    assert "largest, a8w8c8" in words(drawn["activation_ranges"])


def test_throughput_shows_the_share_of_the_ceiling(drawn: dict[str, str]) -> None:
    assert {"Prefill", "Decode, batch 1", "Decode, batch 8", "92.0 (53.5%)"} < words(drawn["throughput"])


def test_memory_names_the_kinds(drawn: dict[str, str]) -> None:
    assert {"attention", "feed-forward", "embedding", "KV cache", "process at its peak"} < words(drawn["memory"])


def test_a_chart_without_numbers_is_left_out(report: dict[str, Any]) -> None:
    nothing = {
        name: record
        | {"parity": None, "layers": {}, "accuracy": record["accuracy"] | {"perplexity": []}}
        | {"speed": {"load_s": None, "prefill": None, "decode": {}}}
        | {"size": dict.fromkeys(record["size"]) | {"by_kind": {}}}
        for name, record in report["variants"].items()
    }
    empty = report | {"variants": nothing, "ranges": {"float": {}, "after": {}}, "cache_ranges": {}}
    assert charts(empty, CHARTS) == {}


def test_zeros_and_one_block_are_drawn(report: dict[str, Any]) -> None:
    silent = {"blocks": [0], "absmax": [0.0], "p999": [None]}
    one = report | {"ranges": {"float": {"o_in": silent}, "after": {}}, "cache_ranges": {"k": [[0.0]]}}
    assert set(charts(one, ("activation_ranges", "cache_heads"))) == {"activation_ranges", "cache_heads"}


def test_small_increases_get_a_linear_axis(report: dict[str, Any]) -> None:
    kept = {name: report["variants"][name] for name in ("fp32", "weight_only_int8", "a8w8_fp8")}
    text = charts(report | {"variants": kept}, ("accuracy_speed",))["accuracy_speed"]
    assert "+200%" not in words(text)
    assert "a8w8_fp8" in words(text)
