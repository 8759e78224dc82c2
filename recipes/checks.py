"""Contradictions between the words of a recipe: each is sound alone, together they cannot be done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from quantbench.errors import unknown
from quantbench.recipes.order import transform_order, transforms_used
from quantbench.recipes.schema import Recipe, Rule, Variant
from quantbench.recipes.sections import Weights, WeightsPatch
from quantbench.recipes.source import Path
from quantbench.vocabulary import GRANULARITIES, MODES, WEIGHT_FORMATS, Mode

Check = Callable[[Recipe], Iterator[tuple[Path, str]]]


def contradictions(recipe: Recipe, damaged: set[str]) -> list[tuple[Path, str]]:
    """Every contradiction between sections that are themselves sound (`damaged` names those that are not)."""
    runnable = [check for check, needs in _CHECKS if not damaged & needs]
    return [problem for check in runnable for problem in check(recipe)]


def _weights_fit(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Section `weights`, then each variant's changes to it, against the format of the mode."""
    plain = [v.mode for v in recipe.modes if v.weights is None]
    for path, why in _misfits(recipe.weights, ("weights",), plain):
        yield path, f"{why}. Write it under a variant of its own: modes: [{{name: …, mode: …, weights: {{…}}}}]"
    for i, v in enumerate(recipe.modes):
        if v.weights is not None:
            yield from _misfits(recipe.variant_weights(v), ("modes", i, "weights"), [v.mode], v.weights)


def _misfits(
    weights: Weights, path: Path, modes: list[str], patch: WeightsPatch | None = None
) -> Iterator[tuple[Path, str]]:
    """What in `weights` the formats of `modes` cannot hold. Points at `weights` where the patch inherits the word."""
    formats = {m: MODES[m].weights for m in modes if MODES[m].weights in WEIGHT_FORMATS}
    allowed = {m: GRANULARITIES[f] for m, f in formats.items()}
    bad = [m for m, words in allowed.items() if weights.granularity not in ("auto", *words)]
    if bad:
        choices = "; ".join(f"{m} allows {', '.join(allowed[m])}" for m in dict.fromkeys(bad))
        yield _word(path, "granularity", patch), f"{weights.granularity!r} does not fit: {choices}"
    bad = [m for m, f in formats.items() if not weights.symmetric and f != "int4"]
    if bad:
        yield _word(path, "symmetric", patch), f"only int4 weights can be asymmetric, not those of {', '.join(bad)}"


def _word(path: Path, name: str, patch: WeightsPatch | None) -> Path:
    return ("weights", name) if patch is not None and getattr(patch, name) is None else (*path, name)


def _rule_weights_fit(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """A rule's changes to weights, in every variant it may decide in."""
    for i, rule in enumerate(recipe.rules):
        modes = dict.fromkeys(m.name for v in _variants_of(recipe, rule) if (m := _mode_of(rule, v)))
        if rule.weights is not None:
            weights = Weights().model_copy(update=rule.weights.model_dump(exclude_none=True))
            yield from _misfits(weights, ("rules", i, "weights"), list(modes))


def _variants_of(recipe: Recipe, rule: Rule) -> list[Variant]:
    return [v for v in recipe.modes if rule.variants is None or v.name in rule.variants]


def _mode_of(rule: Rule, variant: Variant) -> Mode | None:
    """The mode a rule gives layers of a variant; None where they stay float."""
    return None if rule.mode == "float" else MODES[rule.mode or variant.mode]


def _rule_variants(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    names = [v.name for v in recipe.modes]
    for i, rule in enumerate(recipe.rules):
        for j, name in enumerate(rule.variants or ()):
            if name not in names:
                yield ("rules", i, "variants", j), unknown("variant", name, names)


def _rule_does_something(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    for i, rule in enumerate(recipe.rules):
        if (rule.mode, rule.weights, rule.activations, rule.method) == (None, None, None, None):
            yield ("rules", i), "decides nothing: give it mode, weights, activations or method"


def _gate_variants(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    names = [v.name for v in recipe.modes]
    for name in recipe.gates.variants:
        if name not in names:
            known = [*type(recipe.gates).model_fields, *names]
            yield ("gates", "variants", name), unknown("gate or variant", name, known)


def _gates_measured(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """A limit on something that the recipe does not measure would never hold or fail."""
    measured: dict[str, tuple[Any, str]] = {
        "perplexity_increase": (recipe.accuracy.perplexity, "accuracy.perplexity is empty"),
        "kl": (recipe.accuracy.divergence, "accuracy.divergence is off"),
        "top1_agreement": (recipe.accuracy.divergence, "accuracy.divergence is off"),
        "choices_drop": (recipe.accuracy.choices, "accuracy.choices is empty"),
        "decode_speedup": (recipe.throughput, "throughput is off"),
        "prefill_speedup": (recipe.throughput, "throughput is off"),
        "parity_top1": (recipe.parity, "parity is off"),
        "parity_kl": (recipe.parity, "parity is off"),
    }
    own: list[tuple[Path, dict[str, float]]] = [
        (("gates", "variants", name), gates.limits()) for name, gates in recipe.gates.variants.items()
    ]
    for path, limits in [(("gates",), recipe.gates.limits()), *own]:
        for gate in limits:
            present, why = measured.get(gate, (True, ""))
            if not present:
                yield (*path, gate), f"cannot be checked: {why}"


def _variant_words_used(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Settings of a variant that its mode has no place for."""
    for i, v in enumerate(recipe.modes):
        mode = MODES[v.mode]
        for name, used in {
            "weights": mode.weights in WEIGHT_FORMATS,
            "activations": mode.activations is not None,
            "cache_kv": mode.quantizes_cache,
        }.items():
            if getattr(v, name) is not None and not used:
                yield ("modes", i, name), f"the mode {v.mode} leaves {_PLAIN[name]} in float"
        if v.cache_kv is not None and mode.quantizes_cache and not mode.calibrates_cache:
            yield ("modes", i, "cache_kv"), f"the mode {v.mode} finds a scale for every token as it is written"


_PLAIN = {"weights": "weights", "activations": "activations", "cache_kv": "the KV cache"}


def _windows(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """A window longer than the text would never be filled."""
    for i, text in enumerate(recipe.accuracy.perplexity):
        if text.context > text.tokens + 1:
            why = f"windows of {text.context} predict more than the {text.tokens} tokens asked for"
            yield ("accuracy", "perplexity", i, "context"), f"{why}. Lower context or raise tokens"


def _baseline_name(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """The report's baseline column has its mode's name."""
    baseline = recipe.accuracy.baseline
    for i, v in enumerate(recipe.modes):
        if v.name == baseline and v.mode != baseline:
            yield ("modes", i, "name"), f"{baseline!r} is the name of the baseline (accuracy.baseline); choose another"


_CHECKS: tuple[tuple[Check, frozenset[str]], ...] = (
    (_weights_fit, frozenset({"modes", "weights"})),
    (_variant_words_used, frozenset({"modes"})),
    (_rule_weights_fit, frozenset({"modes", "rules"})),
    (_rule_variants, frozenset({"modes", "rules"})),
    (_rule_does_something, frozenset({"rules"})),
    (_gate_variants, frozenset({"modes", "gates"})),
    (_gates_measured, frozenset({"gates", "accuracy", "throughput", "parity"})),
    (_baseline_name, frozenset({"modes", "accuracy"})),
    (_windows, frozenset({"accuracy"})),
    (transform_order, frozenset({"modes", "transforms"})),
    (transforms_used, frozenset({"modes", "transforms", "rules"})),
)
