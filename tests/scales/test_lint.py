from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantbench.infer.models import LINEARS
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.lint import FUSED, Finding, errors, lint_table
from quantbench.scales.statistics import observe
from quantbench.scales.table import DIVISORS, Entry, ScaleTable
from quantbench.vocabulary import CachePlan, LayerPlan, VariantPlan, parse_mode

F32 = np.float32
B = "model.layers.0"


def make(name: str, kind: str, granularity: str, absmax: object, format: str = "int8") -> Entry:
    values = np.array(absmax, F32)
    scale = np.where(values > 0, values / F32(DIVISORS.get(format, 1)), 1).astype(F32)
    return Entry(f"{B}.{name}", kind, format, granularity, scale, None, values, None, "absmax", "", None)


def of(*entries: Entry) -> ScaleTable:
    table = ScaleTable()
    for entry in entries:
        table.add(entry)
    return table


def said(findings: list[Finding]) -> list[str]:
    return [str(f).replace(B + ".", "") for f in findings]


GOOD = make("self_attn.o_proj.input", "input", "tensor", [5])


def test_the_groups_are_those_of_the_models() -> None:
    by_tap: dict[str, tuple[str, ...]] = {}
    for line in LINEARS:
        by_tap[line.tap] = (*by_tap.get(line.tap, ()), line.name)
    assert by_tap == FUSED


def test_a_good_table_has_no_findings() -> None:
    shared = [make(f"self_attn.{p}_proj.input", "input", "tensor", [5]) for p in "qkv"]
    dynamic = make("mlp.up_proj.input", "input", "token", [])
    assert lint_table(of(GOOD, dynamic, *shared)) == []


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-0.5, "negative"), (0.0, "zero")])
def test_bad_scales_are_errors(value: float, word: str) -> None:
    weight = make("self_attn.o_proj.weight", "weight", "channel", [[1], [2], [3]])
    scale = weight.scale.copy()
    scale[1] = value
    found = errors(lint_table(of(replace(weight, scale=scale))))
    assert said(found)[0] == f"error: self_attn.o_proj.weight: scale is {word} at 1 of 3 places, first (1, 0)"


def test_a_nan_range_is_an_error() -> None:
    found = lint_table(of(replace(GOOD, absmax=np.array([np.nan], F32))))
    assert said(found)[0] == "error: self_attn.o_proj.input: absmax is NaN at 1 of 1 places, first (0,)"


@pytest.mark.parametrize("format", list(FORMATS))
def test_one_changed_scale_is_found(format: str) -> None:
    weight = make("self_attn.o_proj.weight", "weight", "channel", [[1], [2]], format)
    assert lint_table(of(weight)) == []
    scale = weight.scale * np.array([[1], [1.01]], F32)
    (found,) = lint_table(of(replace(weight, scale=scale)))
    assert found.severity == "error"
    assert f"at (1, 0) is not absmax 2 / {DIVISORS[format]:g} (1 such)" in found.message


def test_scale_and_range_of_different_shapes() -> None:
    found = lint_table(of(replace(GOOD, absmax=np.ones(2, F32))))
    assert said(found) == ["error: self_attn.o_proj.input: scale (1,) and absmax (2,) differ in shape"]


def test_untied_inputs_and_fp8_weights_are_errors() -> None:
    inputs = [make(f"self_attn.{p}_proj.input", "input", "tensor", [v]) for p, v in (("q", 5), ("k", 5), ("v", 4))]
    weights = [make(f"mlp.{p}_proj.weight", "weight", "tensor", [v], "fp8_e4m3") for p, v in (("gate", 1), ("up", 2))]
    found = lint_table(of(*inputs, *weights))
    assert [f.message.split(",")[0] for f in found] == [
        "input scales of q_proj",
        "per-tensor FP8 weight scales of gate_proj",
    ]
    assert all(f.severity == "error" and f.name == B and "tie them" in f.message for f in found)


def test_half_static_half_dynamic_is_untied() -> None:
    found = lint_table(
        of(make("mlp.gate_proj.input", "input", "tensor", [5]), make("mlp.up_proj.input", "input", "token", []))
    )
    assert len(found) == 1


def test_int8_weights_per_tensor_need_no_tie() -> None:
    assert (
        lint_table(of(*(make(f"mlp.{p}_proj.weight", "weight", "tensor", [v]) for p, v in (("gate", 1), ("up", 2)))))
        == []
    )


def test_dead_channels_are_warnings() -> None:
    found = lint_table(of(make("self_attn.o_proj.weight", "weight", "channel", [[1], [0], [0]]),
                          make("input_layernorm.smooth", "transform", "channel", [0, 1], "float32"),
                          make("self_attn.k_cache", "cache", "head", [0, 1]),
                          make("self_attn.o_proj.input", "input", "tensor", [0])))  # fmt: skip
    assert said(found) == [
        "warning: self_attn.o_proj.weight: dead: 2 of 3 units are all zero",
        "warning: input_layernorm.smooth: dead: 1 of 2 channels saw only zeros",
        "warning: self_attn.k_cache: dead: 1 of 2 heads saw only zeros",
        "warning: self_attn.o_proj.input: dead: 1 of 1 only zeros were seen",
    ]


def test_what_the_plan_needs_must_be_there() -> None:
    layers = {
        n: LayerPlan(n, "int8", "channel", activations="int8") for n in (f"{B}.self_attn.o_proj", f"{B}.mlp.up_proj")
    }
    layers["lm_head"] = LayerPlan("lm_head", "bfloat16")
    variant = VariantPlan("a8w8c8", parse_mode("a8w8c8"), "bfloat16", CachePlan("int8"), layers)
    found = lint_table(of(GOOD, make("self_attn.k_cache", "cache", "head", [1])), variant)
    assert {f.name.removeprefix(B + ".") for f in found} == {
        "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.up_proj.input", "self_attn.v_cache",
    }  # fmt: skip
    assert all(f.message == "the plan needs this entry and the table has none" for f in found)


def test_saturation_is_counted_from_the_histogram() -> None:
    x = np.random.default_rng(0).standard_normal((100, 100)).astype(F32)
    (found,) = lint_table(
        of(make("self_attn.o_proj.input", "input", "tensor", [2])), statistics={f"{B}.o_in": observe(x)}
    )
    assert found.severity == "warning"
    share = float(found.message.split("%")[0])
    assert share == pytest.approx(100 * (np.abs(x) > 2).mean(), abs=0.2)


def test_an_outlier_that_decides_the_scale_is_told() -> None:
    x = np.random.default_rng(0).standard_normal((100, 100)).astype(F32)
    x[0, 0] = 3537
    statistics = {f"{B}.down_in": observe(x), f"{B}.k": observe(x, 2)}
    down = make("mlp.down_proj.input", "input", "tensor", [3537])
    cache = make("self_attn.k_cache", "cache", "head", observe(x, 2).absmax)
    found = lint_table(of(down, cache), statistics=statistics)
    assert [f.name for f in found] == [f"{B}.mlp.down_proj.input"]
    assert "round to 0: few outliers (up to 3537) decide the scale" in found[0].message
    assert lint_table(of(down)) == []


def test_errors_come_first() -> None:
    found = lint_table(
        of(make("self_attn.o_proj.weight", "weight", "channel", [[0]]), replace(GOOD, scale=np.zeros(1, F32)))
    )
    assert [f.severity for f in found] == ["error", "error", "warning"]
