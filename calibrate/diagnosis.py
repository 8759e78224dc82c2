"""How much noise quantizing adds to every linear of a block: as the model came, behind each transform, as stored.

    weight   |W - Q|^2 / |W|^2
    input    E|x - x'|^2 / E|x|^2        of a static scale by the histogram, else rounding under the range there is
    output   E|dW x|^2 / E|W x|^2 + input: by the Hessian where it was collected, else by the channels' second moments
    steps    static int8: the root mean square of the median channel in steps of the scale. Two energies cannot see an
             outlier problem (one value of several thousand carries nearly all of the energy); this can
    beyond   the share of the values that lie outside the range and are clipped

Weights are judged by 32 evenly spaced outputs of each linear: a stage costs a few milliseconds a block. Inputs behind a
transform are those that calibration saw times the transform's factors.

    diagnosis.json: {"layers": {linear: [{"after": "" | word | "stored", "weight", "output", "input", "steps",
                                          "weight_beyond", "input_beyond"}]}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantbench.calibrate.apply import fold_block, tap_factors
from quantbench.calibrate.sensitivity import input_noise, output_energy, second_moments
from quantbench.calibrate.transforms import Block
from quantbench.calibrate.transforms.weight_entries import fused_groups
from quantbench.infer.models.family import Linear
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight import QuantizedWeight, dequantize_weight, expand, quantize_weight
from quantbench.quantizers.weight_range import weight_entry
from quantbench.scales.arrays import F32, F64
from quantbench.scales.ranges import histogram_loss, range_of
from quantbench.scales.statistics import Statistics
from quantbench.scales.table import Entry, ScaleTable, write_atomically
from quantbench.vocabulary import LayerPlan

FILE = "diagnosis.json"
ROWS = 32
STORED = "stored"
_BEYOND = 0.501  # steps: rounding alone is never off by more than half of one


@dataclass(frozen=True)
class Noise:
    """One linear at one stage; see the module. None: a float input, or no histogram to tell by."""

    after: str
    weight: float
    output: float
    input: float | None
    steps: float | None
    weight_beyond: float
    input_beyond: float | None


@dataclass(frozen=True)
class Behind:
    """What is known once all scales are decided: the folded weights, and the statistics behind the transforms."""

    folded: Mapping[str, F32]
    seen: Mapping[str, Statistics]


class Stored(Protocol):
    """A checkpoint's weight by full name."""

    def __call__(self, name: str, /) -> Any: ...


@dataclass
class Diagnosis:
    """Collects the stages of one block of one variant; `choose_block` calls it."""

    layers: dict[str, list[Noise]] = field(default_factory=dict)
    _moments: dict[str, tuple[Statistics, F64]] = field(default_factory=dict)  # of what: a shift replaces statistics

    def __call__(self, after: str, block: Block, table: ScaleTable, behind: Behind | None = None) -> None:
        """The stage behind the word `after` ("" before any). `table`: what is decided; `behind`: at the last stage."""
        folded = behind.folded if behind else fold_block(block.layer, block.weights, table, block.config)
        self._stage(after, _Stage(block, table, folded, behind.seen if behind else {}))

    def stored(self, block: Block, table: ScaleTable, weight_of: Stored) -> None:
        """The codes that a method found, as the checkpoint holds them; `weight_of`: full name -> QuantizedWeight."""
        folded = fold_block(block.layer, block.weights, table, block.config)
        self._stage(STORED, _Stage(block, table, folded, {}, weight_of))

    def _stage(self, after: str, stage: _Stage) -> None:
        factors = tap_factors(stage.block.layer, stage.table, stage.block.config)
        for group in fused_groups():
            tap = group[0].tap
            if tap not in stage.block.statistics or not any(stage.block.plan(line.name) for line in group):
                continue
            seen = stage.block.statistics[tap]
            if tap not in self._moments or self._moments[tap][0] is not seen:
                self._moments[tap] = seen, second_moments(seen)
            factor = factors.get(tap, np.ones(1, np.float32))
            for name, noise in _group_noise(stage, group, _Input(tap, factor, self._moments[tap][1]), after):
                self.layers.setdefault(name, []).append(noise)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        layers = {name: [asdict(n) for n in stages] for name, stages in self.layers.items()}
        write_atomically(folder / FILE, json.dumps({"layers": layers}, indent=1).encode())


def merge_files(folders: Iterable[Path], target: Path) -> None:
    """One file of several blocks' files; nothing where none of them was diagnosed."""
    layers: dict[str, Any] = {}
    for folder in folders:
        if (folder / FILE).exists():
            layers |= json.loads((folder / FILE).read_text(encoding="utf-8"))["layers"]
    if layers:
        write_atomically(target / FILE, json.dumps({"layers": layers}, indent=1).encode())


@dataclass(frozen=True)
class _Stage:
    block: Block
    table: ScaleTable
    folded: Mapping[str, F32]
    seen: Mapping[str, Statistics]
    stored: Stored | None = None


