"""Contradictions: words that are sound alone and cannot be done together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quantbench.recipes.load import load_recipe

Problems = Callable[..., tuple[str, ...]]

CASES = {
    "modes: [a8w8, weight_only_int4]\nweights: {granularity: group}": (
        "recipe:3: weights.granularity: 'group' does not fit: a8w8 allows tensor, channel. Write it under a variant"
    ),
    "modes: [a8w8_fp8, {mode: a8w8, weights: {granularity: block}}]": (
        "recipe:2: modes[1].weights.granularity: 'block' does not fit: a8w8 allows tensor, channel"
    ),
    "modes: [{mode: a8w8, weights: {observer: mse}}]\nweights: {granularity: group}": (
        "recipe:3: weights.granularity: 'group' does not fit: a8w8 allows tensor, channel"
    ),
    "modes: [weight_only_int4, weight_only_int8]\nweights: {symmetric: false}": (
        "recipe:3: weights.symmetric: only int4 weights can be asymmetric, not those of weight_only_int8. Write it"
    ),
    "rules:\n  - {match: x, mode: weight_only_int8, weights: {granularity: group}}": (
        "recipe:3: rules[0].weights.granularity: 'group' does not fit: weight_only_int8 allows tensor, channel"
    ),
    "rules:\n  - match: x\n    weights: {symmetric: false}": (
        "recipe:4: rules[0].weights.symmetric: only int4 weights can be asymmetric, not those of a8w8"
    ),
    "rules:\n  - {match: x, mode: float, variants: [a8w8, a8w9]}": (
        "recipe:3: rules[0].variants[1]: unknown variant 'a8w9'. Did you mean a8w8? Known: a8w8"
    ),
    "rules:\n  - {match: x}": ("recipe:3: rules[0]: decides nothing: give it mode, weights, activations or method"),
    "gates:\n  a8w9: {kl: 0.1}": "recipe:3: gates.a8w9: unknown gate or variant 'a8w9'. Did you mean a8w8? Known: ",
    "gates:\n  decode_sped: {kl: 0.1}": (
        "recipe:3: gates.decode_sped: unknown gate or variant 'decode_sped'. Did you mean decode_speedup?"
    ),
    "throughput: off\ngates: {decode_speedup: 1.2}": (
        "recipe:3: gates.decode_speedup: cannot be checked: throughput is off"
    ),
    "throughput: off\ngates: {a8w8: {prefill_speedup: 1}}": (
        "recipe:3: gates.a8w8.prefill_speedup: cannot be checked: throughput is off"
    ),
    "accuracy: {perplexity: []}\ngates: {perplexity_increase: 1}": (
        "recipe:3: gates.perplexity_increase: cannot be checked: accuracy.perplexity is empty"
    ),
    "accuracy: {divergence: off}\ngates: {kl: 1}": (
        "recipe:3: gates.kl: cannot be checked: accuracy.divergence is off"
    ),
    "gates: {choices_drop: 1}": "recipe:2: gates.choices_drop: cannot be checked: accuracy.choices is empty",
    "parity: off\ngates: {parity_top1: 99%}": "recipe:3: gates.parity_top1: cannot be checked: parity is off",
    "modes: [{mode: weight_only_int8, activations: {dynamic: true}}]": (
        "recipe:2: modes[0].activations: the mode weight_only_int8 leaves activations in float"
    ),
    "modes: [{mode: a8w8, cache_kv: {observer: mse}}]": (
        "recipe:2: modes[0].cache_kv: the mode a8w8 leaves the KV cache in float"
    ),
    "modes: [{mode: a8w8c8_dynamic, cache_kv: {observer: mse}}]": (
        "recipe:2: modes[0].cache_kv: the mode a8w8c8_dynamic finds a scale for every token as it is written"
    ),
    "modes: [{mode: bf16c8, weights: {observer: mse}}]": (
        "recipe:2: modes[0].weights: the mode bf16c8 leaves weights in float"
    ),
    "modes: [{name: fp32, mode: a8w8}]": (
        "recipe:2: modes[0].name: 'fp32' is the name of the baseline (accuracy.baseline); choose another"
    ),
    "accuracy:\n  perplexity:\n    - {tokens: 100, context: 512}": (
        "recipe:4: accuracy.perplexity[0].context: windows of 512 predict more than the 100 tokens asked for."
    ),
}


@pytest.mark.parametrize("text", CASES, ids=lambda t: t[:50])
def test_each_contradiction_is_told(text: str, problems_of: Problems) -> None:
    found = problems_of(text)
    assert found[0].startswith(CASES[text])
    assert len(found) == 1


def test_what_only_looks_like_a_contradiction_loads() -> None:
    load_recipe("model: m\nmodes: [a8w8, a8w8_fp8, weight_only_int4]\nweights: {granularity: channel}\n")
    load_recipe("model: m\nmodes: [a8w8, weight_only_int4]\nweights: {group_size: 32}\n")
    load_recipe("model: m\nmodes: [a8w8]\nrules: [{match: x, mode: weight_only_int4, weights: {symmetric: false}}]\n")
    load_recipe("model: m\nmodes: [fp32, a8w8]\naccuracy: {perplexity: [{tokens: 511, context: 512}]}\n")
