"""Decide every scale of one block: transforms first, then weights (behind the transforms), inputs and cache.

What the fused runtime shares is decided once: one input scale per tap of a fused group (q/k/v, gate/up), and per-tensor
FP8 weight scales tied to the largest of the group. Every entry says why it is what it is and what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantbench.calibrate.apply import fold_block, tap_factors, tap_shifts, transformed
from quantbench.calibrate.diagnosis import Behind, Diagnosis
from quantbench.calibrate.transforms import TRANSFORMS, Block, Reobserve, Sample
from quantbench.calibrate.transforms.shift import behind_shift
from quantbench.calibrate.transforms.weight_entries import fused_groups, short, weight_entries
from quantbench.errors import CalibrationError
from quantbench.infer.models import LINEARS, ModelConfig
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight_range import WeightRange, weight_entry, weight_range
from quantbench.scales.arrays import F32
from quantbench.scales.ranges import histogram_loss, range_of
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import LayerPlan, VariantPlan


def choose_block(
    layer: int,
    weights: Mapping[str, F32],
    statistics: dict[str, Statistics],
    variant: VariantPlan,
    config: ModelConfig,
    reobserve: Reobserve | None = None,
    sample: Sample | None = None,
    diagnosis: Diagnosis | None = None,
) -> ScaleTable:
    """The scale table of one block under one variant; empty where nothing of the block is quantized.

    `reobserve` gives the statistics of taps behind transforms; it is called where an observer other than absmax decides
    such a tap, and behind a shift: the moved taps' statistics then replace those in `statistics`, for apply_block.
    `sample` gives rows of taps; only searches and means ask for it. `diagnosis` is told the noise before and behind
    every transform. Raises CalibrationError (NaN, absent statistics, no rows), RecipeError (unknown words).
    """
    block = Block(layer, weights, statistics, variant, config, sample, reobserve)
    table, before = ScaleTable(), ""
    words = [(name, options or {}) for word in variant.transforms for name, options in word.items()]
    for name, options in words:
        if TRANSFORMS[name].last:
            continue
        if diagnosis and name != "rotate":  # the block is turned already: there is nothing before it to tell
            diagnosis(before, block, table)
        for entry in TRANSFORMS[name].decide(block, table, options):
            table.add(entry)
        if name == "shift":
            block = behind_shift(block, table)
            statistics.update(block.statistics)
        before = name
    seen = _observed(block, table, reobserve)
    folded = fold_block(layer, weights, table, config)
    for entry in (
        *(e for e in weight_entries(block, folded, _observed_range) if e.name not in table),
        *_inputs(block, seen),
        *_caches(block, seen),
    ):
        table.add(entry)
    for name, options in words:
        if TRANSFORMS[name].last:
            for entry in TRANSFORMS[name].decide(block, table, options):
                table.add(entry)
    if diagnosis:
        diagnosis(before, block, table, Behind(folded, seen))
    return table


def _observed_range(w: F32, plan: LayerPlan, tap: str) -> WeightRange:
    return weight_range(w, plan)


def _observed(block: Block, table: ScaleTable, reobserve: Reobserve | None) -> dict[str, Statistics]:
    """Statistics behind the transforms: derived where absmax is all that is asked, seen again where it is not."""
    seen = transformed(block.layer, block.statistics, table, block.config)
    factors = tap_factors(block.layer, table, block.config)
    again = {tap: f for tap, f in factors.items() if any(o != "absmax" for o in _observers(block, tap))}
    if not again:
        return seen
    if reobserve is None:
        raise CalibrationError(
            f"{block.prefix}: {', '.join(sorted(again))} must be observed again behind the transforms, because only "
            "the absmax observer follows from what was seen before; use absmax, or allow a second look at the data"
        )
    shifts = {tap: s for tap, s in tap_shifts(block.layer, table, block.config).items() if tap in again}
    return seen | reobserve(again, shifts)


def _observers(block: Block, tap: str) -> set[str]:
    plans = [p for line in LINEARS if line.tap == tap and (p := block.plan(line.name))]
    names = {p.activation_observer for p in plans if p.activations and not p.dynamic}
    if tap in ("k", "v") and block.variant.cache.calibrated:
        names.add(block.variant.cache.observer)
    return names


def _inputs(block: Block, seen: Mapping[str, Statistics]) -> Iterator[Entry]:
    for group in fused_groups():
        plans = [p for line in group if (p := block.plan(line.name)) and p.activations]
        static = [p for p in plans if not p.dynamic]
        shared = input_range(static, block.tap(seen, group[0].tap)) if static else None
        for plan in plans:
            yield dynamic_input(plan) if plan.dynamic or shared is None else static_input(plan, shared, static)


def choose_head(weight: F32, variant: VariantPlan, statistics: Statistics | None = None) -> ScaleTable:
    """The entries of a quantized lm_head [V, D]; empty where the plan leaves it float.

    `statistics` are of its input (the final norm's output), needed for a static input scale: CalibrationError without.
    """
    table = ScaleTable()
    plan = variant.layers.get("lm_head")
    if plan is None or not plan.quantized:
        return table
    table.add(weight_entry(weight, plan))
    if plan.activations and plan.dynamic:
        table.add(dynamic_input(plan))
    elif plan.activations and statistics is not None:
        table.add(static_input(plan, input_range([plan], statistics), [plan]))
    elif plan.activations:
        raise CalibrationError("lm_head: a static input scale needs statistics of its input; use dynamic: true there")
    return table


@dataclass(frozen=True)
class InputRange:
    """The range of one tap as its fused group shares it."""

    absmax: F32  # [1]
    statistics: Statistics


def input_range(plans: Sequence[LayerPlan], seen: Statistics) -> InputRange:
    """One range for all linears that read a tap: the largest of what their observers choose."""
    chosen = [range_of(seen, p.activation_observer, FORMATS[str(p.activations)].qmax) for p in plans]
    return InputRange(np.max(chosen, axis=0).astype(np.float32), seen)


def static_input(plan: LayerPlan, shared: InputRange, group: Sequence[LayerPlan]) -> Entry:
    record = FORMATS[str(plan.activations)]
    note = f", shared by {short(group)}" if len(group) > 1 else ""
    return Entry(
        name=f"{plan.name}.input",
        kind="input",
        format=record.name,
        granularity="tensor",
        scale=record.scale_of(shared.absmax),
        zero=None,
        absmax=shared.absmax,
        group_size=None,
        observer=plan.activation_observer,
        reason=_reason(plan.activation_observer, shared.statistics) + note,
        loss=histogram_loss(shared.statistics, shared.absmax, record.qmax),
    )


def dynamic_input(plan: LayerPlan) -> Entry:
    return _dynamic(f"{plan.name}.input", "input", str(plan.activations), "token")


def _dynamic(name: str, kind: str, format: str, per: str) -> Entry:
    """What has no scale before it is served."""
    empty = np.empty(0, np.float32)
    reason = f"one scale per {per}, taken at run time"
    return Entry(name, kind, format, "token", empty, None, empty, None, "dynamic", reason, None)


def _caches(block: Block, seen: Mapping[str, Statistics]) -> Iterator[Entry]:
    cache = block.variant.cache
    if not cache.quantized:
        return
    record = FORMATS[cache.codes]
    for tap in ("k", "v"):
        if cache.dynamic:
            yield _dynamic(f"{block.prefix}.self_attn.{tap}_cache", "cache", record.name, "token and KV head")
            continue
        statistics = block.tap(seen, tap)
        absmax = range_of(statistics, cache.observer, record.qmax)
        yield Entry(
            name=f"{block.prefix}.self_attn.{tap}_cache",
            kind="cache",
            format=record.name,
            granularity="head",
            scale=record.scale_of(absmax),
            zero=None,
            absmax=absmax,
            group_size=None,
            observer=cache.observer,
            reason=_reason(cache.observer, statistics) + ", one range per KV head",
            loss=histogram_loss(statistics, absmax, record.qmax),
        )


def _reason(observer: str, s: Statistics) -> str:
    batches = "1 batch, " if s.batches == 1 else f"{s.batches} batches, " if s.batches else ""
    return f"{observer} over {batches}{s.tokens} tokens"
