"""The bundled recipes load, fit a model, and are found by name."""

from __future__ import annotations

import json

import pytest

from quantbench.errors import RecipeError
from quantbench.recipes.bundled import Preset, Reached, list_presets, preset_path
from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.load import load_recipe
from quantbench.recipes.plan import make_plan

NAMES = {
    "demo", "w8a8-static", "w8a8-dynamic", "w8a8-smooth", "w8a8c8", "fp8", "fp8c8", "weight-only-int8",
    "w8a8-static-smooth", "w8a8-static-prefix",
    "w8a8-dynamic-smooth", "w8a8c8-dynamic-smooth", "weight-only-int4", "weight-only-int4-gptq",
    "weight-only-int4-rotate-gptq", "fp8-static-prefix",
    "weight-only-int4-clip-gptq", "w8a8-dynamic-rotate-gptq", "seed-llama-ptq",
}  # fmt: skip


def test_all_are_listed_with_a_summary() -> None:
    assert {p.name for p in list_presets()} == NAMES
    assert all(p.summary.endswith(".") and len(p.summary) > 30 for p in list_presets())


@pytest.mark.parametrize("preset", list_presets(), ids=lambda p: p.name)
def test_each_fits_a_model(preset: Preset, layers: dict[str, Shape], facts: ModelFacts) -> None:
    recipe = load_recipe(preset.name)
    assert recipe == load_recipe(preset.path)
    assert recipe.output == f"runs/{preset.name}"
    assert set(make_plan(recipe, layers, facts).variants) == {v.name for v in recipe.modes}


@pytest.mark.parametrize("preset", list_presets(), ids=lambda p: p.name)
def test_what_is_commented_out_loads_too(preset: Preset, layers: dict[str, Shape], facts: ModelFacts) -> None:
    text = (
        preset.path.read_text()
        .replace("# rules:", "rules:")
        .replace("# gates:", "gates:")
        .replace("#   - {match", "  - {match")
    )
    make_plan(load_recipe(text), layers, facts)


def test_the_demo_has_the_modes_of_the_readme_and_static_beside_dynamic() -> None:
    modes = {v.name: v for v in load_recipe("demo").modes}
    assert set(modes) >= {"bf16", "a8w8", "a8w8c8", "a8w8_fp8", "weight_only_int8", "weight_only_int4"}
    demo = load_recipe("demo")
    assert demo.variant_activations(modes["a8w8"]).dynamic
    assert not demo.variant_activations(modes["a8w8-static"]).dynamic


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(RecipeError, match=r"unknown bundled recipe 'w8a8-dynamc'\. Did you mean w8a8-dynamic\?"):
        preset_path("w8a8-dynamc")


def test_what_a_preset_reached_is_one_line() -> None:
    told = Reached(
        "a8w8, static", "SmolLM2", "llama", 0.0305, (0.02, 0.04), 1.59, 0.031, 0.9, 163_487_136, "2026-11-22"
    )
    assert str(told) == (
        "a8w8, static, SmolLM2 (llama): perplexity +3.05% (round to nearest +159.0%), KL 0.0310, top-1 90.0%, 163 MB, "
        "2026-11-22"
    )


def test_figures_are_of_presets_that_exist() -> None:
    """A renamed preset would lose its figures without a word."""
    path = preset_path("demo").parent / "reached.json"
    assert set(json.loads(path.read_text())) <= NAMES
    assert sum(len(p.reached) for p in list_presets()) == sum(map(len, json.loads(path.read_text()).values()))
