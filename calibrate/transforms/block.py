"""One block as a transform finds it, and the registry of transforms: a recipe word and what it decides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quantbench.errors import CalibrationError, RecipeError, unknown
from quantbench.infer.models import LINEARS, ModelConfig, block_prefix
from quantbench.registry import Registry
from quantbench.scales.arrays import F32
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import DEFAULT_TARGETS, SMOOTH_TARGETS, LayerPlan, VariantPlan

Sample = Callable[[Collection[str]], dict[str, F32]]  # taps -> {tap: some rows of it [T, C]}, untransformed


class Reobserve(Protocol):
    """A second look at a block's data: {tap: factors}, {tap: shifts} -> statistics of (x - shift) * factor.

    Of the taps that either names; a tap without a factor or shift keeps its place or size.
    """

    def __call__(self, factors: Mapping[str, F32], shifts: Mapping[str, F32]) -> dict[str, Statistics]: ...


@dataclass(frozen=True)
class Block:
    """One block as calibration found it: weights by name within the block, statistics by tap, both untransformed."""

    layer: int
    weights: Mapping[str, F32]
    statistics: Mapping[str, Statistics]
    variant: VariantPlan
    config: ModelConfig
    sample: Sample | None = None
    look: Reobserve | None = None

    @property
    def prefix(self) -> str:
        return block_prefix(self.layer)

    def plan(self, linear: str) -> LayerPlan | None:
        """The plan of a quantized linear, or None where it stays float."""
        plan = self.variant.layers.get(f"{self.prefix}.{linear}")
        return plan if plan is not None and plan.quantized else None

    def plans(self, tap: str) -> list[LayerPlan]:
        """Those of the quantized linears that read a tap."""
        return [p for line in LINEARS if line.tap == tap and (p := self.plan(line.name))]

    def tap(self, seen: Mapping[str, Statistics], tap: str) -> Statistics:
        """Raises CalibrationError where a tap was not observed."""
        if tap not in seen:
            known = ", ".join(seen) or "none at all"
            raise CalibrationError(f"{self.prefix}: no statistics of tap {tap!r} ({known} known)")
        return seen[tap]


@dataclass(frozen=True)
class Transform:
    """What a recipe word decides: `decide(block, table so far, the word's options)` -> entries for the table.

    targets: the taps it works on unless the recipe says otherwise. needs_hessian: whether it asks for
    the sum of x xT of an input, by the plan of a linear that reads it. last: once all scales are decided.
    """

    decide: Callable[[Block, ScaleTable, Mapping[str, Any]], list[Entry]]
    targets: tuple[str, ...] = DEFAULT_TARGETS
    needs_hessian: Callable[[LayerPlan], bool] = lambda _: False
    last: bool = False


TRANSFORMS: Registry[Transform] = Registry("transform", RecipeError)


def hessian_taps(variant: VariantPlan) -> set[str]:
    """The taps whose Hessians the variant's transforms ask for."""
    found = set()
    for name, options in (item for words in variant.transforms for item in words.items()):
        word = TRANSFORMS[name]
        wanted = (options or {}).get("targets", word.targets)
        lines = [line for line in LINEARS if line.tap in wanted]
        asking = [p for p in variant.layers.values() if p.quantized and word.needs_hessian(p)]
        found |= {line.tap for line in lines for p in asking if p.name.endswith(line.name)}
    return found


def require_known(options: Mapping[str, Any], name: str, known: Collection[str]) -> None:
    """Raises RecipeError listing every option and target that `name` does not know."""
    targets = options.get("targets", DEFAULT_TARGETS)
    problems = [unknown(f"{name} target", str(t), SMOOTH_TARGETS) for t in targets if t not in SMOOTH_TARGETS]
    problems += [unknown(f"{name} option", str(k), known) for k in options if k not in known]
    if problems:
        raise RecipeError(*problems)
