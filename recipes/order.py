"""In which order transforms make sense: one table. Recipes list them in the order in which they are carried out.

A word of a lower step never comes after one of a higher step, and each input gets one word of a kind: what scales its
channels a second time would even out what the first has just chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantbench.recipes.schema import Recipe, Rule, Variant
from quantbench.recipes.source import Path
from quantbench.recipes.transforms import Transform
from quantbench.vocabulary import FLOAT_DTYPES, MODES, Mode


@dataclass(frozen=True)
class Place:
    """Where a word stands. kind: of which an input gets one. needs: what a mode must quantize for the word to act."""

    step: int
    kind: str
    needs: str  # a key of _NEEDS
    why: str  # it comes before words of higher steps


_SCALES = "its factors change the weights and ranges that later words decide on"
ORDER: dict[str, Place] = {
    "rotate": Place(0, "the model is rotated", "weights", "it changes the model that every other word sees"),
    "shift": Place(1, "shifted", "weights", "it moves the ranges that later words even out"),
    "smooth": Place(2, "scaled", "inputs", _SCALES),
    "piecewise": Place(2, "scaled", "inputs", _SCALES),
    "awq": Place(2, "scaled", "weights", _SCALES),
    "kv_smooth": Place(2, "the keys are smoothed", "cache", _SCALES),
    "clip": Place(3, "clipped", "weights", "it decides the ranges of the weights as they then are"),
    "bias_correction": Place(4, "outputs are corrected", "weights", "it takes back what all others leave"),
}
_NEEDS: dict[str, tuple[str, Callable[[Mode], bool]]] = {
    "weights": ("quantizes weights", lambda m: m.weights not in FLOAT_DTYPES),
    "inputs": ("quantizes the inputs of linears", lambda m: m.activations is not None),
    "cache": ("quantizes the KV cache", lambda m: m.quantizes_cache),
}


def transform_order(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Every word that stands where it makes no sense, in the recipe's list and in each variant's own."""
    yield from _misplaced(("transforms",), recipe.transforms)
    for i, v in enumerate(recipe.modes):
        yield from _misplaced(("modes", i, "transforms"), v.transforms or ())


def transforms_used(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """A word that no variant it speaks to has a use for."""
    shared = [v for v in recipe.modes if v.transforms is None]
    yield from _idle(("transforms",), recipe.transforms, shared, recipe.rules)
    for i, v in enumerate(recipe.modes):
        yield from _idle(("modes", i, "transforms"), v.transforms or (), [v], recipe.rules)


def acts_on(word: str, mode: Mode) -> bool:
    """Whether a variant's plan holds the word: where weights stay float, only what is for the KV cache."""
    return mode.weights not in FLOAT_DTYPES or (ORDER[word].needs == "cache" and mode.quantized)


def _misplaced(path: Path, transforms: Sequence[Transform]) -> Iterator[tuple[Path, str]]:
    for i, transform in enumerate(transforms):
        place, before = ORDER[transform.name], list(enumerate(transforms))[:i]
        later = [_named(path, j, t) for j, t in before if ORDER[t.name].step > place.step]
        if later:
            yield (
                (*path, i, transform.name),
                f"{transform.name} belongs before {', '.join(later)}: {place.why}. Move it there",
            )
        alike = [(j, t) for j, t in before if ORDER[t.name].kind == place.kind]
        again = {_named(path, j, t): shared for j, t in alike if (shared := _shared(t, transform)) is not None}
        if again:
            taps = list(dict.fromkeys(tap for shared in again.values() for tap in shared))
            what = f"{', '.join(taps)} {'is' if len(taps) == 1 else 'are'} " if taps else ""
            fix = "give the two different targets, or drop one" if taps else "drop one"
            yield (*path, i, transform.name), f"{what}{place.kind} already by {', '.join(again)}; {fix}"


def _shared(first: Transform, second: Transform) -> list[str] | None:
    """The targets of both, in the order of the second; [] where the words have none; None where they do not meet."""
    if not first.targets or not second.targets:
        return []
    return [tap for tap in second.targets if tap in first.targets] or None


def _named(path: Path, index: int, transform: Transform) -> str:
    return f"{'.'.join(map(str, path))}[{index}] {transform.name}"


def _idle(
    path: Path, transforms: Sequence[Transform], variants: Sequence[Variant], rules: Sequence[Rule]
) -> Iterator[tuple[Path, str]]:
    if not variants or not (modes := [m for v in variants for m in _modes(v, rules)]):
        return
    for i, transform in enumerate(transforms):
        what, acts = _NEEDS[ORDER[transform.name].needs]
        if not any(acts(m) for m in modes):
            names = ", ".join(dict.fromkeys(m.name for m in modes))
            yield (*path, i, transform.name), f"{transform.name} does nothing here: no mode of {names} {what}. Drop it"


def _modes(variant: Variant, rules: Sequence[Rule]) -> list[Mode]:
    """The variant's mode, and those that rules give to some of its layers; none for a float variant."""
    mode = MODES[variant.mode]
    if not mode.quantized:
        return []
    words = [r.mode for r in rules if r.mode and r.mode != "float" and variant.name in (r.variants or [variant.name])]
    return [mode, *(MODES[word] for word in words)]
