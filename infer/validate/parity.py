"""Is what is served what was simulated? Float, simulated and served run of the same tokens, layer by layer.

Three questions are answered. *Codes*: given the float values that reached a quantization point, did the served kernels
make the codes and scales of the numpy reference, bit for bit? *Departure*: with every simulated block started from the
hidden states that the runtime had there, how far apart do they come out? Not equal: float sums have another order, and
a value on the edge between two codes falls to either side. So a layer departs only where the difference is no longer
small against the quantization noise itself (`departs`). *Free running*: what is left of that agreement when the
simulation goes its own way from the first token on. Every flipped code moves later values, which flip later codes:
with quantized activations two correct runs end as far from each other as from the float model. That figure is
reported beside the others and judged by nothing.
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
CLOSE_DB = 60.0  # below this the streams differ by more than 0.1 %
MARGIN_DB = 10.0  # the difference is a tenth of the quantization noise's energy
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


def departs(served_to_simulated: float, simulated: float) -> bool:
    """Whether served and simulated differ by more than quantization explains; arguments are SQNR in dB.

    They must agree to 60 dB, or, where quantization itself leaves less, to 10 dB better than its noise.
    """
    return served_to_simulated < min(CLOSE_DB, simulated + MARGIN_DB)


@dataclass
class _Codes:
    compared: int = 0
    different: int = 0
    scales_different: int = 0


@dataclass
class _Layer:
    simulated: _Energy = field(default_factory=_Energy)
    served: _Energy = field(default_factory=_Energy)
    difference: _Energy = field(default_factory=_Energy)
    taps: dict[str, _Energy] = field(default_factory=dict)  # served against simulated, in the order of the block
    codes: dict[str, _Codes] = field(default_factory=dict)


@dataclass
class _Agreement:
    """Running agreement of two runs' log-probabilities; None before anything was added."""

    tokens: int = 0
    kl_sum: float = 0.0
    same: int = 0

    def add(self, simulated: F32, served: F32) -> None:
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
    """Accumulates windows of one variant; `result()` is its entry in parity.json.

    `simulated` traces may lack taps; then a departure is told by layer, not by tap.
    """

    tokens: int = 0
    _layers: list[_Layer] = field(default_factory=list)
    _logits: _Agreement = field(default_factory=_Agreement)
    _free: _Agreement = field(default_factory=_Agreement)

    def add(self, base: TraceLike, simulated: TraceLike, served: TraceLike, free: F32 | None = None) -> None:
        """One window through the float model, the simulation that follows the engine, and the engine.

        `free`: logits f32[T, V] of the simulation that follows nothing.
        """
        self._layers = self._layers or [_Layer() for _ in base.hidden]
        streams = zip(self._layers, base.hidden, simulated.hidden, served.hidden, strict=True)
        for layer, (row, b, sim, run) in enumerate(streams):
            row.simulated.add(b, sim)
            row.served.add(b, run)
            row.difference.add(sim, run)
            for tap in (f"{block_prefix(layer)}.{name}" for name in TAPS):
                _compare_tap(row, tap, simulated.taps.get(tap), served.taps.get(tap))
        logp = log_softmax(served.logits)
        self._logits.add(log_softmax(simulated.logits), logp)
        if free is not None:
            self._free.add(log_softmax(free), logp)
        self.tokens += len(logp)

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
            wrong = [tap for tap, codes in layer.codes.items() if codes.different or codes.scales_different]
            if wrong or departs(layer.difference.db, layer.simulated.db):
                before = self._layers[i - 1].difference.db if i else IDENTICAL_DB
                return {"layer": block_prefix(i), "why": _why(layer, wrong, before)}
        return None


def compare(windows: Sequence[tuple[TraceLike, TraceLike, TraceLike]]) -> dict[str, Any]:
    """Parity of one variant over windows of (float, simulated, served) traces: its entry in parity.json."""
    parity = Parity()
    for base, simulated, served in windows:
        parity.add(base, simulated, served)
    return parity.result()


def _compare_tap(row: _Layer, tap: str, simulated: TapLike | None, served: TapLike | None) -> None:
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


def _why(layer: _Layer, wrong: list[str], before: float) -> str:
    if wrong:
        codes = layer.codes[wrong[0]]
        return (
            f"{wrong[0]}: {codes.different} of {codes.compared} codes and {codes.scales_different} scales differ from "
            "the numpy reference on the same input: the kernel breaks the specification"
        )
    at = f"served and simulated agree to {layer.difference.db:.1f} dB, quantization leaves {layer.simulated.db:.1f} dB"
    taps = list(layer.taps.items())
    for i, (tap, energy) in enumerate(taps):
        if departs(energy.db, layer.simulated.db):
            last = (
                f"{taps[i - 1][0]} still agreed to {taps[i - 1][1].db:.1f}"
                if i
                else f"its input agreed to {before:.1f}"
            )
            return f"{at}; {tap} is the first input to differ ({energy.db:.1f} dB), {last} dB"
    if taps:
        return f"{at}; all inputs of its linears agree, so the last linear or the residual sum differs"
    return f"{at}; its input agreed to {before:.1f} dB; the codes match the reference on the input that was served"
