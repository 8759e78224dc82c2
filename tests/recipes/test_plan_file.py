"""plan.json keeps the whole plan, and people see it in few rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from quantbench.errors import RecipeError
from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.load import load_recipe
from quantbench.recipes.plan import Plan, make_plan
from quantbench.recipes.plan_file import load_plan, plan_json, plan_rows, print_plan

TEXT = """\
model: m
modes: [bf16, a8w8c8, {name: w4, mode: weight_only_int4, weights: {symmetric: false}, transforms: []}]
transforms: [{smooth: {alpha: 0.7}}]
rules:
  - {match: "*.1.mlp.down_proj", activations: {dynamic: true}, variants: [a8w8c8]}
"""


@pytest.fixture
def plan(layers: dict[str, Shape], facts: ModelFacts) -> Plan:
    return make_plan(load_recipe(TEXT), layers, facts)


def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_json(plan)))
    assert load_plan(path) == plan


def test_the_file_has_the_keys_that_others_read(plan: Plan) -> None:
    content = plan_json(plan)
    assert content["model"] == "tiny"
    assert set(content["variants"]["w4"]) == {"mode", "dtype", "cache", "transforms", "prefix", "layers"}
    assert content["variants"]["a8w8c8"]["mode"] == "a8w8c8"
    assert content["variants"]["a8w8c8"]["layers"]["model.layers.1.mlp.down_proj"]["dynamic"] is True
    assert {"memory_bytes", "disk_bytes", "seconds", "checkpoint_bytes"} <= set(content["forecast"])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": "m", "variants": {"x": {}}, "forecast": {}}', "\xff"])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"plan\.json: not a plan of quantbench: "):
        load_plan(path)


def test_an_absent_plan_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file\. `quantbench calibrate` writes it"):
        load_plan(tmp_path / "plan.json")


def test_layers_treated_alike_share_a_row(plan: Plan) -> None:
    rows = [(r.layers, r.count, r.weights, r.activations) for r in plan_rows(plan) if r.variant == "a8w8c8"]
    assert rows == [
        ("blocks 0-2: q_proj k_proj v_proj o_proj gate_proj up_proj", 18, "int8 per channel", "int8 static, absmax"),
        ("blocks 0,2: down_proj", 2, "int8 per channel", "int8 static, absmax"),
        ("blocks 1: down_proj", 1, "int8 per channel", "int8 dynamic"),
        ("lm_head", 1, "float32", "float"),
    ]
    assert sum(row.count for row in plan_rows(plan)) == sum(len(v.layers) for v in plan.variants.values())


def test_the_printed_plan_names_every_variant_rule_and_size(plan: Plan) -> None:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=200))
    for words in ("bf16", "a8w8c8", "smooth alpha 0.7", "rules[0] *.1.mlp.down_proj", "int4 per group 64, asymmetric"):
        assert words in out.getvalue()
    assert out.getvalue().count("checkpoint ") == 3
    assert "memory about" in out.getvalue()
