"""The plan of a small Llama, and everything that stops it, with file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantbench.errors import RecipeError
from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.load import load_recipe
from quantbench.recipes.lock import write_lock
from quantbench.recipes.plan import Plan, make_plan
from quantbench.recipes.plan_file import load_plan, plan_json
from quantbench.vocabulary import DEFAULT_TARGETS, CachePlan

Layers = dict[str, Shape]


def planned(text: str, layers: Layers, facts: ModelFacts) -> Plan:
    return make_plan(load_recipe(f"model: m\n{text}\n"), layers, facts)


def refused(text: str, layers: Layers, facts: ModelFacts) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        planned(text, layers, facts)
    return caught.value.problems


def test_every_variant_decides_every_layer(layers: Layers, facts: ModelFacts) -> None:
    plan = planned("modes: [bf16, a8w8c8, weight_only_int4]\nweights: {group_size: 32}", layers, facts)
    assert list(plan.variants) == ["bf16", "a8w8c8", "weight_only_int4"]
    assert all(list(v.layers) == list(layers) for v in plan.variants.values())
    assert plan.variants["a8w8c8"].cache == CachePlan("int8")
    assert plan.variants["weight_only_int4"].layers["model.layers.0.mlp.up_proj"].group_size == 32
    assert plan.model == "tiny"


def test_dtype_is_the_modes_the_recipes_or_the_models(layers: Layers, facts: ModelFacts) -> None:
    dtypes = {n: v.dtype for n, v in planned("modes: [fp32, bf16, fp16, a8w8]", layers, facts).variants.items()}
    assert dtypes == {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "a8w8": "float32"}
    plan = planned("modes: [fp32, a8w8]\ndtype: bfloat16", layers, facts)
    assert [v.dtype for v in plan.variants.values()] == ["float32", "bfloat16"]
    assert plan.variants["a8w8"].layers["lm_head"].weights == "bfloat16"


def test_transforms_are_for_variants_that_quantize_weights(layers: Layers, facts: ModelFacts) -> None:
    default = {"alpha": 0.5, "targets": list(DEFAULT_TARGETS)}
    text = "modes: [bf16c8, a8w8, {name: plain, mode: a8w8, transforms: []}]\ntransforms: [smooth]"
    transforms = {n: v.transforms for n, v in planned(text, layers, facts).variants.items()}
    assert transforms == {"bf16c8": (), "a8w8": ({"smooth": default},), "plain": ()}


def test_a_rule_that_matches_nothing_names_the_nearest_layers(layers: Layers, facts: ModelFacts) -> None:
    (found,) = refused("rules:\n  - {match: 'model.layers.*.mlp.dwn_proj', mode: float}", layers, facts)
    assert found.startswith(
        "recipe:3: rules[0].match: matches no layer: unknown layer glob 'model.layers.*.mlp.dwn_proj'. "
        "Did you mean model.layers.*.mlp.down_proj? Known: lm_head, model.layers.*.mlp.down_proj, "
    )


def test_a_rule_behind_another_is_never_reached(layers: Layers, facts: ModelFacts) -> None:
    text = "rules:\n  - {match: '*mlp*', mode: float}\n  - {match: '*down*', mode: weight_only_int8}"
    (found,) = refused(text, layers, facts)
    assert found == (
        "recipe:4: rules[1].match: is never reached: the layers it matches are decided by an earlier rule (recipe:3). "
        "Put this one before it"
    )


def test_a_rule_needs_a_variant_that_quantizes(layers: Layers, facts: ModelFacts) -> None:
    (found,) = refused("modes: [bf16]\nrules: [{match: '*', mode: float}]", layers, facts)
    assert found == "recipe:3: rules[0].match: decides nothing: no variant of this recipe quantizes weights"


def test_a_layer_outside_the_family_must_be_decided_by_a_rule(layers: Layers, facts: ModelFacts) -> None:
    more = layers | {"model.layers.1.mlp.gate": (4, 192)}
    (found,) = refused("modes: [bf16, a8w8]\nrules: [{match: lm_head, mode: float}]", more, facts)
    assert found == (
        "recipe:3: rules: no rule decides model.layers.1.mlp.gate. "
        "Add a rule, for example {match: model.layers.1.mlp.gate, mode: float}"
    )
    plan = planned("rules: [{match: '*.mlp.gate', mode: float}]", more, facts)
    assert plan.variants["a8w8"].layers["model.layers.1.mlp.gate"].weights == "float32"


def test_a_group_must_divide_the_inputs(layers: Layers, facts: ModelFacts) -> None:
    text = "modes:\n  - a8w8\n  - weight_only_int4\nweights: {group_size: 128}"
    (found,) = refused(text, layers, facts)
    assert found == (
        "recipe:4: modes[1]: group size 128 does not divide the 192 inputs of model.layers.0.self_attn.q_proj, "
        "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj and 15 more: use 64 or 32"
    )
    odd = layers | {"model.layers.0.mlp.down_proj": (192, 24)}
    rule = "rules:\n  - {match: '*.0.mlp.down_proj', mode: weight_only_int4}"
    assert refused(rule, odd, facts)[0].endswith(
        "the 24 inputs of model.layers.0.mlp.down_proj: use granularity channel"
    )
    assert refused(rule, odd, facts)[0].startswith("recipe:3: rules[0]: group size 64 does not divide")


def test_packed_codes_must_fill_their_words(layers: Layers, facts: ModelFacts) -> None:
    odd = layers | {"model.layers.0.mlp.down_proj": (192, 38)}
    (found,) = refused("modes: [weight_only_int8]", odd, facts)
    assert found == (
        "recipe:2: modes[0]: int8 codes are stored 4 to a word, which does not divide the 38 inputs of "
        "model.layers.0.mlp.down_proj"
    )
    planned("modes: [a8w8]", odd, facts)


def test_the_head_is_weight_only_or_float(layers: Layers, facts: ModelFacts) -> None:
    (found,) = refused("rules:\n  - {match: '*', mode: a8w8}", layers, facts)
    assert found.startswith("recipe:3: rules[0]: lm_head can only be weight-only or float: ")
    plan = planned("rules: [{match: lm_head, mode: weight_only_int8}]", layers, facts)
    assert plan.variants["a8w8"].layers["lm_head"].weights == "int8"


def test_fused_layers_must_agree_and_are_listed_together(layers: Layers, facts: ModelFacts) -> None:
    text = "rules:\n  - {match: '*.q_proj', activations: {dynamic: true}}\n  - {match: '*.1.mlp.up_proj', mode: float}"
    (found,) = refused(text, layers, facts)
    q = "q_proj: int8 per channel, int8 dynamic inputs"
    k, v, gate = (f"{n}_proj: int8 per channel, int8 static inputs" for n in ("k", "v", "gate"))
    assert found == (
        "recipe:3: rules[0]: a8w8: layers that are fused at run time must be quantized alike, but these are not: "
        f"model.layers.0.qkv, model.layers.1.qkv, model.layers.2.qkv ({q}, {k}, {v}); "
        f"model.layers.1.gate_up ({gate}, up_proj: float32). Widen the rule to all of a group"
    )


def test_everything_is_told_at_once(layers: Layers, facts: ModelFacts) -> None:
    text = (
        "modes: [a8w8, weight_only_int4]\nweights: {group_size: 128}\nrules:\n"
        "  - {match: nothing, mode: float}\n  - {match: lm_head, mode: a8w8, variants: [a8w8]}"
    )
    found = refused(text, layers, replace(facts))
    assert [p.split(": ")[0] for p in found] == ["recipe:2", "recipe:5", "recipe:6"]


def test_a_method_with_settings_reaches_its_layers_and_survives_lock_and_plan_file(
    layers: Layers, facts: ModelFacts, tmp_path: Path
) -> None:
    text = (
        "model: m\nmodes: [a8w8, {name: w4, mode: weight_only_int4, method: gptq}]\n"
        "rules: [{match: '*.down_proj', method: {gptq: {act_order: false, damping: 0.05, sweeps: 2}}, "
        "variants: [a8w8]}]\n"
    )
    recipe = load_recipe(text)
    plan = make_plan(recipe, layers, facts)
    name = "model.layers.0.mlp.down_proj"
    assert (plan.variants["a8w8"].layers[name].method, plan.variants["a8w8"].layers[name].options) == (
        "gptq", (("act_order", False), ("damping", (0.05,)), ("sweeps", 2)),
    )  # fmt: skip
    assert plan.variants["a8w8"].layers["model.layers.0.mlp.up_proj"].method == "rtn"
    assert plan.variants["w4"].layers[name].options == (
        ("act_order", True),
        ("damping", (0.01, 0.1, 1.0)),
        ("sweeps", 0),
    )
    lock = write_lock(recipe, tmp_path / "recipe.lock.yaml", "0" * 64, {}, {})
    assert "method: rtn\n" in lock.read_text()
    assert load_recipe(lock).model_dump() == recipe.model_dump()
    (tmp_path / "plan.json").write_text(json.dumps(plan_json(plan)))
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_prefix_is_the_variants_or_for_all_that_quantize_weights(layers: Layers, facts: ModelFacts) -> None:
    modes = "[bf16, a8w8, {name: b, mode: a8w8, prefix: off}, {name: c, mode: fp32, prefix: [1, 319]}]"
    plan = planned(f"modes: {modes}\nprefix: auto", layers, facts)
    assert [v.prefix for v in plan.variants.values()] == ["off", "auto", "off", (1, 319)]


def test_a_prefix_is_of_the_vocabulary(layers: Layers, facts: ModelFacts) -> None:
    modes = "[{mode: a8w8}, {name: b, mode: a8w8, prefix: [1, 400]}]"
    assert refused(f"prefix: [320]\nmodes: {modes}", layers, facts) == (
        "recipe:2: prefix: [320] are outside the vocabulary of 320",
        "recipe:3: modes[1].prefix: [400] are outside the vocabulary of 320",
    )


def test_a_prefix_survives_the_plan_file(layers: Layers, facts: ModelFacts, tmp_path: Path) -> None:
    plan = planned("modes: [a8w8, {name: b, mode: a8w8, prefix: [5, 6]}]\nprefix: auto", layers, facts)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_json(plan)))
    assert [v.prefix for v in load_plan(file).variants.values()] == ["auto", (5, 6)]
