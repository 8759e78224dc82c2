"""The recipe's transforms, decided for one block: each word adds its entries to the scale table.

Mathematics is in quantizers/; here is which input belongs to which linears, and what the search tries on. Every
transform sees the block behind those before it. apply.py folds what is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantbench.calibrate.apply import STORAGE, fold_block, input_factors, tap_factors, transformed
from quantbench.errors import CalibrationError, RecipeError, unknown
from quantbench.infer.models import LINEARS, ModelConfig, block_prefix
from quantbench.infer.models.family import Linear
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.smooth import smooth_factors, storable_factors, tie_heads
from quantbench.quantizers.smooth_search import Found, Pair, search_alpha
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.quantizers.weight_range import weight_entry
from quantbench.registry import Registry
from quantbench.scales.arrays import F32
from quantbench.scales.ranges import range_of
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import DEFAULT_TARGETS, SMOOTH_TARGETS, LayerPlan, VariantPlan

Sample = Callable[[Collection[str]], dict[str, F32]]  # taps -> {tap: some rows of it [T, C]}, untransformed
WEIGHT_ROWS = 512  # outputs of one linear that a search looks at: evenly spaced, quantized per channel alike


@dataclass(frozen=True)
class Block:
    """One block as calibration found it: weights by name within the block, statistics by tap, both untransformed."""

    layer: int
    weights: Mapping[str, F32]
    statistics: Mapping[str, Statistics]
    variant: VariantPlan
    config: ModelConfig
    sample: Sample | None = None

    @property
    def prefix(self) -> str:
        return block_prefix(self.layer)

    def plan(self, linear: str) -> LayerPlan | None:
        """The plan of a quantized linear, or None where it stays float."""
        plan = self.variant.layers.get(f"{self.prefix}.{linear}")
        return plan if plan is not None and plan.quantized else None

    def tap(self, seen: Mapping[str, Statistics], tap: str) -> Statistics:
        """Raises CalibrationError where a tap was not observed."""
        if tap not in seen:
            known = ", ".join(seen) or "none at all"
            raise CalibrationError(f"{self.prefix}: no statistics of tap {tap!r} ({known} known)")
        return seen[tap]


Transform = Callable[[Block, ScaleTable, Mapping[str, Any]], list[Entry]]
TRANSFORMS: Registry[Transform] = Registry("transform", RecipeError)


@dataclass(frozen=True)
class _Target:
    """One tap whose channels are to be divided by factors, behind the transforms decided so far."""

    block: Block
    tap: str
    weights: Mapping[str, F32]  # of the whole block, folded
    seen: Statistics
    factors: F32  # [K] by which the tap is multiplied already

    @classmethod
    def of(cls, block: Block, tap: str, decided: ScaleTable) -> _Target:
        seen = transformed(block.layer, block.statistics, decided, block.config)
        before = tap_factors(block.layer, decided, block.config)
        weights = fold_block(block.layer, block.weights, decided, block.config)
        found = block.tap(seen, tap)
        return cls(block, tap, weights, found, before.get(tap, np.ones(found.channels, np.float32)))

    @property
    def lines(self) -> list[Linear]:
        return [line for line in LINEARS if line.tap == self.tap]

    @property
    def source(self) -> str:
        return self.lines[0].source

    def factors_at(self, alpha: float) -> F32:
        """SmoothQuant's factors as the source can carry them: tied over query heads, exact in a stored norm."""
        config = self.block.config
        act = self.seen.channel_absmax
        columns = np.max([np.abs(self.weights[f"{line.name}.weight"]).max(axis=0) for line in self.lines], axis=0)
        if self.source == "self_attn.v_proj":
            act, columns = (tie_heads(a, config.num_kv_heads, config.head_dim) for a in (act, columns))
        return self.storable(smooth_factors(act, columns, alpha))

    def storable(self, factors: F32) -> F32:
        source = self.weights[f"{self.source}.weight"]
        dtype = STORAGE[self.block.variant.dtype]
        return storable_factors(source, factors, dtype) if source.ndim == 1 else factors

    def expanded(self, factors: F32) -> F32:
        """The source's factors for every input channel."""
        return input_factors(self.source, factors, self.block.config)

    def pair(self) -> Pair:
        """What a search tries candidates on. Raises CalibrationError where no rows can be had."""
        if self.block.sample is None:
            raise CalibrationError(
                f"{self.block.prefix}: a search tries its candidates on rows of {self.tap}, and there is no model to "
                "run: use --from collect, or a fixed alpha"
            )
        plans = [(self.block.plan(line.name), self.weights[f"{line.name}.weight"]) for line in self.lines]
        some = [(p, np.ascontiguousarray(w[:: -(-len(w) // WEIGHT_ROWS)])) for p, w in plans if p is not None]

        def round_weight(i: int, w: F32) -> F32:
            return dequantize_weight(quantize_weight(w, weight_entry(w, some[i][0])))

        return Pair(
            inputs=self.block.sample([self.tap])[self.tap] * self.factors,
            absmax=self.seen.channel_absmax,
            weights=tuple(w for _, w in some),
            round_input=_rounding([p for p, _ in some]),
            round_weight=round_weight,
        )


def _rounding(plans: Sequence[LayerPlan]) -> Callable[[F32, F32], F32]:
    """How the input of a fused group is quantized, tried on sampled rows."""
    plan = next(p for p in plans if p.activations)
    record = FORMATS[str(plan.activations)]

    def round_input(x: F32, absmax: F32) -> F32:
        if plan.dynamic:
            codes, scale = quantize_activation(x, record.name, None)
            return record.decode(codes, scale[:, None])
        top = absmax.max(keepdims=True)
        if plan.activation_observer != "absmax" and ":" not in plan.activation_observer:
            top = range_of(observe(x), plan.activation_observer, record.qmax)  # of the sample: all that is at hand
        codes, scale = quantize_activation(x, record.name, float(record.scale_of(top)[0]))
        return record.decode(codes, scale)

    return round_input


def _targets(block: Block, wanted: Collection[str]) -> list[str]:
    """Those of the wanted taps whose linears have quantized inputs, in the order of the block."""
    return [
        tap
        for tap in SMOOTH_TARGETS
        if tap in wanted and any((p := block.plan(line.name)) and p.activations for line in LINEARS if line.tap == tap)
    ]


@TRANSFORMS.register("smooth")
def smooth(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """SmoothQuant factors of every target whose linears have quantized inputs; quantizers/smooth.py has the formula.

    options: alpha (0.5; "search": quantizers/smooth_search.py), targets (default attn_in, mlp_in, down_in).
    """
    targets = options.get("targets", DEFAULT_TARGETS)
    problems = [unknown("smooth target", str(t), SMOOTH_TARGETS) for t in targets if t not in SMOOTH_TARGETS]
    problems += [
        unknown("smooth option", str(k), ("alpha", "targets")) for k in options if k not in ("alpha", "targets")
    ]
    if problems:
        raise RecipeError(*problems)
    decided = ScaleTable.merge(table)
    for tap in _targets(block, targets):
        decided.add(_smooth_entry(_Target.of(block, tap, decided), options.get("alpha", 0.5)))
    return [entry for entry in decided if entry.name not in table]


def _smooth_entry(target: _Target, alpha: float | str) -> Entry:
    behind = ", ".join(line.name.split(".")[-1] for line in target.lines)
    if alpha != "search":
        why = f"SmoothQuant alpha {float(alpha):g} between the input and the weights of {behind}"
        return _entry(target, target.factors_at(float(alpha)), "smooth", why)
    found = search_alpha(target.pair(), lambda a: target.expanded(target.factors_at(a)))
    if found.alpha is None:
        ones = np.ones(target.weights[f"{target.source}.weight"].shape[0], np.float32)
        return _entry(target, ones, "smooth", f"no alpha lowers the output error of {behind} ({found.plain:.3g})")
    return _entry(target, target.factors_at(found.alpha), "smooth", _told(found, behind))


def _told(found: Found, behind: str) -> str:
    return (
        f"SmoothQuant alpha {found.alpha:g}, searched: relative output error of {behind} {found.loss:.3g}, "
        f"{found.plain:.3g} without"
    )


def _entry(target: _Target, factors: F32, observer: str, reason: str) -> Entry:
    act = target.seen.channel_absmax
    if target.source == "self_attn.v_proj":
        act = tie_heads(act, target.block.config.num_kv_heads, target.block.config.head_dim)
    return Entry(
        name=f"{target.block.prefix}.{target.source}.smooth",
        kind="transform",
        format="float32",
        granularity="channel",
        scale=factors,
        zero=None,
        absmax=act,
        group_size=None,
        observer=observer,
        reason=reason,
        loss=None,
    )
