"""What calibration saw at one tap, small enough to keep and exact to merge.

Counts, minima, maxima and absolute maxima of two merged halves equal those of one pass bit for bit, whatever the split,
because the histogram's limit is a power of two *above* the largest |x|: doubling the limit adds neighbouring bins.
Sums are float64, added token by token inside a batch and batch by batch in order. `observe` is the reference that the
native kernel equals.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantbench.errors import CalibrationError
from quantbench.scales.arrays import F32, F64, I64, Array
from quantbench.scales.table import replacing

BINS = 2048
_SMALLEST_LIMIT = np.float32(2.0**-100)  # keeps the bin width far from the subnormal numbers
_LARGEST_ABSMAX = np.float32(2.0**127)  # the power of two above it is not a float32


@dataclass
class Statistics:
    """One tap: R rows (1 for a linear's input, kv_heads for k and v), each of C/R neighbouring channels."""

    tokens: int
    minimum: F32  # [R]
    maximum: F32  # [R]
    absmax: F32  # [R]
    batch_absmax: F32  # [batches, R] in batch order: avg and ema need the sequence
    histogram: I64 | None  # [R, 2048] counts of |x|, bin width limit/2048; None where it was derived, not observed
    limit: F32  # [R] a power of two above absmax; 0 while every value was 0 (then all counts are in bin 0)
    channel_absmax: F32  # [C]
    channel_sum: F64  # [C]
    hessian: F64 | None = None  # [C, C] sum of x xT
    live: dict[str, F32] = field(default_factory=dict)  # name of a live observer -> its threshold [R]

    @property
    def rows(self) -> int:
        return self.absmax.size

    @property
    def channels(self) -> int:
        return self.channel_absmax.size

    @property
    def batches(self) -> int:
        return len(self.batch_absmax)


def observe(x: F32, rows: int = 1, hessian: bool = False) -> Statistics:
    """Statistics of one batch x [T, C] (or [T, R, C/R]), float32, padding already removed.

    `rows` splits the channels into R equal neighbouring parts with a range each (KV heads). `hessian` adds x xT:
    float32 products of one batch, summed over batches in float64. Raises CalibrationError for NaN, Inf, |x| >= 2**127,
    no token, or channels that `rows` does not divide.
    """
    x = _checked(x, rows)
    magnitude = np.abs(x)
    channel_absmax = magnitude.max(axis=0)
    by_row = x.reshape(len(x), rows, -1)
    absmax = channel_absmax.reshape(rows, -1).max(axis=1)
    limit = limit_of(absmax)
    return Statistics(
        tokens=len(x),
        minimum=by_row.min(axis=(0, 2)),
        maximum=by_row.max(axis=(0, 2)),
        absmax=absmax,
        batch_absmax=absmax[None, :].copy(),
        histogram=_histogram(magnitude.reshape(len(x), rows, -1), limit),
        limit=limit,
        channel_absmax=channel_absmax,
        channel_sum=np.add.reduce(x, axis=0, dtype=np.float64),
        hessian=outer_product(x, absmax).astype(np.float64) if hessian else None,
    )


def limit_of(absmax: F32) -> F32:
    """The smallest power of two strictly above absmax (at least 2**-100); 0 where absmax is 0."""
    exponent = np.frexp(absmax)[1]
    limit = np.maximum(np.ldexp(np.float32(1), exponent), _SMALLEST_LIMIT)
    return np.where(absmax > 0, limit, 0).astype(np.float32)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of a's batches followed by b's. Raises CalibrationError if they are not of the same tap.

    A histogram or Hessian survives only if both have it. Live thresholds cannot be merged: they must be equal.
    """
    if (a.rows, a.channels) != (b.rows, b.channels):
        raise CalibrationError(
            f"cannot merge statistics of {a.rows} rows x {a.channels} channels with {b.rows} x {b.channels}: "
            "they are not of the same tap"
        )
    _require_equal_live(a, b)
    limit = np.maximum(a.limit, b.limit)
    histogram = None
    if a.histogram is not None and b.histogram is not None:
        histogram = rebin(a.histogram, a.limit, limit) + rebin(b.histogram, b.limit, limit)
    return Statistics(
        tokens=a.tokens + b.tokens,
        minimum=np.minimum(a.minimum, b.minimum),
        maximum=np.maximum(a.maximum, b.maximum),
        absmax=np.maximum(a.absmax, b.absmax),
        batch_absmax=np.concatenate([a.batch_absmax, b.batch_absmax]),
        histogram=histogram,
        limit=limit,
        channel_absmax=np.maximum(a.channel_absmax, b.channel_absmax),
        channel_sum=a.channel_sum + b.channel_sum,
        hessian=None if a.hessian is None or b.hessian is None else a.hessian + b.hessian,
        live=dict(a.live),
    )


def rebin(histogram: I64, limit: F32, wider: F32) -> I64:
    """The same counts [R, 2048] under limits `wider` >= `limit`, both powers of two (or 0): exact."""
    result = histogram.copy()
    for row in range(len(histogram)):
        if limit[row] == 0 or wider[row] == limit[row]:
            continue  # all zeros: bin 0 stays bin 0
        shift = int(np.frexp(wider[row])[1] - np.frexp(limit[row])[1])
        result[row] = np.bincount(np.arange(BINS) >> min(shift, 62), histogram[row], BINS).astype(np.int64)
    return result


def scaled(s: Statistics, factor: F32) -> Statistics:
    """Statistics of x * factor, factor f32[C] positive, as far as they follow from those of x.

    Exact: tokens, absmax, channel_absmax, channel_sum, hessian (up to the last rounding). Only bounds: minimum, maximum
    (set to -absmax, absmax). Unknown, and so dropped: histogram, batch_absmax (no rows), live.
    """
    if factor.shape != (s.channels,):
        raise CalibrationError(f"factors have shape {factor.shape}, the statistics have {s.channels} channels")
    wide = factor.astype(np.float64)
    channel_absmax = (s.channel_absmax * factor).astype(np.float32)
    absmax = channel_absmax.reshape(s.rows, -1).max(axis=1)
    hessian = None if s.hessian is None else s.hessian * wide[:, None]
    if hessian is not None:
        hessian *= wide
    return dataclasses.replace(
        s,
        minimum=-absmax,
        maximum=absmax,
        absmax=absmax,
        batch_absmax=np.empty((0, s.rows), np.float32),
        histogram=None,
        limit=limit_of(absmax),
        channel_absmax=channel_absmax,
        channel_sum=s.channel_sum * wide,
        hessian=hessian,
        live={},
    )


def outer_product(x: F32, absmax: F32) -> F32 | F64:
    """Sum over the tokens of x [T, C] of x xT: [C, C] in float32, in float64 where a float32 sum could overflow."""
    wide = x.astype(np.float64) if absmax.max() >= 2.0**50 else x
    return wide.T @ wide


def save(path: Path, taps: dict[str, Statistics]) -> None:
    """All taps of one block in one safetensors file, written atomically; the same statistics give the same bytes."""
    arrays: dict[str, Array] = {}
    for tap, s in taps.items():
        arrays[f"{tap}/tokens"] = np.array([s.tokens], np.int64)
        for name in _ARRAYS:
            value = getattr(s, name)
            if value is not None:
                arrays[f"{tap}/{name}"] = np.ascontiguousarray(value)
        arrays |= {f"{tap}/live/{name}": np.ascontiguousarray(value) for name, value in s.live.items()}
    order = json.dumps(list(taps))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:  # to the file: Hessians in bytes, whole, would be another copy of them
        save_file(arrays, temporary, metadata={"taps": order})


def load(path: Path) -> dict[str, Statistics]:
    """Reads what `save` wrote, taps in the same order. Raises CalibrationError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            taps: list[str] = json.loads(file.metadata()["taps"])
        return {tap: _tap(tap, arrays) for tap in taps}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CalibrationError(f"{path}: statistics cannot be read ({error!r}); collect this block again") from error


_ARRAYS = (
    "minimum",
    "maximum",
    "absmax",
    "batch_absmax",
    "histogram",
    "limit",
    "channel_absmax",
    "channel_sum",
    "hessian",
)
_OPTIONAL = ("histogram", "hessian")


def _tap(tap: str, arrays: dict[str, Array]) -> Statistics:
    values = {n: arrays.get(f"{tap}/{n}") if n in _OPTIONAL else arrays[f"{tap}/{n}"] for n in _ARRAYS}
    prefix = f"{tap}/live/"
    live = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    return Statistics(tokens=int(arrays[f"{tap}/tokens"][0]), live=live, **values)  # type: ignore[arg-type]


def _checked(x: F32, rows: int) -> F32:
    if x.size == 0 or (x.size // len(x)) % rows:
        raise CalibrationError(
            f"cannot observe an array of shape {x.shape} in {rows} rows: no values, or not divisible"
        )
    flat = np.ascontiguousarray(x, np.float32).reshape(len(x), -1)
    peak = np.abs(flat).max()  # NaN propagates
    if not np.isfinite(peak):
        bad = ~np.isfinite(flat)
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CalibrationError(
            f"an activation is NaN or Inf: {int(bad.sum())} of {flat.size} values, "
            f"first at token {first[0]} channel {first[1]}; check the model's weights, or calibrate in float32"
        )
    if peak >= _LARGEST_ABSMAX:
        raise CalibrationError(f"an activation of magnitude {peak:.3g} is too large to be calibrated (limit 2**127)")
    return flat


def _histogram(magnitude: F32, limit: F32) -> I64:
    """Counts [R, 2048] of magnitude [T, R, C/R]. bin = floor(|x| * (2048 / limit)): exact, limit is a power of two."""
    counts = np.zeros((len(limit), BINS), np.int64)
    for row, top in enumerate(limit):
        values = magnitude[:, row, :].ravel()
        if top == 0:
            counts[row, 0] = values.size
            continue
        bins = (values * np.float32(BINS / float(top))).astype(np.int32)
        counts[row] = np.bincount(bins, minlength=BINS)
    return counts


def _require_equal_live(a: Statistics, b: Statistics) -> None:
    for name in sorted({*a.live, *b.live}):
        if name not in a.live or name not in b.live or not np.array_equal(a.live[name], b.live[name]):
            raise CalibrationError(
                f"observer {name!r} sees the data itself and its thresholds cannot be merged; "
                "collect in one pass, or use one that works on statistics (absmax, avg, percentile, mse, kl, ema)"
            )
