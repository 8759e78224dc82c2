"""Where a checkpoint can hold biases that the model did not have, and the model behind that promise.

HF's classes read a switch of config.json (Llama: attention_bias, mlp_bias; Qwen3: attention_bias), which gives *every*
linear of its class a bias: those that a transform does not use are zeros. Families without a switch (Mistral, the
o_proj and the MLP of Qwen2) cannot hold one, and an RMS norm never can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from quantbench.errors import RecipeError
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.models import FAMILIES, LINEARS, TAPS, ModelConfig, biased
from quantbench.vocabulary import VariantPlan

WORD, SHIFT = "bias_correction", "shift"
MOVED = frozenset({"self_attn.v_proj", "self_attn.o_proj"})  # whose biases carry a shift of o_in


def holdable(config: ModelConfig) -> frozenset[str]:
    """Linears of a block that have a bias, or can have one."""
    return biased(config).union(*(names for _, names in FAMILIES[config.family].bias_switches))


def correctable(config: ModelConfig) -> tuple[str, ...]:
    """The taps of which every linear has a bias, or can have one."""
    possible = holdable(config)
    return tuple(tap for tap in TAPS if all(line.name in possible for line in LINEARS if line.tap == tap))


def corrected_taps(variant: VariantPlan, config: ModelConfig) -> tuple[str, ...]:
    """The taps whose linears `bias_correction` corrects: its targets, or all that can be."""
    found = [(words[WORD] or {}).get("targets") for words in variant.transforms if WORD in words]
    return tuple(tap for targets in found for tap in (targets or correctable(config)))


def wanted_biases(variant: VariantPlan, config: ModelConfig) -> frozenset[str]:
    """Linears of a block that the variant's transforms give a bias, by name within the block."""
    taps = corrected_taps(variant, config)
    corrected = frozenset(line.name for line in LINEARS if line.tap in taps)
    return corrected | MOVED if any(SHIFT in words for words in variant.transforms) else corrected


def held_biases(config: ModelConfig, variant: VariantPlan) -> frozenset[str]:
    """Linears of a block that have a bias in the variant's checkpoint: the wanted ones and all of their class."""
    missing = wanted_biases(variant, config) - biased(config)
    classes = (names for _, names in FAMILIES[config.family].bias_switches if missing.intersection(names))
    return biased(config).union(*classes)


def with_biases(model: ModelSource, variant: VariantPlan) -> ModelSource:
    """The model as the variant's checkpoint describes it: its config has room for the variant's biases."""
    held = held_biases(model.config, variant)
    if held == biased(model.config):
        return model
    config = replace(
        model.config,
        attention_bias="self_attn.q_proj" in held,
        output_bias="self_attn.o_proj" in held,
        mlp_bias="mlp.gate_proj" in held,
    )
    switches = {key: True for key, names in FAMILIES[config.family].bias_switches if held.issuperset(names)}
    return replace(model, config=config, hf_config=model.hf_config | switches)


def require_biases(config: ModelConfig, variants: Iterable[VariantPlan]) -> None:
    """Raises RecipeError for every variant that asks for biases which the model's family cannot hold."""
    problems = dict.fromkeys(p for v in variants for p in _impossible(config, v))
    if problems:
        raise RecipeError(*problems)


def _impossible(config: ModelConfig, variant: VariantPlan) -> Iterator[str]:
    if any(SHIFT in words for words in variant.transforms) and (fixed := MOVED - holdable(config)):
        names = ", ".join(sorted(name.split(".")[-1] for name in fixed))
        yield (
            f"{variant.name}: {SHIFT}: moving o_in takes biases of v_proj and o_proj, and {names} of a {config.family} "
            "model cannot hold one in the checkpoint's format; leave it out for this model"
        )
    possible = correctable(config)
    if any(WORD in words for words in variant.transforms):
        taps = corrected_taps(variant, config)
        lacking = [line.name.split(".")[-1] for line in LINEARS if line.tap in taps and line.tap not in possible]
        if lacking or not taps:
            what = f"{', '.join(lacking)} of a {config.family} model" if lacking else f"A {config.family} model"
            choice = f"use targets: [{', '.join(possible)}]" if possible else "leave it out for this model"
            yield f"{variant.name}: {WORD}: {what} cannot hold a bias in the checkpoint's format; {choice}"
