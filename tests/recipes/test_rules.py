"""The first rule that matches a layer decides it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.recipes.load import load_recipe
from quantbench.recipes.rules import decide, first_match, untied
from quantbench.recipes.schema import Recipe
from quantbench.vocabulary import LayerPlan

LAYERS = [f"model.layers.{i}.mlp.{n}_proj" for i in range(12) for n in ("gate", "up", "down")] + ["lm_head"]


def recipe(rules: str, modes: str = "[a8w8]", more: str = "") -> Recipe:
    return load_recipe(f"model: m\nmodes: {modes}\nrules: {rules}\n{more}")


def plan(of: Recipe, layer: str, variant: int = 0) -> LayerPlan:
    return decide(of, of.modes[variant], layer, "bfloat16").plan


def test_without_rules_a_layer_takes_its_variants_settings_and_the_head_stays_float() -> None:
    of = recipe("[]", "[{name: x, mode: a8w8, activations: {dynamic: true}}]", "weights: {observer: mse}\n")
    assert plan(of, LAYERS[0]) == LayerPlan(
        LAYERS[0], "int8", "channel", weight_observer="mse", activations="int8", dynamic=True, rule="default"
    )
    assert plan(of, "lm_head") == LayerPlan("lm_head", "bfloat16", rule="default: lm_head stays float")


@given(st.lists(st.sampled_from(["*", "*.1.*", "*down*", "lm_*", "*.layers.1?.*", "model.*", "[lm]*"]), max_size=4))
def test_the_first_match_wins(globs: list[str]) -> None:
    of = recipe("[" + ", ".join(f"{{match: '{g}', mode: weight_only_int8}}" for g in globs) + "]")
    for layer in LAYERS:
        matching = [i for i, glob in enumerate(globs) if fnmatchcase(layer, glob)]
        assert first_match(of, of.modes[0], layer) == (matching[0] if matching else None)
        if matching:
            assert plan(of, layer).rule == f"rules[{matching[0]}] {globs[matching[0]]}"


def test_a_star_also_matches_dots_and_case_counts() -> None:
    assert first_match(recipe("[{match: 'model*down_proj', mode: float}]"), recipe("[]").modes[0], LAYERS[2]) == 0
    assert first_match(recipe("[{match: '*DOWN_proj', mode: float}]"), recipe("[]").modes[0], LAYERS[2]) is None


def test_a_rule_changes_only_the_words_it_writes() -> None:
    more = "activations: {observer: mse}\nweights: {observer: mse}\n"
    of = recipe(
        "[{match: '*down*', activations: {dynamic: true}}, {match: '*', weights: {observer: absmax}}]", more=more
    )
    down, up = plan(of, LAYERS[2]), plan(of, LAYERS[1])
    assert (down.dynamic, down.activation_observer, down.weight_observer) == (True, "mse", "mse")
    assert (up.dynamic, up.activation_observer, up.weight_observer) == (False, "mse", "absmax")


def test_a_rule_may_change_the_mode() -> None:
    of = recipe("[{match: '*down*', mode: weight_only_int4, weights: {group_size: 32, symmetric: false}}]")
    down = plan(of, LAYERS[2])
    assert (down.weights, down.granularity, down.group_size, down.symmetric) == ("int4", "group", 32, False)
    assert (down.activations, down.dynamic) == (None, False)


@pytest.mark.parametrize("mode", ["float", "fp32", "bf16"])
def test_every_float_mode_of_a_rule_means_the_checkpoints_float_dtype(mode: str) -> None:
    assert plan(recipe(f"[{{match: '*', mode: {mode}}}]"), LAYERS[0]).weights == "bfloat16"


def test_the_head_needs_a_rule_with_a_mode_to_be_quantized() -> None:
    assert not plan(recipe("[{match: '*', activations: {dynamic: true}}]"), "lm_head").quantized
    head = plan(recipe("[{match: lm_head, mode: weight_only_int8}]"), "lm_head")
    assert (head.weights, head.granularity, head.activations) == ("int8", "channel", None)


def test_rules_speak_of_the_variants_they_list_else_of_those_that_quantize_weights() -> None:
    rules = "[{match: '*', mode: weight_only_int8, variants: [b, bf16]}, {match: '*', mode: float}]"
    of = recipe(rules, "[bf16, a8w8, {name: b, mode: a8w8}, fp32c8]")
    assert [plan(of, LAYERS[0], i).weights for i in range(4)] == ["int8", "bfloat16", "int8", "bfloat16"]
    assert [first_match(of, v, LAYERS[0]) for v in of.modes] == [0, 1, 0, None]


def test_untied_finds_each_difference_that_fusing_cannot_bear() -> None:
    a = LayerPlan("a", "int8", "channel", activations="int8")
    groups = {"a": "g", "b": "g"}
    for b in (
        LayerPlan("b", "bfloat16"),
        LayerPlan("b", "int8", "tensor", activations="int8"),
        LayerPlan("b", "int8", "channel", activations="int8", dynamic=True),
        LayerPlan("b", "int8", "channel"),
    ):
        assert untied({"a": a, "b": b}, groups) == {"g": [a, b]}
    alike = LayerPlan("b", "int8", "channel", activations="int8", weight_observer="mse", rule="rules[0] b")
    assert untied({"a": a, "b": alike}, groups) == {}
