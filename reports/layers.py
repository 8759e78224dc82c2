"""What is known about one linear of one variant: how much noise its rounding adds, and how far its input stands out.

The relative squared error in a scale table hides an outlier problem: one value of 3,537 carries almost all of the
energy of its tensor, so losing everything else costs that ratio little. So a static range is judged by what it leaves
to ordinary values as well: `levels` is how many integer steps lie between zero and the 99.9 percentile of the input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantbench.reports.arrays import ScaleEntry, TapRange, Taps
from quantbench.reports.gather import Run
from quantbench.reports.stages import NORMAL_P999, StageFacts, name_of, sqnr_db, stage_facts

UNIFORM_NOISE_DB = 10 * math.log10(12)  # rounding to a step has noise step²/12 (Bennett 1948)

_TAPS = {
    "attn_in": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "o_in": ("o_proj",),
    "mlp_in": ("gate_proj", "up_proj", "gate_up_proj"),
    "down_in": ("down_proj",),
}
TAP_OF = {linear: tap for tap, linears in _TAPS.items() for linear in linears}
_SMOOTHED = {  # what a smoothing factor is folded into -> the tap that it changes
    "input_layernorm": "attn_in",
    "post_attention_layernorm": "mlp_in",
    "v_proj": "o_in",
    "up_proj": "down_in",
}


@dataclass(frozen=True)
class LayerFacts:
    """None where a number does not apply or was not recorded. SQNR in dB, ranges in the units of the activation."""

    name: str
    block: int | None
    tap: str | None
    weights: str
    weight_sqnr_db: float | None
    activations: str | None  # format of the input; None = float
    dynamic: bool
    input_sqnr_db: float | None
    input_absmax: float | None
    input_p999: float | None
    over_channels: float | None  # absmax / median of the channels' absmax
    over_layers: float | None  # absmax / median of the same tap's absmax over the blocks
    levels: float | None  # static int8: integer steps between 0 and the 99.9 percentile
    typical_sqnr_db: float | None  # SQNR of a value at the 99.9 percentile under uniform rounding, at least 0
    rule: str
    method: str
    group_size: int | None = None
    granularity: str | None = None
    smoothed: bool = False  # its input's channels are divided by factors: smooth, piecewise, awq
    stages: tuple[StageFacts, ...] = ()  # as the model came, behind each transform, as stored

    @property
    def output_sqnr_db(self) -> float | None:
        """Of the outputs, at the last stage."""
        return self.stages[-1].output_sqnr_db if self.stages else None

    @property
    def last_stage(self) -> str:
        """ "after smooth" """
        return name_of(self.stages[-1].after) if self.stages else name_of("")

    @property
    def worst_db(self) -> float | None:
        """The smallest of the SQNRs that apply: what the layers of a variant are ranked by."""
        known = [x for x in (self.weight_sqnr_db, self.input_sqnr_db, self.typical_sqnr_db) if x is not None]
        return min(known) if known else None


def block_of(name: str) -> int | None:
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else None


def tap_of(layer: str) -> str | None:
    return TAP_OF.get(layer.rpartition(".")[2])


def transformed_taps(table: Mapping[str, ScaleEntry]) -> dict[tuple[int, str], ScaleEntry]:
    """(block, tap) -> the transform whose factors that tap was divided by."""
    found = {}
    for entry in table.values():
        block, module = block_of(entry.name), entry.name.rpartition(".")[0].rpartition(".")[2]
        if entry.about.kind == "transform" and block is not None and module in _SMOOTHED:
            found[block, _SMOOTHED[module]] = entry
    return found


def layer_facts(run: Run, variant: str) -> list[LayerFacts]:
    """One record per quantized linear of `variant`, in the order of the plan (of the table where there is no plan)."""
    table = run.scales.get(variant, {})
    names = [name.removesuffix(".weight") for name, entry in table.items() if entry.about.kind == "weight"]
    if run.plan is not None and variant in run.plan.variants:
        planned = run.plan.variants[variant].layers
        names = [name for name in planned if name in names] + [name for name in names if name not in planned]
    context = _Context(run.taps(variant), transformed_taps(table))
    return [_facts(name, run, variant, context) for name in names]


@dataclass(frozen=True)
class _Context:
    taps: Taps
    changed: Mapping[tuple[int, str], ScaleEntry]  # taps whose recorded ranges are not what this variant sees

    def median_absmax(self, tap: str) -> float | None:
        values = [float(block[tap].absmax.max()) for block in self.taps.values() if tap in block]
        return float(np.median(values)) if values else None


def _facts(name: str, run: Run, variant: str, context: _Context) -> LayerFacts:
    table = run.scales[variant]
    weight, given = table[f"{name}.weight"], table.get(f"{name}.input")
    planned = run.plan.variants[variant].layers.get(name) if run.plan and variant in run.plan.variants else None
    block, tap = block_of(name), tap_of(name)
    seen = context.taps.get(block, {}).get(tap) if block is not None and tap is not None else None
    changed = (block, tap) in context.changed
    absmax = _absmax(given, None if changed else seen)
    p999 = None if changed or seen is None or seen.p999 is None else float(seen.p999.max())
    stages = stage_facts(run.stages.get(variant, {}).get(name, ()))
    levels = _levels(given, p999) if p999 is not None else _estimated_levels(stages)
    return LayerFacts(
        name=name,
        block=block,
        tap=tap,
        weights=weight.about.format,
        weight_sqnr_db=sqnr_db(weight.about.loss),
        activations=given.about.format if given else None,
        dynamic=given is not None and given.about.granularity == "token",
        input_sqnr_db=_input_db(given, stages),
        input_absmax=absmax,
        input_p999=p999,
        over_channels=None if seen is None or changed else _ratio(absmax, float(np.median(seen.channel_absmax))),
        over_layers=None if tap is None or changed else _ratio(absmax, context.median_absmax(tap)),
        levels=levels,
        typical_sqnr_db=_typical(levels),
        rule=planned.rule if planned else "default",
        method=planned.method if planned else "rtn",
        group_size=weight.about.group_size,
        granularity=weight.about.granularity,
        smoothed=changed,
        stages=stages,
    )


def _input_db(given: ScaleEntry | None, stages: Sequence[StageFacts]) -> float | None:
    """Of a static scale: by the histogram where one is known, else as the last stage that shows inputs tells it."""
    if given is None or given.about.granularity == "token":
        return None
    if given.about.loss is not None:
        return sqnr_db(given.about.loss)
    return next((s.input_sqnr_db for s in reversed(stages) if s.input_sqnr_db is not None), None)


def _absmax(given: ScaleEntry | None, seen: TapRange | None) -> float | None:
    """What really reached the layer where that was recorded, else the range that was decided."""
    if seen is not None and seen.absmax.size:
        return float(seen.absmax.max())
    return float(given.absmax.max()) if given is not None and given.absmax.size else None


def _levels(given: ScaleEntry | None, p999: float | None) -> float | None:
    static = given is not None and given.about.format == "int8" and given.scale.size == 1
    if given is None or not static or p999 is None or given.scale[0] <= 0:
        return None
    return p999 / float(given.scale[0])


def _estimated_levels(stages: Sequence[StageFacts]) -> float | None:
    """Behind a transform no histogram is known: the median channel, taken as normal, has its 99.9 percentile here."""
    steps = [s.steps for s in stages if s.steps is not None]
    return NORMAL_P999 * steps[-1] if steps else None


def _typical(levels: float | None) -> float | None:
    return None if levels is None else max(0.0, 20 * math.log10(levels) + UNIFORM_NOISE_DB) if levels > 0 else 0.0


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference
