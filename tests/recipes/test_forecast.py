"""Checkpoint sizes are exact: they are what the writer's own table of tensors says. The rest is of the right order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.infer.checkpoint.quantized import expected_kinds
from quantbench.infer.checkpoint.source import Quantization
from quantbench.infer.checkpoint.tensors import linear_kinds
from quantbench.infer.models.config import ModelConfig
from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.forecast import Machine, checkpoint_bytes, layer_bytes
from quantbench.recipes.load import load_recipe
from quantbench.recipes.plan import make_plan
from quantbench.vocabulary import GRANULARITIES, LayerPlan

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MODES = ("fp32", "bf16", "a8w8", "a8w8c8", "a8w8_fp8c8_fp8", "weight_only_int8", "weight_only_int4c8",
         "a8w8c8_dynamic")  # fmt: skip


@given(st.sampled_from(sorted(GRANULARITIES)), st.data())
def test_a_linear_takes_what_its_tensors_take(weights: str, data: st.DataObject) -> None:
    granularity = data.draw(st.sampled_from(GRANULARITIES[weights]))
    size = data.draw(st.sampled_from([32, 64, 128])) if granularity == "group" else None
    shape = (data.draw(st.integers(1, 300)), (size or 8) * data.draw(st.integers(1, 20)))
    inputs = None if weights == "int4" else data.draw(st.sampled_from([None, weights]))
    symmetric = weights != "int4" or data.draw(st.booleans())
    dynamic = inputs is not None and data.draw(st.booleans())
    plan = LayerPlan("l", weights, granularity, size, symmetric, activations=inputs, dynamic=dynamic)
    kinds = linear_kinds(plan, shape)
    assert layer_bytes(plan, shape) == sum(int(np.prod(s)) * d.itemsize for s, d in kinds.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_checkpoint_takes_what_its_tensors_take(
    mode: str, dtype: str, layers: dict[str, Shape], facts: ModelFacts, config: ModelConfig
) -> None:
    recipe = load_recipe(f"model: m\nmodes: [{mode}]\ndtype: {dtype}\n")
    variant = make_plan(recipe, layers, facts).variants[mode]
    quantized = {name: p for name, p in variant.layers.items() if p.quantized}
    cache = variant.cache if variant.cache.quantized else None
    kinds = expected_kinds(config, Quantization(quantized, cache))
    total = 0
    for name, (shape, kind) in kinds.items():
        stored_float = kind == np.float32 and not name.endswith("_scale")
        total += int(np.prod(shape)) * (_BYTES[variant.dtype] if stored_float else kind.itemsize)
    assert checkpoint_bytes(variant, layers, facts) == total


def test_a_quantized_head_is_stored_beside_a_tied_embedding(layers: dict[str, Shape], facts: ModelFacts) -> None:
    plain = make_plan(load_recipe("model: m\n"), layers, facts).forecast.checkpoint_bytes["a8w8"]
    rule = "rules: [{match: lm_head, mode: weight_only_int8}]\n"
    head = make_plan(load_recipe(f"model: m\n{rule}"), layers, facts).forecast.checkpoint_bytes["a8w8"]
    assert head - plain == 320 * 192 + 320 * 4 + 16


def test_a_rotated_model_has_a_head_of_its_own_and_is_run_itself(layers: dict[str, Shape], facts: ModelFacts) -> None:
    text = "model: m\nmodes: [bf16, {name: v, mode: a8w8, transforms: []}, {name: w, mode: a8w8, transforms: []}]\n"
    turned = text.replace("transforms: []", "transforms: [{rotate: {}}]")
    other = turned.replace("{rotate: {}}", "{rotate: {seed: 1}}", 1)
    plain, same, two = (make_plan(load_recipe(t), layers, facts).forecast for t in (text, turned, other))
    assert same.checkpoint_bytes["v"] - plain.checkpoint_bytes["v"] == 320 * 192 * 4
    assert same.checkpoint_bytes["bf16"] == plain.checkpoint_bytes["bf16"]
    once = plain.seconds_of["collect"]
    assert same.seconds_of["collect"] == pytest.approx(2 * once)
    assert two.seconds_of["collect"] == pytest.approx(3 * once)


def test_hidden_states_spill_above_the_limit(layers: dict[str, Shape], facts: ModelFacts) -> None:
    text = "model: m\ncalibration: {samples: 1000, length: 1000, spill_above: 1MiB}\naccuracy: {divergence: off}\n"
    spilled = make_plan(load_recipe(text), layers, facts).forecast
    kept = make_plan(load_recipe(text, ["calibration.spill_above=8GiB"]), layers, facts).forecast
    hidden = 1000 * 1000 * 192 * 4
    assert spilled.spilled
    assert not kept.spilled
    assert kept.memory["calibrate"] - spilled.memory["calibrate"] == 2 * hidden
    assert spilled.disk_bytes - kept.disk_bytes == 2 * hidden


def test_time_follows_the_machine_and_what_is_off_takes_none(layers: dict[str, Shape], facts: ModelFacts) -> None:
    recipe = load_recipe("model: m\nthroughput: off\nparity: off\n")
    slow = make_plan(recipe, layers, facts, Machine(gflops=10, gb_per_s=5)).forecast
    fast = make_plan(recipe, layers, facts, Machine(gflops=100, gb_per_s=50)).forecast
    assert slow.seconds_of["collect"] == pytest.approx(10 * fast.seconds_of["collect"])
    assert slow.seconds_of["throughput"] == slow.seconds_of["parity"] == 0
    assert slow.seconds == pytest.approx(sum(slow.seconds_of.values()))
    assert slow.memory_bytes == max(slow.memory.values())


def test_a_text_is_run_once_for_perplexity_and_divergence(layers: dict[str, Shape], facts: ModelFacts) -> None:
    def seconds(accuracy: str) -> float:
        recipe = load_recipe(f"model: m\naccuracy: {accuracy}\n")
        return make_plan(recipe, layers, facts).forecast.seconds_of["accuracy"]

    same = seconds("{perplexity: [{tokens: 1000}], divergence: {tokens: 900}}")
    assert same == seconds("{perplexity: [{tokens: 1000}], divergence: off}")
    assert seconds("{perplexity: [{tokens: 1000}], divergence: {tokens: 1000, context: 64}}") == pytest.approx(2 * same)


def test_divergence_needs_disk_for_the_baselines_log_probabilities(layers: dict[str, Shape], facts: ModelFacts) -> None:
    without = make_plan(load_recipe("model: m\naccuracy: {divergence: off}\n"), layers, facts).forecast
    with_it = make_plan(load_recipe("model: m\naccuracy: {divergence: {tokens: 1000}}\n"), layers, facts).forecast
    assert with_it.disk_bytes - without.disk_bytes == 4 * 1000 * facts.vocab_size
