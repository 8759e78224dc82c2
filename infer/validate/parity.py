"""Is what is served what was simulated? Float, simulated and served run of the same tokens, layer by layer.

*Codes*: given the float values that reached a quantization point, did the served kernels make the codes and scales of
the numpy reference, bit for bit?

*Departure*: with every simulated block started from the hidden state that the served block got, how far apart do they
come out? Two correct runs left to themselves drift apart instead. Float sums have another order, so inputs differ by
some δ of a quantization step; a share E|δ| of the codes falls to the other side, which is an error of energy E|δ|
where it was E|δ|². Every quantization point takes a root: 1e-7 becomes as large as the quantization noise within a
dozen layers, however good the kernels are. *Free running* agreement is therefore reported and judged by nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantbench.infer.models import TAPS, block_prefix
from quantbench.infer.validate.likelihood import F32, divergence, log_softmax
from quantbench.quantizers.activation import quantize_activation

IDENTICAL_DB = 200.0  # written where nothing differs: float32 itself resolves about 150 dB
SAME_INPUT_DB = 40.0  # least agreement of one block on the same input; real ones reach 55 to 170 (docs/measuring.md)
MARGIN_DB = 10.0  # or a tenth of the quantization noise's energy, where that leaves less
_FORMATS = {np.dtype(np.int8): "int8"}  # any other one-byte type is e4m3


class TapLike(Protocol):
    """Structure of infer.engine's Tap: float input f32[T, C], and codes and scale where it is quantized."""

    @property
    def values(self) -> F32: ...
    @property
    def codes(self) -> npt.NDArray[Any] | None: ...
    @property
    def scale(self) -> F32 | None: ...


class TraceLike(Protocol):
    """Structure of infer.engine's Trace. `hidden`: after each block f32[T, D]; `logits` f32[T, V]."""

    @property
    def hidden(self) -> Sequence[F32]: ...
    @property
    def taps(self) -> Mapping[str, Any]: ...
    @property
    def logits(self) -> F32: ...


@dataclass
class _Energy:
    """Running signal and noise energy in float64: SQNR over several windows needs no window kept."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: F32, other: F32) -> None:
        wide = reference.astype(np.float64)
        self.signal += float(np.square(wide).sum())
        self.noise += float(np.square(wide - other).sum())

    @property
    def db(self) -> float:
        return sqnr_db(self.signal, self.noise)


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio, 10·log10(signal/noise) in dB, 200 where there is no noise."""
    if noise == 0.0:
        return IDENTICAL_DB
    if signal == 0.0:
        return -IDENTICAL_DB
    return min(IDENTICAL_DB, 10.0 * math.log10(signal / noise))


def departs(same_input: float, simulated: float) -> bool:
    """Whether one block, served and simulated on the same input, differs by more than flipped codes explain; in dB."""
    return same_input < min(SAME_INPUT_DB, simulated + MARGIN_DB)


@dataclass
class _Codes:
    compared: int = 0
    different: int = 0
    scales_different: int = 0


@dataclass
class _Layer:
    simulated: _Energy = field(default_factory=_Energy)  # float against simulated
    served: _Energy = field(default_factory=_Energy)  # float against served
    difference: _Energy = field(default_factory=_Energy)  # simulated against served
    taps: dict[str, _Energy] = field(default_factory=dict)  # simulated against served, in the order of the block
    codes: dict[str, _Codes] = field(default_factory=dict)


@dataclass
class _Agreement:
    """Agreement of two runs' next tokens, summed; None before anything was added."""

    tokens: int = 0
    kl_sum: float = 0.0
    same: int = 0

    def add(self, simulated: F32, served: F32) -> None:
        """Both are log-probabilities f32[T, V]."""
        kl, same = divergence(simulated, served)
        self.kl_sum += float(kl.sum())
        self.same += int(same.sum())
        self.tokens += len(same)

    @property
    def kl(self) -> float | None:
        return self.kl_sum / self.tokens if self.tokens else None

    @property
    def top1(self) -> float | None:
        return self.same / self.tokens if self.tokens else None


