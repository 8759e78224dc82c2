"""The first thing a reader sees: did the gates hold, which variant to take, what must not be deployed."""

from __future__ import annotations

import math
from typing import Any

from quantbench.reports.advice import INCREASE_NOTICEABLE
from quantbench.reports.formatting import interval, join, percent, times


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """{"status": "passed" | "failed" | "no_gates", "gates", "best", "sentences": […]}, the worst news first."""
    gates = report["gates"]
    failed = [gate for gate in gates if not gate["passed"]]
    best = best_variant(report)
    sentences = [*_gate_sentences(gates, failed), *_alarms(report)]
    if best is not None:
        sentences.append({"level": "ok", "text": f"{best} is the one to take: {praise(report['variants'][best])}."})
    return {
        "status": "no_gates" if not gates else "failed" if failed else "passed",
        "gates": {"total": len(gates), "failed": len(failed)},
        "best": best,
        "sentences": sentences,
    }


def best_variant(report: dict[str, Any]) -> str | None:
    """The fastest decode (geometric mean of the speedups over the batches) among the quantized variants that qualify.

    A variant qualifies if it passes its gates, has no bad finding and, where no gate limits it, raises perplexity by
    less than 5%. Speedups that agree to one decimal are equal: then the smaller checkpoint (to two digits), then the
    smaller increase decides. None if no variant qualifies or accuracy was not measured."""
    fit = [name for name, record in report["variants"].items() if _fit(report, name, record)]
    return min(fit, key=lambda name: (*_rank(report["variants"][name]), name), default=None)


def _fit(report: dict[str, Any], name: str, record: dict[str, Any]) -> bool:
    scored = any(p["increase"] is not None for p in record["accuracy"]["perplexity"])
    if not record["quantized"] or record["baseline"] or not scored:
        return False
    if any(not gate["passed"] for gate in record["gates"]):
        return False
    if any(f["variant"] == name and f["severity"] == "bad" for f in report["findings"]):
        return False
    limited = any(gate["name"] == "perplexity_increase" for gate in record["gates"])
    return limited or _increase(record) < INCREASE_NOTICEABLE


def _rank(record: dict[str, Any]) -> tuple[float, float, float]:
    size = record["size"]["checkpoint_bytes"]
    speedup = round(decode_speedup(record) or 0.0, 1)
    return -speedup, math.inf if size is None else float(f"{size:.1e}"), _increase(record)


def _increase(record: dict[str, Any]) -> float:
    """The largest over the texts."""
    return max(float(p["increase"]) for p in record["accuracy"]["perplexity"] if p["increase"] is not None)


def decode_speedup(record: dict[str, Any]) -> float | None:
    """Geometric mean over the batches; None where decode was not timed against a baseline."""
    known = [d["speedup"] for d in record["speed"]["decode"].values() if d["speedup"]]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def praise(record: dict[str, Any]) -> str:
    """What a variant costs and gains, in half a sentence."""
    told = []
    for measure in record["accuracy"]["perplexity"][:1]:
        bounds = interval(measure["increase_interval"])
        told.append(f"{percent(measure['increase'], sign=True)} perplexity{' ' + bounds if bounds else ''}")
    for batch, decode in list(record["speed"]["decode"].items())[:1]:
        if decode["speedup"]:
            told.append(f"{times(decode['speedup'])} decode at batch {batch}")
    prefill = record["speed"]["prefill"]
    if prefill and prefill["speedup"]:
        told.append(f"{times(prefill['speedup'])} prefill")
    if record["size"]["ratio_to_fp32"]:
        told.append(f"{percent(record['size']['ratio_to_fp32'])} of the fp32 size")
    return join(told)


def _gate_sentences(gates: list[dict[str, Any]], failed: list[dict[str, Any]]) -> list[dict[str, str]]:
    if not gates:
        return []
    if not failed:
        return [{"level": "ok", "text": f"All {len(gates)} gates hold."}]
    told = "; ".join(gate["why"] for gate in failed[:3]) + (f"; and {len(failed) - 3} more" if len(failed) > 3 else "")
    return [{"level": "bad", "text": f"{len(failed)} of {len(gates)} gates fail: {told}."}]


def _alarms(report: dict[str, Any]) -> list[dict[str, str]]:
    """One sentence per variant with a bad finding: the first two of them."""
    told = []
    for name in report["variants"]:
        bad = [f for f in report["findings"] if f["variant"] == name and f["severity"] == "bad"]
        if bad:
            more = f"; and {len(bad) - 2} more" if len(bad) > 2 else ""
            told.append(
                {"level": "bad", "text": f"Do not deploy {name}: {'; '.join(f['what'] for f in bad[:2])}{more}."}
            )
    return told
