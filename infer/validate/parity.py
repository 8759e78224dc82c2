"""Is what is served what was simulated? Float, simulated and served run of the same tokens, layer by layer.

*Codes*: given the float values that reached a quantization point, did the served kernels make the codes and scales of
the numpy reference, bit for bit?

*Same input*: each block is simulated once more on the hidden state that the served block got (`replayed`). This is
what judges, because two correct runs left to themselves drift apart. Float sums have another order, so inputs differ
by some δ of a quantization step; a share E|δ| of the codes falls to the other side, which is an error of energy E|δ|
where it was E|δ|². Every quantization point takes a root: 1e-7 becomes as large as the quantization noise within a
dozen layers, however good the kernels are. The free-running comparison is reported beside it and must only not be
worse: the served run may not lose more of the float model than the simulated one does.
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
WORSE_DB = 3.0  # free running: served may have at most twice the simulated noise
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
    free: _Energy = field(default_factory=_Energy)  # simulated against served, each on its own input
    same: _Energy = field(default_factory=_Energy)  # simulated against served, on the served input
    taps: dict[str, _Energy] = field(default_factory=dict)  # as `same`, in the order of the block
    codes: dict[str, _Codes] = field(default_factory=dict)


@dataclass
class _Logits:
    """Agreement of next-token distributions, summed over tokens."""

    tokens: int = 0
    kl: float = 0.0
    agree: int = 0

    def add(self, simulated: F32, served: F32) -> None:
        kl, same = divergence(log_softmax(simulated), log_softmax(served))
        self.kl += float(kl.sum())
        self.agree += int(same.sum())
        self.tokens += len(same)

    def json(self) -> dict[str, float]:
        return {"top1_served_simulated": self.agree / self.tokens, "kl_served_simulated": self.kl / self.tokens}


@dataclass
class Parity:
    """Accumulates windows of one variant; `result()` is its entry in parity.json."""

    _layers: list[_Layer] = field(default_factory=list)
    _free: _Logits = field(default_factory=_Logits)
    _same: _Logits = field(default_factory=_Logits)

    @property
    def tokens(self) -> int:
        return self._free.tokens

    def add(self, base: TraceLike, simulated: TraceLike, served: TraceLike, replayed: TraceLike | None = None) -> None:
        """One window through the float model, the simulation and the engine.

        `replayed` is the simulation of every block on the served hidden state before it (`served.hidden[i - 1]`; the
        first on the embedding), its logits those of the last block so simulated. Give it for all windows or none.
        """
        self._layers = self._layers or [_Layer() for _ in base.hidden]
        streams = zip(self._layers, base.hidden, simulated.hidden, served.hidden, strict=True)
        for i, (row, b, sim, run) in enumerate(streams):
            row.simulated.add(b, sim)
            row.served.add(b, run)
            row.free.add(sim, run)
            for tap in (f"{block_prefix(i)}.{name}" for name in TAPS):
                _check_codes(row, tap, served.taps.get(tap))
            if replayed is not None:
                row.same.add(replayed.hidden[i], run)
                _compare_taps(row, i, replayed, served)
        self._free.add(simulated.logits, served.logits)
        if replayed is not None:
            self._same.add(replayed.logits, served.logits)

    def result(self) -> dict[str, Any]:
        """Agreement is on the same input where windows were replayed (`same_input`), else free running."""
        codes = [c for layer in self._layers for c in layer.codes.values()]
        same = self._same.tokens > 0
        return {
            "codes_compared": sum(c.compared for c in codes),
            "codes_different": sum(c.different for c in codes),
            "scales_different": sum(c.scales_different for c in codes),
            "same_input": same,
            **(self._same if same else self._free).json(),
            "free_running": self._free.json(),
            "layers": [_layer_json(i, layer, same) for i, layer in enumerate(self._layers)],
            "first_departure": self._first_departure(same),
        }

    def _first_departure(self, same: bool) -> dict[str, str] | None:
        for i, layer in enumerate(self._layers):
            why = _wrong_codes(layer) or (_same_input(layer) if same else _free_running(layer))
            if why:
                return {"layer": block_prefix(i), "why": why}
        return None


def _layer_json(index: int, layer: _Layer, same: bool) -> dict[str, Any]:
    return {
        "name": block_prefix(index),
        "sqnr_simulated_db": layer.simulated.db,
        "sqnr_served_db": layer.served.db,
        "sqnr_served_to_simulated_db": layer.same.db if same else layer.free.db,
        "sqnr_free_running_db": layer.free.db,
    }


def compare(windows: Sequence[tuple[TraceLike, TraceLike, TraceLike, TraceLike | None]]) -> dict[str, Any]:
    """Parity of one variant over windows of (float, simulated, served, replayed or None) traces."""
    parity = Parity()
    for base, simulated, served, replayed in windows:
        parity.add(base, simulated, served, replayed)
    return parity.result()


def _compare_taps(row: _Layer, layer: int, replayed: TraceLike, served: TraceLike) -> None:
    for tap in (f"{block_prefix(layer)}.{name}" for name in TAPS):
        mine, theirs = replayed.taps.get(tap), served.taps.get(tap)
        if mine is not None and theirs is not None:
            row.taps.setdefault(tap, _Energy()).add(mine.values, theirs.values)


def _check_codes(row: _Layer, tap: str, served: TapLike | None) -> None:
    if served is None or served.codes is None or served.scale is None:
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


def _same_input(layer: _Layer) -> str | None:
    if not departs(layer.same.db, layer.simulated.db):
        return None
    start = f"on the same input, served and simulated agree to {layer.same.db:.1f} dB only"
    before = "the input of the block"
    for tap, energy in layer.taps.items():
        if departs(energy.db, layer.simulated.db):
            return f"{start}; {tap} is the first to differ ({energy.db:.1f} dB), {before} still agreed"
        before = f"{tap} ({energy.db:.1f} dB)"
    return f"{start}; {before} still agreed, so the difference is made behind it"


def _free_running(layer: _Layer) -> str | None:
    if layer.served.db >= layer.simulated.db - WORSE_DB:
        return None
    return (
        f"served differs from the float model more than simulated does ({layer.served.db:.1f} against "
        f"{layer.simulated.db:.1f} dB); the codes match the reference on the inputs that were served"
    )
