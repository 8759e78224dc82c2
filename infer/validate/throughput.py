"""How fast every variant is when really run, against the float baseline and against the machine's ceilings.

Rounds go over the variants in turn (A B C, A B C, …), each visit in its own process: what drifts (clock, neighbours)
hits all alike, and a speedup is taken within its round before anything is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import numpy as np

from quantbench.errors import DataError, RequestError, unknown
from quantbench.infer.validate.machine import describe_machine
from quantbench.infer.validate.profile import Spent
from quantbench.infer.validate.roofline import Achieved, Ceilings, why
from quantbench.infer.validate.timing import Load
from quantbench.infer.validate.visit import EngineSpec, Visit, visit_ceilings, visit_engine

Progress = Callable[[str, int, int], None]  # variant, visits done, visits in all


def measure_throughput(
    specs: Mapping[str, EngineSpec],
    baseline: str,
    load: Load,
    rounds: int = 3,
    progress: Progress = lambda variant, done, total: None,
) -> dict[str, Any]:
    """Time every variant `rounds` times in turn: the content of throughput.json.

    Speeds are {median, min, max} over rounds, `speedup` likewise, of the pairs within a round. Raises DataError for an
    unknown baseline, RequestError for no round, and what loading an engine raises.
    """
    if baseline not in specs:
        raise DataError(unknown("baseline", baseline, specs))
    if rounds < 1:
        raise RequestError(f"rounds: {rounds}; measure at least once")
    ops, threads = specs[baseline].ops, specs[baseline].threads
    visits: dict[str, list[Visit]] = {name: [] for name in specs}
    ceilings: list[Ceilings] = []
    for turn in range(rounds):
        ceilings.append(visit_ceilings(ops, threads))
        for i, (name, spec) in enumerate(specs.items(), 1):
            visits[name].append(visit_engine(spec, load))
            progress(name, turn * len(specs) + i, rounds * len(specs))
    bench = _Bench(visits, baseline, load, _middle(ceilings))
    return {
        "machine": describe_machine(threads),
        "baseline": baseline,
        "prompt": load.prompt,
        "output": load.output,
        "rounds": rounds,
        "ceilings": asdict(bench.ceilings),
        "ceilings_spread": {f.name: spread([getattr(c, f.name) for c in ceilings]) for f in fields(Ceilings)},
        "variants": {name: bench.variant(name) for name in specs},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(median(values)), "min": float(min(values)), "max": float(max(values))}


def _middle(ceilings: Sequence[Ceilings]) -> Ceilings:
    return Ceilings(*(float(median(getattr(c, f.name) for c in ceilings)) for f in fields(Ceilings)))


@dataclass(frozen=True)
class _Stage:
    """Prefill, or decode at one batch, of one variant: tokens/s of each round, and the middle round's step."""

    speeds: list[float]
    achieved: Achieved
    tokens: int  # per step

    def json(self, base: _Stage | None) -> dict[str, Any]:
        row = {"tokens_per_s": spread(self.speeds), **self.achieved.json()}
        row["cpu_s_per_token"] = self.achieved.cpu_s / self.tokens
        if self.achieved.profile:
            row["disturbed"] = self.achieved.disturbed
            row["profile_ms"] = {kind: seconds * 1e3 for kind, seconds in self.achieved.profile.items()}
        if base is None:
            return row | {"why": why(self.achieved)}
        speedup = spread([mine / theirs for mine, theirs in zip(self.speeds, base.speeds, strict=True)])
        return row | {"speedup": speedup, "why": why(self.achieved, base.achieved, speedup["median"])}


def _prefill(name: str, visits: list[Visit], prompt: int, ceilings: Ceilings) -> _Stage:
    seconds = [median(v.times.prefill) for v in visits]
    cpu = median(v.times.prefill_cpu_s for v in visits)
    achieved = Achieved(name, median(seconds), cpu, visits[0].threads, visits[0].times.prefill_work, ceilings)
    return _Stage([prompt / s for s in seconds], achieved, prompt)


def _decode(name: str, visits: list[Visit], batch: int, ceilings: Ceilings) -> _Stage:
    times = [v.times.decode[batch] for v in visits]
    seconds = [sum(t.steps) / len(t.steps) for t in times]
    cpu = median(t.cpu_s / len(t.steps) for t in times)
    profile = {kind: median(t.profile[kind] for t in times) for kind in times[0].profile}
    waited = median(t.waited_s / sum(t.steps) for t in times)
    achieved = Achieved(name, median(seconds), cpu, visits[0].threads, times[0].work, ceilings, profile, waited)
    return _Stage([batch / s for s in seconds], achieved, batch)


def _latencies(visits: list[Visit], batch: int) -> dict[str, float]:
    """Milliseconds. Every step of a full batch is the time between two tokens of each of its sequences."""
    steps = [s for v in visits for s in v.times.decode[batch].steps]
    first = [s for v in visits for s in v.times.decode[batch].first_token]
    p50, p95 = np.percentile(steps, [50, 95])
    return {"ttft_ms": median(first) * 1e3, "itl_p50_ms": float(p50) * 1e3, "itl_p95_ms": float(p95) * 1e3}


def _operations(visits: list[Visit], batch: int) -> dict[str, Any]:
    """Each native operation in the middle round's profiled steps."""
    rounds = [{name: Spent(*values) for name, values in v.times.decode[batch].operations.items()} for v in visits]
    if not all(rounds):
        return {}
    middle = sorted(rounds, key=lambda r: sum(s.seconds for s in r.values()))[len(rounds) // 2]
    step = sum(s.seconds for s in middle.values())
    return {"operations": {name: spent.json(step) for name, spent in middle.items()}}


@dataclass(frozen=True)
class _Bench:
    """All visits, and what they are measured against."""

    visits: Mapping[str, list[Visit]]
    baseline: str
    load: Load
    ceilings: Ceilings

    def variant(self, name: str) -> dict[str, Any]:
        mine = self.visits[name]
        base = None if name == self.baseline else self.visits[self.baseline]
        return {
            "load_s": median(v.load_s for v in mine),
            "checkpoint_bytes": mine[0].checkpoint_bytes,
            "weights_bytes": mine[0].weights_bytes,
            "cache_bytes": mine[0].cache_bytes,
            "peak_rss_bytes": max(v.peak_rss_bytes for v in mine),
            "prefill": self._prefill(name).json(self._prefill(self.baseline) if base else None),
            "decode": {
                str(b): _latencies(mine, b)
                | self._decode(name, b).json(self._decode(self.baseline, b) if base else None)
                | _operations(mine, b)
                for b in self.load.batches
            },
        }

    def _prefill(self, name: str) -> _Stage:
        return _prefill(name, self.visits[name], self.load.prompt, self.ceilings)

    def _decode(self, name: str, batch: int) -> _Stage:
        return _decode(name, self.visits[name], batch, self.ceilings)