@dataclass
class Parity:
    """Accumulates windows of one variant; `result()` is its entry in parity.json."""

    _layers: list[_Layer] = field(default_factory=list)
    _logits: _Agreement = field(default_factory=_Agreement)
    _free: _Agreement = field(default_factory=_Agreement)

    @property
    def tokens(self) -> int:
        return self._logits.tokens

    def add(self, base: TraceLike, simulated: TraceLike, served: TraceLike, free: F32 | None = None) -> None:
        """One window through the float model, the simulation that follows the engine, and the engine.

        Every block of `simulated` started from `served.hidden` before it; without its taps a departure is told by
        block only. `free`: logits f32[T, V] of the simulation that follows nothing.
        """
        self._layers = self._layers or [_Layer() for _ in base.hidden]
        streams = zip(self._layers, base.hidden, simulated.hidden, served.hidden, strict=True)
        for i, (row, b, sim, run) in enumerate(streams):
            row.simulated.add(b, sim)
            row.served.add(b, run)
            row.difference.add(sim, run)
            for tap in (f"{block_prefix(i)}.{name}" for name in TAPS):
                _add_tap(row, tap, simulated.taps.get(tap), served.taps.get(tap))
        logp = log_softmax(served.logits)
        self._logits.add(log_softmax(simulated.logits), logp)
        if free is not None:
            self._free.add(log_softmax(free), logp)

    def result(self) -> dict[str, Any]:
        codes = [c for layer in self._layers for c in layer.codes.values()]
        return {
            "codes_compared": sum(c.compared for c in codes),
            "codes_different": sum(c.different for c in codes),
            "scales_different": sum(c.scales_different for c in codes),
            "top1_served_simulated": self._logits.top1,
            "kl_served_simulated": self._logits.kl,
            "top1_free_running": self._free.top1,
            "kl_free_running": self._free.kl,
            "layers": [
                {
                    "name": block_prefix(i),
                    "sqnr_simulated_db": layer.simulated.db,
                    "sqnr_served_db": layer.served.db,
                    "sqnr_served_to_simulated_db": layer.difference.db,
                }
                for i, layer in enumerate(self._layers)
            ],
            "first_departure": self._first_departure(),
        }

    def _first_departure(self) -> dict[str, str] | None:
        for i, layer in enumerate(self._layers):
            why = _wrong_codes(layer) or _departure(layer)
            if why:
                return {"layer": block_prefix(i), "why": why}
        return None


def _add_tap(row: _Layer, tap: str, simulated: TapLike | None, served: TapLike | None) -> None:
    if served is None:
        return
    if simulated is not None:
        row.taps.setdefault(tap, _Energy()).add(simulated.values, served.values)
    if served.codes is None or served.scale is None:
        return
    counts = row.codes.setdefault(tap, _Codes())
    different, scales = compare_codes(served.values, served.codes, served.scale)
    counts.compared += served.codes.size
    counts.different += different
    counts.scales_different += scales


def compare_codes(values: F32, codes: npt.NDArray[Any], scale: F32) -> tuple[int, int]:
    """Codes and scales that differ in any bit from the reference's on the same input f32[T, K].

    One scale is static; as many as tokens are dynamic, and then the reference computes its own.
    """
    static = float(scale[0]) if len(scale) == 1 else None
    expected, expected_scale = quantize_activation(values, _FORMATS.get(codes.dtype, "fp8_e4m3"), static)
    different = np.count_nonzero(expected.view(np.uint8) != codes.view(np.uint8))
    return int(different), int(np.count_nonzero(expected_scale.view(np.uint32) != scale.view(np.uint32)))


def _wrong_codes(layer: _Layer) -> str | None:
    for tap, codes in layer.codes.items():
        if codes.different or codes.scales_different:
            return (
                f"{tap}: {codes.different} of {codes.compared} codes and {codes.scales_different} scales differ from "
                "the numpy reference on the same input: the kernel breaks the specification"
            )
    return None


def _departure(layer: _Layer) -> str | None:
    if not departs(layer.difference.db, layer.simulated.db):
        return None
    start = f"on the same input, served and simulated agree to {layer.difference.db:.1f} dB only"
    before = "the input of the block"
    for tap, energy in layer.taps.items():
        if departs(energy.db, layer.simulated.db):
            return f"{start}; {tap} is the first to differ ({energy.db:.1f} dB), {before} still agreed"
        before = f"{tap} ({energy.db:.1f} dB)"
    return f"{start}; {before} still agreed, so the difference is made behind it"
