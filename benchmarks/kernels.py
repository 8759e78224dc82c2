"""Speed of every native operation on the shapes of a small decoder, beside what this machine can reach at most.

    PYTHONPATH=src python benchmarks/kernels.py [--threads 1] [--isa avx512vnni] [--tokens 1 8 512] [--seconds 0.2]

GOP/s counts a multiplication and an addition as two; GB/s counts weights (or the array itself) once per call. Weights
that fit the caches are read from there, so a share of the memory ceiling above 100 % is possible for small shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import ActSpec, Batch, LayerCache
from quantbench.infer.ops.cpu import CpuOps, load_kernels
from quantbench.infer.ops.observe import observe
from quantbench.quantizers.weight import QuantizedWeight

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
HEADS, KV_HEADS, SIZE, HIDDEN, INNER = 9, 3, 64, 576, 1536
RNG = np.random.default_rng(0)


@dataclass
class Line:
    """One measurement: seconds per call, and what a call does."""

    op: str
    case: str
    seconds: float
    operations: float
    bytes: float


def best_seconds(call: Callable[[], object], seconds: float) -> float:
    """Shortest time of a call, of as many as fit in `seconds` after one to warm up."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def weights(n: int, k: int) -> dict[str, LinearWeight]:
    """One linear in every format that kernels know."""
    w = (RNG.standard_normal((n, k)) * 0.05).astype(np.float32)
    int8 = RNG.integers(-127, 128, (n, k)).astype(np.int8)
    int4 = RNG.integers(-8, 8, (n, k)).astype(np.int8)
    channel, group = np.full((n, 1), 1e-3, np.float32), np.full((n, k // 64), 1e-3, np.float32)
    e4m3 = w.astype(ml_dtypes.float8_e4m3fn)
    quantized: dict[str, tuple[QuantizedWeight, str | None]] = {
        "a8w8": (QuantizedWeight("int8", "channel", int8, channel), "int8"),
        "w8": (QuantizedWeight("int8", "channel", int8, channel), None),
        "w4 group 64": (
            QuantizedWeight("int4", "group", int4, group, None, 64),
            None,
        ),
        "a8w8_fp8": (QuantizedWeight("fp8_e4m3", "tensor", e4m3, np.ones(1, np.float32)), "fp8_e4m3"),
    }
    floats = {"fp32": w, "bf16": w.astype(ml_dtypes.bfloat16), "fp16": w.astype(np.float16)}
    return {name: LinearWeight(name, array, None) for name, array in floats.items()} | {
        name: LinearWeight(name, q, None, act) for name, (q, act) in quantized.items()
    }


def linears(ops: CpuOps, tokens: list[int], seconds: float) -> list[Line]:
    lines = []
    for name, (n, k) in SHAPES.items():
        for kind, weight in weights(n, k).items():
            packed = ops.pack(weight)
            for t in tokens:
                if name == "head" and t > 32:
                    continue  # prefill computes the head of one row per sequence
                a = ops.quantize(RNG.standard_normal((t, k)).astype(np.float32), ActSpec(weight.activations))
                best = best_seconds(lambda a=a, packed=packed: ops.linear(a, packed), seconds)  # type: ignore[misc]
                lines.append(Line(f"linear {kind}", f"{name} {k}->{n} T={t}", best, 2.0 * t * n * k, packed.nbytes))
    return lines


def rows(ops: CpuOps, tokens: list[int], seconds: float) -> list[Line]:
    lines = []
    norm = np.ones(HIDDEN, np.float32)
    for t in tokens:
        x, delta = (RNG.standard_normal((t, HIDDEN)).astype(np.float32) * s for s in (1.0, 0.0))
        gate_up = RNG.standard_normal((t, 2 * INNER)).astype(np.float32)
        wide = RNG.standard_normal((t, INNER)).astype(np.float32)
        for spec in (ActSpec(), ActSpec("int8"), ActSpec("fp8_e4m3")):
            calls: dict[str, tuple[Callable[[], object], int]] = {
                "add_norm": (lambda x=x, d=delta, s=spec: ops.add_norm(x, d, norm, 1e-5, s), x.nbytes * 2),  # type: ignore[misc]
                "silu_mul": (lambda g=gate_up, s=spec: ops.silu_mul(g, s), gate_up.nbytes),  # type: ignore[misc]
            }
            if spec.format:
                calls["quantize"] = (lambda x=wide, s=spec: ops.quantize(x, s), wide.nbytes)  # type: ignore[misc]
            for name, (call, size) in calls.items():
                lines.append(Line(f"{name} {spec.format or 'float'}", f"T={t}", best_seconds(call, seconds), 0, size))
    return lines


def paged(t: int, context: int, dtype: Any) -> tuple[Batch, LayerCache]:
    """One sequence of `context` tokens whose last `t` are this step's."""
    pages = -(-context // 64)
    positions = np.arange(context - t, context, dtype=np.int32)
    batch = Batch(
        np.zeros(t, np.int32), positions, positions.astype(np.int64), np.array([0, t], np.int32),
        np.array([context], np.int32), np.arange(pages, dtype=np.int32)[None, :],
    )  # fmt: skip
    k, v = ((RNG.standard_normal((pages, KV_HEADS, 64, SIZE)) * 20).astype(dtype) for _ in range(2))
    ones = np.full(KV_HEADS, 0.05, np.float32)
    return batch, LayerCache(k, v, ones, ones)


def attention(ops: CpuOps, tokens: list[int], seconds: float) -> list[Line]:
    lines = []
    for dtype in (np.float32, ml_dtypes.bfloat16, np.int8, ml_dtypes.float8_e4m3fn):
        for t in tokens:
            context = max(t, 1024)
            batch, cache = paged(t, context, dtype)
            angle = RNG.standard_normal((context, SIZE // 2)).astype(np.float32)
            qkv = RNG.standard_normal((t, (HEADS + 2 * KV_HEADS) * SIZE)).astype(np.float32)
            q = qkv[:, : HEADS * SIZE].copy()
            rope = (np.cos(angle), np.sin(angle))
            name, pairs = np.dtype(dtype).name, t * (context - (t - 1) / 2)
            write = best_seconds(lambda: ops.rope_write(qkv, batch, rope, None, 1e-5, cache), seconds)  # noqa: B023
            read = best_seconds(lambda: ops.attention(q, batch, cache), seconds)  # noqa: B023
            lines.append(Line(f"rope_write {name}", f"T={t}", write, 0, qkv.nbytes))
            lines.append(
                Line(f"attention {name}", f"T={t} of {context}", read, 4.0 * pairs * HEADS * SIZE, 2 * cache.k.nbytes)
            )
    return lines


def statistics(ops: CpuOps, seconds: float) -> list[Line]:
    x = RNG.standard_normal((2048, INNER)).astype(np.float32)
    limit = np.array([64], np.float32)
    best = best_seconds(lambda: observe(ops, x, 1, limit), seconds)
    return [Line("observe", f"{len(x)}x{INNER}", best, 0, x.nbytes)]


def show(line: Line, ceilings: dict[str, float]) -> str:
    kind = {"linear a8w8": "int8", "linear bf16": "bf16", "linear a8w8_fp8": "bf16"}.get(line.op, "float32")
    peak = ceilings[f"{kind}_gop_per_s"]
    speed, rate = line.operations / line.seconds / 1e9, line.bytes / line.seconds / 1e9
    read = 100 * rate / ceilings["read_gb_per_s"]
    shares = f"{speed:8.1f} GOP/s {100 * speed / peak:4.0f}%  {rate:7.2f} GB/s {read:4.0f}%"
    return f"{line.op:<26}{line.case:<24}{line.seconds * 1e6:10.1f} us  {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--seconds", type=float, default=0.1, help="per measurement")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    options = parser.parse_args()
    ops = CpuOps(options.isa)
    ops.set_threads(options.threads)
    ceilings = load_kernels().ceilings(options.threads)
    print(
        f"{ops.isa}, {options.threads} thread(s); ceilings: " + ", ".join(f"{k} {v:.1f}" for k, v in ceilings.items())
    )
    parts: dict[str, Callable[[], list[Line]]] = {
        "linear": lambda: linears(ops, options.tokens, options.seconds),
        "rows": lambda: rows(ops, options.tokens, options.seconds),
        "attention": lambda: attention(ops, options.tokens, options.seconds),
        "observe": lambda: statistics(ops, options.seconds),
    }
    for name, part in parts.items():
        if options.only and options.only not in name:
            continue
        for line in part():
            print(show(line, ceilings), flush=True)


if __name__ == "__main__":
    main()