@dataclass(frozen=True)
class _Input:
    """A tap as calibration saw it, and the factors [C] or [1] that the transforms so far multiply it by."""

    tap: str
    factor: F32
    moments: F64

    @property
    def behind(self) -> F64:
        return np.asarray(self.moments * np.square(self.factor, dtype=np.float64))


def _group_noise(stage: _Stage, group: list[Linear], x: _Input, after: str) -> list[tuple[str, Noise]]:
    seen, found = stage.block.statistics[x.tap], []
    lines = [(line, plan) for line in group if (plan := stage.block.plan(line.name))]
    scale = _input_scale(stage, [p for _, p in lines], x)
    for line, plan in lines:
        w, q, beyond = _rounded(stage, plan, stage.folded[f"{line.name}.weight"])
        noise = _input_loss(stage, plan, x, scale)
        wide = x.factor if seen.hessian is not None else np.ones(1, np.float32)  # the Hessian is of the plain input
        moments = x.behind if seen.hessian is None else x.moments
        of_weights = output_energy((w - q) * wide, moments, seen.hessian)
        signal = output_energy(w * wide, moments, seen.hessian)
        steps = None if scale is None or plan.activations != "int8" else float(np.sqrt(np.median(x.behind))) / scale
        energy = float(np.square(w, dtype=np.float64).sum())
        record = Noise(
            after=after,
            weight=float(np.square(w - q, dtype=np.float64).sum()) / energy if energy else 0.0,
            output=(of_weights / signal if signal else 0.0) + (noise or 0.0),
            input=noise,
            steps=steps,
            weight_beyond=beyond,
            input_beyond=_input_beyond(stage, plan, x, scale),
        )
        found.append((plan.name, record))
    return found


def _rounded(stage: _Stage, plan: LayerPlan, w: F32) -> tuple[F32, F32, float]:
    """Some rows of a weight, what they become, and the share of them beyond the range."""
    step = max(1, len(w) // ROWS) if plan.granularity != "block" else 1
    some = np.ascontiguousarray(w[::step])
    name = f"{plan.name}.weight"
    entry = _of_rows(stage.table[name], len(w), step) if name in stage.table else weight_entry(some, plan)
    nearest = quantize_weight(some, entry)
    width = expand(entry.scale, entry.granularity, (some.shape[0], some.shape[1]), entry.group_size)
    back = dequantize_weight(nearest)
    beyond = 0.0 if entry.format == "fp8_e4m3" else float((np.abs(some - back) > _BEYOND * width).mean())
    if stage.stored is not None and isinstance(held := stage.stored(plan.name), QuantizedWeight):
        back = dequantize_weight(replace(nearest, codes=held.codes[::step]))
    return some, back, beyond


def _of_rows(entry: Entry, rows: int, step: int) -> Entry:
    """An entry of a weight with `rows` outputs for every `step`-th of them."""
    if step == 1 or len(entry.scale) != rows:
        return entry
    zero = None if entry.zero is None else entry.zero[::step]
    return replace(entry, scale=entry.scale[::step], zero=zero, absmax=entry.absmax[::step])


def _input_scale(stage: _Stage, plans: list[LayerPlan], x: _Input) -> float | None:
    """The static scale that a group's input has or would have; None where there is none."""
    static = [p for p in plans if p.activations and not p.dynamic]
    if not static:
        return None
    if (name := f"{static[0].name}.input") in stage.table:
        return float(stage.table[name].scale[0])
    seen, record = stage.block.statistics[x.tap], FORMATS[str(static[0].activations)]
    if x.factor.size == 1:
        absmax = np.max([range_of(seen, p.activation_observer, record.qmax) for p in static], axis=0)
    else:
        absmax = (seen.channel_absmax * x.factor).max(keepdims=True)
    return float(record.scale_of(np.asarray(absmax, np.float32))[0])


def _input_loss(stage: _Stage, plan: LayerPlan, x: _Input, scale: float | None) -> float | None:
    if plan.activations is None:
        return None
    name = f"{plan.name}.input"
    if name in stage.table and stage.table[name].loss is not None:
        return stage.table[name].loss
    if scale is not None and x.factor.size == 1:
        qmax = FORMATS[plan.activations].qmax
        known = histogram_loss(stage.block.statistics[x.tap], np.array([scale * qmax], np.float32), qmax)
        if known is not None:
            return known
    return input_noise(plan.activations, scale, x.behind)


def _input_beyond(stage: _Stage, plan: LayerPlan, x: _Input, scale: float | None) -> float | None:
    """Share of the input's values above a static range, by whole bins of the histogram."""
    seen = stage.seen.get(x.tap) or (stage.block.statistics[x.tap] if x.factor.size == 1 else None)
    if scale is None or plan.activations is None or seen is None or seen.histogram is None or not seen.limit[0]:
        return None
    first = int(np.ceil(scale * FORMATS[plan.activations].qmax / float(seen.limit[0]) * seen.histogram.shape[1]))
    return float(seen.histogram[0, first:].sum() / max(int(seen.histogram[0].sum()), 1))
