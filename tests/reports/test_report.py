"""The structure of report.json, in the words of docs/report.md, and the numbers that are computed here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantbench.errors import CheckpointError
from quantbench.reports import write_report
from quantbench.reports.files import PlannedVariant
from quantbench.reports.gather import read_run
from quantbench.reports.report import SCHEMA, build_report, write_json, write_text
from quantbench.reports.summary import words

TOP = {
    "schema", "passed", "run", "conditions", "verdict", "gates", "variants", "findings", "ranges", "cache_ranges",
    "forecast", "missing", "files",
}  # fmt: skip
VARIANT = {
    "mode", "baseline", "quantized", "meaning", "size", "accuracy", "speed", "parity", "gates", "layers", "worst",
    "stages",
}  # fmt: skip
LAYER = {
    "name", "block", "tap", "weights", "weight_sqnr_db", "activations", "dynamic", "input_sqnr_db", "input_absmax",
    "input_p999", "over_channels", "over_layers", "levels", "typical_sqnr_db", "rule", "method", "group_size",
    "granularity", "smoothed", "stages", "worst_db",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(sample: Path) -> dict[str, Any]:
    return build_report(read_run(sample))


def test_the_keys(report: dict[str, Any]) -> None:
    assert report["schema"] == SCHEMA == 1
    assert set(report) == TOP
    for name, variant in report["variants"].items():
        assert set(variant) == VARIANT, name
        for layer in variant["layers"].values():
            assert set(layer) == LAYER
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    assert [key for key in sorted(TOP | VARIANT | LAYER) if f"`{key}`" not in documented] == []


def test_it_is_json_and_always_the_same(report: dict[str, Any], sample: Path) -> None:
    again = build_report(read_run(sample))
    assert json.dumps(report, allow_nan=False) == json.dumps(again, allow_nan=False)


def test_the_numbers_of_a_variant(report: dict[str, Any]) -> None:
    a8w8 = report["variants"]["a8w8"]
    assert a8w8["size"]["ratio_to_fp32"] == pytest.approx(220 / 538)
    assert a8w8["speed"]["decode"]["1"]["speedup"] == pytest.approx(92 / 30)
    assert a8w8["speed"]["prefill"]["speedup"] == pytest.approx(640 / 210)
    assert a8w8["accuracy"]["perplexity"][0]["increase"] == pytest.approx(59.3 / 23.68 - 1)
    assert a8w8["meaning"]["text"] == (
        "INT8 weights per output channel, INT8 inputs, static per tensor, bfloat16 KV cache, "
        "1 of 211 linears stay bfloat16"
    )
    assert report["variants"]["fp32"]["baseline"]
    assert report["variants"]["fp32"]["meaning"]["text"] == "float32 weights, float32 inputs, float32 KV cache"
    assert report["variants"]["a8w8c8"]["meaning"]["transforms"] == "after smooth (alpha 0.5)"
    assert report["variants"]["weight_only_int4"]["meaning"]["weights"] == "INT4 weights per group of 32"


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ({"format": "bfloat16"}, "bfloat16 KV cache"),
        ({"format": "int8", "granularity": "head"}, "INT8 KV cache per KV head"),
        ({"format": "fp8_e4m3_dynamic", "granularity": "head"}, "FP8 KV cache per token and KV head"),
    ],
)
def test_what_a_cache_is_called(cache: dict[str, str], told: str) -> None:
    assert words(PlannedVariant(mode="x", dtype="bfloat16", cache=cache, layers={}))["cache"] == told


def test_a_speedup_that_was_measured_round_by_round_is_kept(scratch: Path) -> None:
    path = scratch / "throughput.json"
    content = json.loads(path.read_text())
    content["variants"]["a8w8"]["decode"]["1"]["speedup"] = {"median": 2.5, "min": 2.4, "max": 2.6}
    path.write_text(json.dumps(content))
    decode = build_report(read_run(scratch))["variants"]["a8w8"]["speed"]["decode"]["1"]
    assert (decode["speedup"], decode["speedup_range"]) == (2.5, [2.4, 2.6])


def test_the_size_ratio_falls_back_to_a_16_bit_baseline(scratch: Path) -> None:
    path = scratch / "throughput.json"
    content = json.loads(path.read_text())
    del content["variants"]["fp32"]
    path.write_text(json.dumps(content))
    shutil.rmtree(scratch / "checkpoint" / "fp32")
    report = build_report(read_run(scratch))
    assert report["variants"]["a8w8"]["size"]["ratio_to_fp32"] == pytest.approx(220 / 538)


def test_the_worst_layers_and_what_to_try(report: dict[str, Any]) -> None:
    worst = report["variants"]["a8w8"]["worst"]
    assert [w["layer"] for w in worst[:3]] == [f"model.layers.{i}.mlp.down_proj" for i in (11, 28, 29)]
    assert len(worst) == 5
    assert worst[0]["severity"] == "bad"
    assert "reaches 3,537 while" in worst[0]["what"]
    assert len(worst[0]["try"]) == 3
    assert worst[4]["severity"] == "ok"
    assert [w["worst_db"] for w in worst] == sorted(w["worst_db"] for w in worst)


def test_findings_have_the_bad_ones_first(report: dict[str, Any]) -> None:
    severities = [finding["severity"] for finding in report["findings"]]
    assert severities == sorted(severities)
    assert {f["variant"] for f in report["findings"] if f["severity"] == "bad"} == {"a8w8"}


def test_ranges_before_and_after_smoothing(report: dict[str, Any]) -> None:
    before, after = report["ranges"]["float"], report["ranges"]["after"]
    assert set(before) == {"attn_in", "o_in", "mlp_in", "down_in"}
    assert set(after) == {"a8w8c8"}
    assert set(after["a8w8c8"]) == {"attn_in"}
    smoothed = after["a8w8c8"]["attn_in"]
    assert smoothed["blocks"] == before["attn_in"]["blocks"] == list(range(30))
    assert all(x < y for x, y in zip(smoothed["absmax"], before["attn_in"]["absmax"], strict=True))
    assert {part: (len(rows), len(rows[0])) for part, rows in report["cache_ranges"].items()} == {
        "k": (30, 3), "v": (30, 3),
    }  # fmt: skip


def test_nan_and_infinity_become_null(scratch: Path) -> None:
    path = scratch / "accuracy.json"
    path.write_text(path.read_text().replace('"kl": 1.1', '"kl": NaN'))
    report = build_report(read_run(scratch))
    assert report["variants"]["a8w8"]["accuracy"]["divergence"][0]["kl"] is None
    json.dumps(report, allow_nan=False)


def test_write_report_and_every_file_it_names_exists(scratch: Path) -> None:
    report = write_report(scratch)
    assert json.loads((scratch / "report.json").read_text(encoding="utf-8")) == report
    assert (scratch / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not report["passed"]
    assert not list(scratch.glob(".report*"))
    assert [file["path"] for file in report["files"] if not (scratch / file["path"]).exists()] == []


def test_write_report_of_a_damaged_run(scratch: Path) -> None:
    (scratch / "parity.json").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"parity\.json: not a JSON file .* write it again with"):
        write_report(scratch)


def test_writing_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"x": float("nan")}, path)
    assert path.read_text() == "old"
    assert path.stat().st_mode & 0o777 == 0o644
