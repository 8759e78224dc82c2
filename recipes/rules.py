"""Which words of a recipe decide a layer: the first rule whose glob matches, else the settings of the variant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantbench.errors import unknown
from quantbench.recipes.schema import Recipe, Rule, Variant, merged
from quantbench.recipes.source import Path
from quantbench.vocabulary import DEFAULT_GRANULARITY, FLOAT_DTYPES, MODES, LayerPlan, Mode

HEAD = "lm_head"


@dataclass(frozen=True)
class Choice:
    """Which rule decided one layer of one variant; `index` None: no rule did."""

    index: int | None
    plan: LayerPlan


def applies(rule: Rule, variant: Variant) -> bool:
    """A rule with `variants` speaks of these; one without, of every variant whose mode quantizes weights."""
    if rule.variants is not None:
        return variant.name in rule.variants
    return MODES[variant.mode].weights not in FLOAT_DTYPES


def first_match(recipe: Recipe, variant: Variant, layer: str) -> int | None:
    """Index of the rule that decides a layer of a variant (globs as in fnmatch, case-sensitive), or None."""
    for i, rule in enumerate(recipe.rules):
        if applies(rule, variant) and fnmatchcase(layer, rule.match):
            return i
    return None


def decide(recipe: Recipe, variant: Variant, layer: str, dtype: str) -> Choice:
    """What is done with one linear. `dtype` is the storage of what stays float in this variant."""
    index = first_match(recipe, variant, layer)
    rule = None if index is None else recipe.rules[index]
    name = "default" if rule is None else f"rules[{index}] {rule.match}"
    mode = _mode(variant, rule, layer)
    if mode is None or mode.weights in FLOAT_DTYPES:  # one file has one float dtype, whichever float mode a rule names
        why = "default: lm_head stays float" if rule is None and layer == HEAD else name
        return Choice(index, LayerPlan(layer, weights=dtype, rule=why))
    return Choice(index, _quantized(recipe, variant, rule, LayerPlan(layer, weights=mode.weights, rule=name), mode))


def _mode(variant: Variant, rule: Rule | None, layer: str) -> Mode | None:
    """The mode of a layer; None: it stays float. The head stays float unless a rule gives it a mode."""
    word = rule.mode if rule is not None else None
    if word == "float" or (word is None and layer == HEAD):
        return None
    return MODES[word or variant.mode]


def _quantized(recipe: Recipe, variant: Variant, rule: Rule | None, start: LayerPlan, mode: Mode) -> LayerPlan:
    weights = merged(recipe.variant_weights(variant), rule.weights if rule else None)
    activations = merged(recipe.variant_activations(variant), rule.activations if rule else None)
    method = (rule.method if rule else None) or variant.method or recipe.method
    granularity = DEFAULT_GRANULARITY[mode.weights] if weights.granularity == "auto" else weights.granularity
    return LayerPlan(
        start.name,
        weights=mode.weights,
        granularity=granularity,
        group_size=weights.group_size if granularity == "group" else None,
        symmetric=weights.symmetric,
        weight_observer=weights.observer,
        activations=mode.activations,
        dynamic=activations.dynamic and mode.activations is not None,
        activation_observer=activations.observer,
        method=method.name,
        options=method.options,
        rule=start.rule,
    )


def unused_rules(recipe: Recipe, layers: Iterable[str], chosen: set[int]) -> list[tuple[Path, str]]:
    """Rules that decided nothing (`chosen`: indices of those that did), each with the reason."""
    names = list(layers)
    return [(("rules", i, "match"), _why_unused(recipe, i, names)) for i in range(len(recipe.rules)) if i not in chosen]


def _why_unused(recipe: Recipe, index: int, layers: list[str]) -> str:
    rule = recipe.rules[index]
    matched = [name for name in layers if fnmatchcase(name, rule.match)]
    if not matched:
        patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in layers)
        return f"matches no layer: {unknown('layer glob', rule.match, patterns)}"
    if not any(applies(rule, v) for v in recipe.modes):
        return "decides nothing: no variant of this recipe quantizes weights"
    earlier = {first_match(recipe, v, matched[0]) for v in recipe.modes if applies(rule, v)}
    first = recipe.source.where(("rules", min(i for i in earlier if i is not None)))
    return f"is never reached: the layers it matches are decided by an earlier rule ({first}). Put this one before it"


def untied(plans: Mapping[str, LayerPlan], groups: Mapping[str, str]) -> dict[str, list[LayerPlan]]:
    """Fused groups whose members disagree.

    q, k and v (gate and up) are one matrix product at run time, on one input quantized once, so they share weight
    format and granularity, activation format, and whether that is dynamic.
    """
    members: dict[str, list[LayerPlan]] = {}
    for name, plan in plans.items():
        members.setdefault(groups.get(name, name), []).append(plan)
    return {group: of for group, of in members.items() if len({_tied(p) for p in of}) > 1}


def _tied(p: LayerPlan) -> tuple[object, ...]:
    return p.weights, p.granularity, p.group_size, p.quantized and p.symmetric, p.activations, p.dynamic


def described(p: LayerPlan) -> str:
    """ "q_proj: int8 per channel, int8 static inputs"."""
    return f"{p.name.rpartition('.')[2]}: {_treatment(p)}"


def _treatment(p: LayerPlan) -> str:
    if not p.quantized:
        return p.weights
    size = f" {p.group_size}" if p.group_size else ""
    inputs = f", {p.activations} {'dynamic' if p.dynamic else 'static'} inputs" if p.activations else ""
    return f"{p.weights} per {p.granularity}{size}{inputs}"
