"""Stages of linears and of a variant, and where the report shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantbench.errors import CheckpointError
from quantbench.reports.files import Stage
from quantbench.reports.gather import read_run
from quantbench.reports.html import render_html
from quantbench.reports.layers import layer_facts
from quantbench.reports.report import build_report
from quantbench.reports.stages import StageFacts, name_of, stage_facts, variant_stages
from quantbench.reports.terminal import render_text

SMOOTHED = "a8w8c8"  # of the sample: dynamic, its attn_in smoothed
DOWN, Q = "model.layers.11.mlp.down_proj", "model.layers.3.self_attn.q_proj"


def noise(after: str, output: float, **changes: Any) -> dict[str, Any]:
    same = {"weight": 1e-4, "input": 1e-3, "steps": 5.0, "weight_beyond": 0.0, "input_beyond": None}
    return {"after": after, "output": output} | same | changes


@pytest.fixture
def diagnosed(scratch: Path) -> Path:
    """The sample with a diagnosis of two linears of a smoothed variant and of one without transforms."""
    layers = {
        Q: [noise("", 0.1), noise("smooth", 1e-3, steps=20.0)],
        DOWN: [noise("", 0.5), noise("smooth", 0.05, weight_beyond=0.25)],
    }
    for variant, found in ((SMOOTHED, layers), ("weight_only_int8", {Q: [noise("", 1e-4, input=None, steps=None)]})):
        (scratch / "scales" / variant / "diagnosis.json").write_text(json.dumps({"layers": found}))
    return scratch


def test_stages_of_a_linear_in_decibels() -> None:
    (facts,) = stage_facts([Stage.model_validate(noise("smooth", 1e-3))])
    assert facts == StageFacts("smooth", 40.0, 30.0, 30.0, 5.0, 0.0, None)
    assert [name_of(w) for w in ("", "smooth", "stored")] == ["as the model came", "after smooth", "as stored"]


def test_a_variant_is_told_by_medians_and_by_its_worst_output(diagnosed: Path) -> None:
    record = build_report(read_run(diagnosed))["variants"][SMOOTHED]
    before, after = record["stages"]
    assert (before["after"], after["after"]) == ("", "smooth")
    assert before["output_sqnr_db"] == pytest.approx((10 + 3.0103) / 2, abs=1e-3)
    assert after["output_sqnr_db"] == pytest.approx((30 + 13.0103) / 2, abs=1e-3)
    assert (after["worst"], after["beyond"]) == (DOWN, 0.125)
    assert after["worst_output_sqnr_db"] == pytest.approx(13.0103, abs=1e-3)
    assert record["layers"][Q]["stages"][1]["steps"] == 20.0
    worst = {w["layer"]: w for w in record["worst"]}
    assert all(w["output_sqnr_db"] is None for name, w in worst.items() if name not in (DOWN, Q))


def test_a_linear_without_the_last_stage_counts_as_it_was() -> None:
    one, two = (stage_facts([Stage.model_validate(noise("", x))]) for x in (0.1, 0.01))
    stored = (*two, *stage_facts([Stage.model_validate(noise("stored", 1e-3))]))
    found = variant_stages({"rtn": one, "gptq": stored})
    assert [s["after"] for s in found] == ["", "stored"]
    assert found[1]["output_sqnr_db"] == pytest.approx(20)
    assert variant_stages({}) == []


def test_an_input_behind_a_transform_is_judged_by_its_steps(diagnosed: Path) -> None:
    """A static variant whose tap was changed: no histogram is known, the diagnosis stands in."""
    scales = diagnosed / "scales" / "a8w8" / "diagnosis.json"
    scales.write_text(json.dumps({"layers": {Q: [noise("", 0.1), noise("smooth", 1e-3, steps=1.0)]}}))
    run = read_run(diagnosed)
    plain = next(layer for layer in layer_facts(run, "a8w8") if layer.name == Q)
    assert plain.levels is not None
    assert plain.levels > 12  # by its histogram: this sample's table holds no transform
    table = run.scales["a8w8"]
    smooth = next(e for e in run.scales[SMOOTHED].values() if e.name == "model.layers.3.input_layernorm.smooth")
    table[smooth.name] = smooth
    changed = next(layer for layer in layer_facts(run, "a8w8") if layer.name == Q)
    assert changed.levels == pytest.approx(3.29)
    assert changed.smoothed
    assert not plain.smoothed
    assert changed.last_stage == "after smooth"


def test_the_terminal_and_the_page_show_what_transforms_did(diagnosed: Path) -> None:
    report = build_report(read_run(diagnosed))
    text = render_text(report, width=110)
    assert "Signal to quantization noise, median of the linears" in text
    row = next(line for line in text.splitlines() if f"{SMOOTHED}  after smooth" in line)
    assert row.split()[3:5] == ["21.5", "dB"]
    assert "weight_only_int8  as the model came" not in text  # nothing was done to it
    page = render_html(report)
    assert "What each transform did" in page
    assert "after smooth" in page


def test_reports_of_runs_without_a_diagnosis_have_no_stages(sample: Path) -> None:
    report = build_report(read_run(sample))
    assert all(v["stages"] == [] for v in report["variants"].values())
    assert "median of the linears" not in render_text(report)


def test_a_damaged_diagnosis_is_an_error_that_names_the_field(diagnosed: Path) -> None:
    path = diagnosed / "scales" / SMOOTHED / "diagnosis.json"
    path.write_text(json.dumps({"layers": {Q: [{"after": ""}]}}))
    with pytest.raises(CheckpointError, match=rf"diagnosis\.json: layers\.{Q}\.0\.weight: field required; .*choose"):
        read_run(diagnosed)
