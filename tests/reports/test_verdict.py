from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.reports.verdict import best_variant, decode_speedup, verdict


def variant(
    increase: float | None = 0.01, speedup: float | None = 2.0, size: int | None = 100, **more: Any
) -> dict[str, Any]:
    return {
        "baseline": False,
        "quantized": True,
        "gates": [],
        "accuracy": {"perplexity": [{"data": "d", "increase": increase, "increase_interval": None}]},
        "speed": {"decode": {"1": {"speedup": speedup}} if speedup else {}, "prefill": None},
        "size": {"checkpoint_bytes": size, "ratio_to_fp32": None},
    } | more


def report(variants: dict[str, Any], findings: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    gates = [gate for record in variants.values() for gate in record["gates"]]
    return {"variants": variants, "findings": findings or [], "gates": gates}


def gate(name: str = "perplexity_increase", passed: bool = True) -> dict[str, Any]:
    return {"name": name, "variant": "v", "passed": passed, "why": f"v: {name} is {passed}"}


@pytest.mark.parametrize(
    ("variants", "best"),
    [
        ({}, None),
        ({"slow": variant(speedup=1.5), "fast": variant(speedup=2.5)}, "fast"),
        ({"fast": variant(0.06, 2.5), "true": variant(0.02, 1.5)}, "true"),
        ({"edge": variant(0.05)}, None),
        ({"allowed": variant(0.06, gates=[gate()])}, "allowed"),
        ({"refused": variant(0.01, gates=[gate("decode_speedup", False)])}, None),
        ({"base": variant(0.0, baseline=True), "float": variant(0.0, quantized=False)}, None),
        ({"unmeasured": variant(None)}, None),
        ({"big": variant(speedup=None, size=200), "small": variant(speedup=None, size=100)}, "small"),
        ({"b": variant(), "a": variant()}, "a"),
        ({"lossy": variant(0.03, 2.04, 163_400_000), "true": variant(0.002, 1.96, 163_500_000)}, "true"),
        ({"unknown": variant(speedup=None, size=None), "known": variant(speedup=None)}, "known"),
    ],
)
def test_the_best_variant(variants: dict[str, Any], best: str | None) -> None:
    assert best_variant(report(variants)) == best


def test_a_bad_finding_disqualifies() -> None:
    found = [{"variant": "fast", "severity": "bad", "what": "it lies"}]
    told = verdict(report({"fast": variant(speedup=9.0), "slow": variant()}, found))
    assert told["best"] == "slow"
    assert told["sentences"][0] == {"level": "bad", "text": "Do not deploy fast: it lies."}


def test_many_alarms_are_counted() -> None:
    found = [{"variant": "v", "severity": "bad", "what": f"w{i}"} for i in range(5)]
    told = verdict(report({"v": variant()}, found))
    assert told["sentences"] == [{"level": "bad", "text": "Do not deploy v: w0; w1; and 3 more."}]


@pytest.mark.parametrize(
    ("gates", "status", "text"),
    [
        ([], "no_gates", None),
        ([gate()], "passed", "All 1 gates hold."),
        ([gate(), gate("kl", False)], "failed", "1 of 2 gates fail: v: kl is False."),
        ([gate(f"g{i}", False) for i in range(5)], "failed",
         "5 of 5 gates fail: v: g0 is False; v: g1 is False; v: g2 is False; and 2 more."),
    ],
)  # fmt: skip
def test_gates(gates: list[dict[str, Any]], status: str, text: str | None) -> None:
    told = verdict(report({"v": variant(0.5, gates=gates)}))
    assert told["status"] == status
    assert [s["text"] for s in told["sentences"]] == (
        [text] if text and status == "failed" else [text] * bool(text)
    ) + (["v is the one to take: +50.0% perplexity and 2.00x decode at batch 1."] if status == "passed" else [])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_speedups_are_averaged_geometrically(speedups: list[float]) -> None:
    record = {"speed": {"decode": {str(i): {"speedup": s} for i, s in enumerate(speedups)}}}
    average = decode_speedup(record)
    assert average is not None
    assert min(speedups) * (1 - 1e-9) <= average <= max(speedups) * (1 + 1e-9)
    inverse = {"speed": {"decode": {str(i): {"speedup": 1 / s} for i, s in enumerate(speedups)}}}
    assert decode_speedup(inverse) == pytest.approx(1 / average)
