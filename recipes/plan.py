"""The plan: per variant and linear, what is to be done and which words of the recipe said so; and what it will take.

A plan is made before any weight is read. Everything that cannot be done is reported here, all at once: a rule that
matches nothing, a layer nobody decides, a group that does not divide a layer's inputs, fused layers that disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantbench.errors import RecipeError
from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.forecast import Forecast, Machine, forecast
from quantbench.recipes.order import acts_on
from quantbench.recipes.rules import HEAD, Choice, decide, described, untied, unused_rules
from quantbench.recipes.schema import Recipe, Variant
from quantbench.recipes.source import Path
from quantbench.vocabulary import FLOAT_DTYPES, MODES, CachePlan, VariantPlan

_CODES_PER_WORD = {"int8": 4, "int4": 8}


@dataclass(frozen=True)
class Plan:
    """What one run will do, and what it will take."""

    model: str
    variants: dict[str, VariantPlan]
    forecast: Forecast


def make_plan(recipe: Recipe, layers: Mapping[str, Shape], facts: ModelFacts, machine: Machine | None = None) -> Plan:
    """Decide every linear of the model (`layers`: full name -> [out, in], in order) for every variant.

    Raises RecipeError with everything that cannot be done, each with file and line where the recipe is at fault.
    """
    variants, chosen, problems = {}, set[int](), list[tuple[Path, str]]()
    for i, variant in enumerate(recipe.modes):
        dtype = _dtype(recipe, variant, facts)
        choices = {name: decide(recipe, variant, name, dtype) for name in layers}
        chosen |= {c.index for c in choices.values() if c.index is not None}
        problems.extend(_impossible(("modes", i), variant, choices, layers, facts))
        if outside := [t for t in recipe.variant_prefix(variant) if isinstance(t, int) and t >= facts.vocab_size]:
            at: Path = ("prefix",) if variant.prefix is None else ("modes", i, "prefix")
            problems.append((at, f"{outside} are outside the vocabulary of {facts.vocab_size}"))
        variants[variant.name] = _variant_plan(recipe, variant, dtype, choices)
    problems.extend(unused_rules(recipe, layers, chosen))
    if problems:
        raise RecipeError(*dict.fromkeys(recipe.source.listed(problems)))
    return Plan(facts.name, variants, forecast(recipe, variants, layers, facts, machine))


def _dtype(recipe: Recipe, variant: Variant, facts: ModelFacts) -> str:
    """A float mode says itself how it stores; a quantized one stores the rest as the recipe or the model does."""
    mode = MODES[variant.mode]
    if mode.weights in FLOAT_DTYPES:
        return mode.weights
    return facts.dtype if recipe.dtype == "auto" else recipe.dtype


def _variant_plan(recipe: Recipe, variant: Variant, dtype: str, choices: Mapping[str, Choice]) -> VariantPlan:
    mode, cache = MODES[variant.mode], recipe.variant_cache(variant)
    transforms = recipe.transforms if variant.transforms is None else variant.transforms
    return VariantPlan(
        name=variant.name,
        mode=mode,
        dtype=dtype,
        cache=CachePlan(mode.cache, cache.granularity, cache.observer),
        layers={name: choice.plan for name, choice in choices.items()},
        transforms=tuple(t.model_dump(mode="json", exclude_none=True) for t in transforms if acts_on(t.name, mode)),
        prefix=recipe.variant_prefix(variant),
    )


def _impossible(
    at: Path, variant: Variant, choices: Mapping[str, Choice], layers: Mapping[str, Shape], facts: ModelFacts
) -> Iterator[tuple[Path, str]]:
    """What cannot be done with one variant; paths point at the rule that asks for it, else at the variant."""
    undecided = [n for n, c in choices.items() if n not in facts.groups and n != HEAD and c.index is None]
    if undecided and MODES[variant.mode].weights not in FLOAT_DTYPES:
        yield (
            ("rules",),
            f"no rule decides {_some(undecided)}. Add a rule, for example {{match: {undecided[0]}, mode: float}}",
        )
    yield from _misshapen(at, choices, layers)
    head = choices.get(HEAD)
    if head and head.plan.activations is not None:
        yield (
            _path(head, at),
            (
                "lm_head can only be weight-only or float: its logits suffer most from quantized inputs. "
                "Put a rule for it first: {match: lm_head, mode: float} or mode: weight_only_int8"
            ),
        )
    yield from _untied(at, variant, choices, facts)


def _untied(at: Path, variant: Variant, choices: Mapping[str, Choice], facts: ModelFacts) -> Iterator[tuple[Path, str]]:
    """One problem for all fused groups whose members disagree."""
    groups = untied({name: c.plan for name, c in choices.items()}, facts.groups)
    if not groups:
        return
    rule = next(c for plans in groups.values() for p in plans if (c := choices[p.name]).index is not None)
    alike: dict[str, list[str]] = {}
    for group, plans in groups.items():
        alike.setdefault(", ".join(map(described, plans)), []).append(group)
    told = [f"{_some(names)} ({members})" for members, names in alike.items()]
    yield (
        _path(rule, at),
        f"{variant.name}: layers that are fused at run time must be quantized alike, but these are not: "
        f"{'; '.join(told)}. Widen the rule to all of a group",
    )


def _misshapen(at: Path, choices: Mapping[str, Choice], layers: Mapping[str, Shape]) -> Iterator[tuple[Path, str]]:
    """Layers whose inputs cannot be cut into groups or packed into words; one line per rule and reason."""
    found: dict[tuple[Path, str], list[str]] = {}
    for name, choice in choices.items():
        plan, inputs = choice.plan, layers[name][1]
        if not plan.quantized:
            continue
        if plan.group_size and inputs % plan.group_size:
            fits = [str(g) for g in (128, 64, 32) if inputs % g == 0]
            fix = f"use {' or '.join(fits)}" if fits else "use granularity channel"
            why = f"group size {plan.group_size} does not divide the {inputs} inputs of {{}}: {fix}"
            found.setdefault((_path(choice, at), why), []).append(name)
        word = _CODES_PER_WORD.get(plan.weights, 1)
        if plan.activations is None and inputs % word:
            why = f"{plan.weights} codes are stored {word} to a word, which does not divide the {inputs} inputs of {{}}"
            found.setdefault((_path(choice, at), why), []).append(name)
    for (path, why), names in found.items():
        yield path, why.format(_some(names))


def _path(choice: Choice, variant: Path) -> Path:
    return variant if choice.index is None else ("rules", choice.index)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
