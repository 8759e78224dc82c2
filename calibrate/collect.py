"""One pass of one block over all calibration samples: what was seen at its taps, and the hidden states after it.

    states = HiddenStates.start(forward.embed(tokens.ids), tokens.lengths, work)
    for layer in range(config.num_layers):
        seen, after = collect_block(forward, layer, source.float_block(layer), states)
        save(path_of(layer), seen)      # first the statistics,
        after.commit()                  # then the states: a killed run resumes behind what is saved
        states = after

Statistics are of the float values that reach a tap; a `replace` hook (fake quantization) acts after they are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.calibrate.forward import ALL_TAPS, LINEAR_TAPS, BlockForward, Float, TapHook
from quantbench.calibrate.hidden import HiddenStates
from quantbench.calibrate.observe import observe
from quantbench.calibrate.paddleslim import LiveObserver, live_observer
from quantbench.errors import CalibrationError
from quantbench.infer.models import CACHE_TAPS, block_prefix
from quantbench.scales.arrays import F64
from quantbench.scales.statistics import Statistics, merge, outer_product

_GIANT = 4.0
BATCH_TOKENS = 4096  # tokens per calibration batch unless told otherwise: 8 samples of 512
Observe = Callable[[Float, int, bool], Statistics]


@dataclass(frozen=True)
class Collect:
    """What to record. Taps outside `taps` cost nothing.

    hessian: taps whose sum of x xᵀ is wanted (k and v never); of rows that are `tempered`.
    observers: live observers by name ("paddleslim:hist"), driven batch by batch on every tap.
    factors, shifts: tap -> f32[C]; statistics are of (x - shift) * factor, to observe again behind a transform not
    folded yet.
    batch: samples per calibration batch (one row of `batch_absmax`); None: as many as make 4,096 tokens.
    """

    taps: Collection[str] = ALL_TAPS
    hessian: Collection[str] = ()
    observers: Sequence[str] = ()
    factors: Mapping[str, Float] = field(default_factory=dict)
    shifts: Mapping[str, Float] = field(default_factory=dict)
    batch: int | None = None


class _Batch:
    """The tap hook of one batch: observes it, and lets `replace` act on the values."""

    def __init__(self, block: _Block) -> None:
        self._block = block
        self.seen: dict[str, Statistics] = {}
        self.products: dict[str, Float | F64] = {}  # tap -> sum of x xT
        self.kept: dict[str, Float] = {}  # for live observers, which must see the batches in order

    def __call__(self, tap: str, x: Float) -> Float | None:
        if tap in self._block.options.taps:
            self._observe(tap, x)
        return None if self._block.replace is None else self._block.replace(tap, x)

    def _observe(self, tap: str, x: Float) -> None:
        options = self._block.options
        flat = np.ascontiguousarray(x.reshape(len(x), -1), np.float32)
        if tap in options.shifts:
            flat = flat - options.shifts[tap]
        if tap in options.factors:
            flat = flat * options.factors[tap]
        try:
            self.seen[tap] = observe(flat, self._block.rows(tap))
            if tap in options.hessian:
                self.products[tap] = outer_product(tempered(flat), self.seen[tap].absmax)
        except CalibrationError as error:
            raise CalibrationError(
                *(f"{block_prefix(self._block.layer)} {tap}: {p}" for p in error.problems)
            ) from error
        if options.observers:
            self.kept[tap] = flat.copy()


def tempered(x: Float) -> Float:
    """x [T, C] with rows of more than 4 times the median norm scaled down to that: the Hessian's rows.

    An attention sink's down_proj input is a thousand times the others'. In a plain sum of x xT it alone would decide
    (its square error, and through the mean diagonal the damping), at the cost of every other token.
    """
    norms = np.sqrt(np.einsum("tc,tc->t", x, x, dtype=np.float64))  # cast piece by piece: no float64 copy
    limit = _GIANT * float(np.median(norms))
    if limit == 0 or norms.max() <= limit:
        return x
    shares = (limit / np.maximum(norms, limit)).astype(np.float32)
    tempered_rows: Float = x * shares[:, None]
    return tempered_rows


@dataclass
class _Block:
    """What is known of one block so far: statistics of the batches merged, in order."""

    layer: int
    options: Collect
    replace: TapHook | None
    kv_heads: int
    seen: dict[str, Statistics] = field(default_factory=dict)
    hessians: dict[str, F64] = field(default_factory=dict)  # summed in place: they are several times the activations
    live: dict[tuple[str, str], LiveObserver] = field(default_factory=dict)

    def rows(self, tap: str) -> int:
        return self.kv_heads if tap in CACHE_TAPS else 1

    def add(self, batch: _Batch) -> None:
        for tap, statistics in batch.seen.items():
            self.seen[tap] = merge(self.seen[tap], statistics) if tap in self.seen else statistics
        for tap, product in batch.products.items():
            if tap in self.hessians:
                self.hessians[tap] += product
            else:
                self.hessians[tap] = product.astype(np.float64)
        for tap, values in batch.kept.items():
            for name in self.options.observers:
                if (tap, name) not in self.live:
                    self.live[tap, name] = live_observer(name, self.rows(tap))
                self.live[tap, name].update(values)

    def finish(self) -> dict[str, Statistics]:
        for tap, hessian in self.hessians.items():
            self.seen[tap].hessian = hessian
        for (tap, name), observer in self.live.items():
            self.seen[tap].live[name] = observer.threshold()
        return self.seen


def collect_block(
    forward: BlockForward,
    layer: int,
    weights: Mapping[str, npt.NDArray[Any]],
    hidden: HiddenStates,
    options: Collect | None = None,
    *,
    replace: TapHook | None = None,
    advance: bool = True,
) -> tuple[dict[str, Statistics], HiddenStates]:
    """Statistics per tap of block `layer` on `hidden`, and the states after it, written but not committed.

    `weights` by name within the block (f32). `replace` may replace a tap's values (fake quantization). With
    `advance` False the states after the block are dropped and `hidden` itself is returned: that is a second look.
    Raises CalibrationError for NaN or Inf in a weight or at a tap, naming the block and the tensor or tap.
    """
    options = options or Collect()
    check_finite(layer, weights)
    forward.load(layer, weights)
    block = _Block(layer, options, replace, forward.config.num_kv_heads)
    taps = ALL_TAPS + LINEAR_TAPS if replace is not None else options.taps
    after = hidden.following()

    def run(samples: slice) -> tuple[_Batch, slice, Float]:
        batch = _Batch(block)
        return batch, samples, forward.run(hidden.read(samples), hidden.lengths[samples], batch, taps)

    for batch, samples, out in forward.each(run, hidden.batches(options.batch or BATCH_TOKENS // hidden.shape[1] or 1)):
        block.add(batch)
        if advance:
            after.write(samples.start, out)
    return block.finish(), after if advance else hidden


def advance_block(
    forward: BlockForward,
    layer: int,
    weights: Mapping[str, npt.NDArray[Any]],
    hidden: HiddenStates,
    *,
    replace: TapHook | None = None,
) -> HiddenStates:
    """The states after block `layer`, uncommitted, recording nothing: how a variant's own stream moves on."""
    return collect_block(forward, layer, weights, hidden, Collect(taps=()), replace=replace)[1]


def check_finite(layer: int, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raises CalibrationError listing every tensor of the block that holds NaN or Inf."""
    bad = {name: _count_non_finite(array) for name, array in weights.items()}
    problems = [
        f"{block_prefix(layer)}.{name}: {n} of {weights[name].size} weights are NaN or Inf; the model file is damaged"
        for name, n in bad.items()
        if n
    ]
    if problems:
        raise CalibrationError(*problems)


def _count_non_finite(array: npt.NDArray[Any]) -> int:
    # The sum of finite float32 values is finite in float64, and NaN and Inf survive it: one pass, no temporary.
    with np.errstate(invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return 0
    return int(np.count_nonzero(~np.isfinite(array)))
