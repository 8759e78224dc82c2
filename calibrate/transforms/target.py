"""One tap whose channels are to be scaled: what it holds, what can carry the factors, and what a search tries on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantbench.calibrate.apply import STORAGE, fold_block, input_factors, tap_factors, transformed
from quantbench.calibrate.transforms.block import Block
from quantbench.errors import CalibrationError
from quantbench.infer.models import LINEARS
from quantbench.infer.models.family import Linear
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.piecewise import Channels
from quantbench.quantizers.smooth import storable_factors, tie_heads
from quantbench.quantizers.smooth_search import Pair
from quantbench.quantizers.weight import dequantize_weight, quantize_weight
from quantbench.quantizers.weight_range import weight_entry
from quantbench.scales.arrays import F32
from quantbench.scales.ranges import range_of
from quantbench.scales.statistics import Statistics, observe
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import SMOOTH_TARGETS, LayerPlan

WEIGHT_ROWS = 512  # outputs of one linear that a search looks at: evenly spaced, quantized per channel alike


@dataclass(frozen=True)
class Target:
    """One tap whose channels are to be divided by factors, behind the transforms decided so far."""

    block: Block
    tap: str
    weights: Mapping[str, F32]  # of the whole block, folded
    seen: Statistics
    factors: F32  # [K] by which the tap is multiplied already

    @classmethod
    def of(cls, block: Block, tap: str, decided: ScaleTable) -> Target:
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
        act = self.carried(self.seen.channel_absmax)
        columns = np.max([np.abs(self.weights[f"{line.name}.weight"]).max(axis=0) for line in self.lines], axis=0)
        return Channels(act, self.carried(columns), self.storable, self.expanded)

    def carried(self, values: F32) -> F32:
        """One value per channel of the source from one per input channel: the largest where heads share a KV head."""
        config = self.block.config
        tied = self.source == "self_attn.v_proj"
        return tie_heads(values, config.num_kv_heads, config.head_dim) if tied else values

    def quantized(self) -> list[tuple[LayerPlan, F32]]:
        """Plan and weight [N, K] of every quantized linear that reads the tap."""
        plans = [(self.block.plan(line.name), self.weights[f"{line.name}.weight"]) for line in self.lines]
        return [(p, w) for p, w in plans if p is not None]

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
        some = [(p, np.ascontiguousarray(w[:: -(-len(w) // WEIGHT_ROWS)])) for p, w in self.quantized()]

        def round_weight(i: int, w: F32) -> F32:
            return dequantize_weight(quantize_weight(w, weight_entry(w, some[i][0])))

        return Pair(
            inputs=self.block.sample([self.tap])[self.tap] * self.factors,
            absmax=self.seen.channel_absmax,
            weights=tuple(w for _, w in some),
            round_input=rounding([p for p, _ in some]),
            round_weight=round_weight,
        )


def rounding(plans: Sequence[LayerPlan]) -> Callable[[F32, F32], F32]:
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


def quantized_taps(block: Block, wanted: Collection[str]) -> list[str]:
    """Those of the wanted taps whose linears have quantized inputs, in the order of the block."""
    return [tap for tap in weight_taps(block, wanted) if any(p.activations for p in block.plans(tap))]


def weight_taps(block: Block, wanted: Collection[str]) -> list[str]:
    """Those of the wanted taps that quantized linears read, in the order of the block."""
    return [tap for tap in SMOOTH_TARGETS if tap in wanted and block.plans(tap)]


def readers(target: Target) -> str:
    return ", ".join(line.name.split(".")[-1] for line in target.lines)


def told(loss: float, plain: float, behind: str) -> str:
    return f"relative output error of {behind} {loss:.3g}, {plain:.3g} without"


def smooth_entry(target: Target, factors: F32, reason: str, observer: str = "smooth") -> Entry:
    """The entry that says what the target's source is divided by; `observer`: the word that found it."""
    return Entry(
        name=f"{target.block.prefix}.{target.source}.smooth",
        kind="transform",
        format="float32",
        granularity="channel",
        scale=factors,
        zero=None,
        absmax=target.carried(target.seen.channel_absmax),
        group_size=None,
        observer=observer,
        reason=reason,
        loss=None,
    )
