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
from quantbench.quantizers.piecewise import Channels, PieceGrid, search_pieces
from quantbench.quantizers.smooth import storable_factors, tie_heads
from quantbench.quantizers.smooth_search import Pair, search_alpha
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

    def channels(self) -> Channels:
        """What is divided, as the source carries it: tied over query heads, exact in a stored norm."""
        config = self.block.config
        act = self.seen.channel_absmax
        columns = np.max([np.abs(self.weights[f"{line.name}.weight"]).max(axis=0) for line in self.lines], axis=0)
        if self.source == "self_attn.v_proj":
            act, columns = (tie_heads(a, config.num_kv_heads, config.head_dim) for a in (act, columns))
        return Channels(act, columns, self.storable, self.expanded)

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
    _require(options, "smooth", ("alpha", "targets"))
    decided = ScaleTable.merge(table)
    for tap in _targets(block, options.get("targets", DEFAULT_TARGETS)):
        decided.add(_smooth_entry(_Target.of(block, tap, decided), options.get("alpha", 0.5)))
    return [entry for entry in decided if entry.name not in table]


def _smooth_entry(target: _Target, alpha: float | str) -> Entry:
    channels, behind = target.channels(), _behind(target)
    if alpha != "search":
        why = f"SmoothQuant alpha {float(alpha):g} between the input and the weights of {behind}"
        return _entry(target, channels, channels.factors(float(alpha)), why)
    found = search_alpha(target.pair(), lambda a: channels.spread(channels.factors(a)))
    if found.alpha is None:
        why = f"no alpha lowers the output error of {behind} ({found.plain:.3g})"
        return _entry(target, channels, np.ones_like(channels.act), why)
    why = f"SmoothQuant alpha {found.alpha:g}, searched: {_errors(found.loss, found.plain, behind)}"
    return _entry(target, channels, channels.factors(found.alpha), why)


@TRANSFORMS.register("piecewise")
def piecewise(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """Factors searched for clusters of channels: quantizers/piecewise.py.

    options: pieces (3), alpha ([0.2, 0.8]), scale ([1, 5]), targets (default attn_in, mlp_in, down_in).
    """
    _require(options, "piecewise", ("pieces", "alpha", "scale", "targets"))
    low, high = options.get("alpha", (0.2, 0.8))
    least, most = options.get("scale", (1.0, 5.0))
    grid = PieceGrid(int(options.get("pieces", 3)), (low, high), (least, most))
    decided = ScaleTable.merge(table)
    for tap in _targets(block, options.get("targets", DEFAULT_TARGETS)):
        target = _Target.of(block, tap, decided)
        channels = target.channels()
        found = search_pieces(target.pair(), channels, grid)
        why = f"piecewise ({'; '.join(found.words)}): {_errors(found.loss, found.plain, _behind(target))}"
        decided.add(_entry(target, channels, found.factors, why))
    return [entry for entry in decided if entry.name not in table]


def _require(options: Mapping[str, Any], name: str, known: Collection[str]) -> None:
    """Raises RecipeError listing every option and target that `name` does not know."""
    targets = options.get("targets", DEFAULT_TARGETS)
    problems = [unknown(f"{name} target", str(t), SMOOTH_TARGETS) for t in targets if t not in SMOOTH_TARGETS]
    problems += [unknown(f"{name} option", str(k), known) for k in options if k not in known]
    if problems:
        raise RecipeError(*problems)


def _behind(target: _Target) -> str:
    return ", ".join(line.name.split(".")[-1] for line in target.lines)


def _errors(loss: float, plain: float, behind: str) -> str:
    return f"relative output error of {behind} {loss:.3g}, {plain:.3g} without"


def _entry(target: _Target, channels: Channels, factors: F32, reason: str) -> Entry:
    return Entry(
        name=f"{target.block.prefix}.{target.source}.smooth",
        kind="transform",
        format="float32",
        granularity="channel",
        scale=factors,
        zero=None,
        absmax=channels.act,
        group_size=None,
        observer="smooth",
        reason=reason,
        loss=None,
    )
