"""Limits that decide the exit code, as data: where each gate finds its value, and which side of the limit is good.

A gate judges the measured value; where the 95 % interval holds the limit, its sentence says that chance could have
decided. Of several data sets or batches, the worst counts for accuracy and the smallest batch for decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantbench.errors import RecipeError, unknown

Json = Mapping[str, Any]


@dataclass(frozen=True)
class GateResult:
    variant: str
    gate: str
    limit: float
    value: float
    interval: tuple[float, float] | None  # 95 % for accuracy, lowest and highest round for speed; None: exact
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Measured:
    """All that a gate may look at; None: that stage did not run."""

    accuracy: Json | None
    throughput: Json | None
    parity: Json | None
    sizes: Mapping[str, int] | None

    @property
    def baseline(self) -> str | None:
        for result in (self.accuracy, self.throughput):
            if result is not None and "baseline" in result:
                return str(result["baseline"])
        return None


@dataclass(frozen=True)
class Reading:
    value: float
    interval: tuple[float, float] | None = None
    where: str = ""  # " on <data>", " at batch 8"


Reader = Callable[[Measured, str], Reading | None]


@dataclass(frozen=True)
class Gate:
    """`at_most`: the value must not exceed the limit; otherwise it must reach it. `style` prints value and limit."""

    read: Reader
    at_most: bool
    style: str
    needs: str


def _accuracy(section: str, key: str, interval: str, worst: Callable[..., Reading]) -> Reader:
    def read(measured: Measured, variant: str) -> Reading | None:
        rows = (measured.accuracy or {}).get(section, [])
        found = [
            Reading(r["variants"][variant][key], _pair(r["variants"][variant].get(interval)), f" on {r['data']}")
            for r in rows
            if key in r["variants"].get(variant, {})
        ]
        return worst(found, key=lambda reading: reading.value) if found else None

    return read


def _choices_drop(measured: Measured, variant: str) -> Reading | None:
    """The drop is the delta with its sign, and its interval, turned round."""
    delta = _accuracy("choices", "delta", "delta_interval", min)(measured, variant)
    if delta is None:
        return None
    interval = (-delta.interval[1], -delta.interval[0]) if delta.interval else None
    return Reading(0.0 - delta.value, interval, delta.where)


def _spread(speedup: Json, where: str) -> Reading:
    return Reading(speedup["median"], (speedup["min"], speedup["max"]), where)


def _decode_speedup(measured: Measured, variant: str) -> Reading | None:
    decode = (measured.throughput or {}).get("variants", {}).get(variant, {}).get("decode", {})
    batches = sorted(int(b) for b in decode if "speedup" in decode[b])
    return _spread(decode[str(batches[0])]["speedup"], f" at batch {batches[0]}") if batches else None


def _prefill_speedup(measured: Measured, variant: str) -> Reading | None:
    prefill = (measured.throughput or {}).get("variants", {}).get(variant, {}).get("prefill", {})
    return _spread(prefill["speedup"], "") if "speedup" in prefill else None


def _checkpoint_ratio(measured: Measured, variant: str) -> Reading | None:
    """Against the float model's size: the one that was given, else what the baseline was seen to take."""
    baseline, sizes = measured.baseline or "", measured.sizes or {}
    seen = (measured.throughput or {}).get("variants", {}).get(baseline, {}).get("checkpoint_bytes")
    whole = sizes.get(baseline, seen)
    return Reading(sizes[variant] / whole) if whole and variant in sizes else None


def _parity(key: str) -> Reader:
    def read(measured: Measured, variant: str) -> Reading | None:
        row = (measured.parity or {}).get("variants", {}).get(variant, {})
        return Reading(float(row[key])) if row.get(key) is not None else None

    return read


_PPL = _accuracy("perplexity", "increase", "increase_interval", max)
GATES: dict[str, Gate] = {
    "perplexity_increase": Gate(_PPL, True, "+.2%", "accuracy.perplexity"),
    "kl": Gate(_accuracy("divergence", "kl", "kl_interval", max), True, ".5f", "accuracy.divergence"),
    "top1_agreement": Gate(_accuracy("divergence", "top1", "top1_interval", min), False, ".2%", "accuracy.divergence"),
    "choices_drop": Gate(_choices_drop, True, "+.2%", "accuracy.choices"),
    "decode_speedup": Gate(_decode_speedup, False, ".2f", "throughput"),
    "prefill_speedup": Gate(_prefill_speedup, False, ".2f", "throughput"),
    "checkpoint_ratio": Gate(_checkpoint_ratio, True, ".1%", "a written checkpoint"),
    "parity_top1": Gate(_parity("top1_served_simulated"), False, ".3%", "parity"),
    "parity_kl": Gate(_parity("kl_served_simulated"), True, ".2e", "parity"),
}


def evaluate_gates(
    gates: Mapping[str, Mapping[str, float]],
    accuracy: Json | None = None,
    throughput: Json | None = None,
    parity: Json | None = None,
    sizes: Mapping[str, int] | None = None,
) -> list[GateResult]:
    """Judge every gate of every variant; `gates` is variant -> {gate: limit}, fractions for percentages.

    The other arguments are the contents of the three JSON files (None: that stage did not run) and the checkpoint
    bytes of every variant. The baseline is held against nothing. Raises RecipeError listing at once the unknown gates
    and those whose value was not measured.
    """
    measured = Measured(accuracy, throughput, parity, sizes)
    problems, results = [], []
    for variant, name, limit in ((v, n, x) for v, limits in gates.items() for n, x in limits.items()):
        if name not in GATES:
            problems.append(f"gates: {unknown('gate', name, GATES)}")
        elif variant != measured.baseline:
            reading = GATES[name].read(measured, variant)
            if reading is None:
                problems.append(
                    f"gates: {name} of {variant} was not measured; it needs {GATES[name].needs} for {variant} "
                    "and the baseline. Measure it or remove the gate"
                )
            else:
                results.append(_judge(variant, name, limit, reading))
    if problems:
        raise RecipeError(*problems)
    return results


def _judge(variant: str, name: str, limit: float, reading: Reading) -> GateResult:
    gate = GATES[name]
    passed = reading.value <= limit if gate.at_most else reading.value >= limit
    sentence = f"{variant}: {name} {reading.value:{gate.style}}{reading.where}"
    if reading.interval:
        sentence += f" [{reading.interval[0]:{gate.style}}, {reading.interval[1]:{gate.style}}]"
    sentence += f" {'meets' if passed else 'misses'} the limit of {'at most' if gate.at_most else 'at least'} "
    sentence += f"{limit:{gate.style}}"
    if reading.interval and reading.interval[0] < limit < reading.interval[1]:
        sentence += "; the interval holds the limit, so more data could turn it"
    return GateResult(variant, name, limit, reading.value, reading.interval, passed, sentence)


def _pair(interval: Any) -> tuple[float, float] | None:
    return (float(interval[0]), float(interval[1])) if interval else None
