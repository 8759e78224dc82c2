"""Times single CUDA kernels at the shapes of Llama-3-8B: microseconds, and the share of a copy's bandwidth.

    PYTHONPATH=src python benchmarks/cuda_kernels.py [gemm] [attention] [rows] [large] [weight-only] [--json OUT]

Every figure is the mean over replays of a graph, a quarter of a second of them after as much warm-up. Weights and
pages rotate through more than 300 MB, so they come from memory and not from the L2 cache. 4.244 TB/s is what a copy
reached on an H200; floors are bytes over that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from quantbench.infer.cuda import attention, gemm, layout, mixed, rows
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops import Activation, ActSpec

COPY = 4.244e12  # bytes per second
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
KINDS = {
    "bf16": (1, None, 0),
    "int8": (6, "int8", 0),
    "fp8": (5, "fp8_e4m3", 0),
    "w8": (3, None, 0),
    "w4-128": (4, None, 128),
}
RESULTS: list[dict[str, Any]] = []
RNG = np.random.default_rng(0)


def microseconds(device: Device, work: list[Callable[[], object]]) -> float:
    """Of one of `work`, run in turn in a graph."""
    for one in work:
        one()
    keep: list[Any] = [one() for one in work]  # as many results at once as the capture keeps
    keep.clear()
    with device.capture(keep) as found:
        for one in work:
            keep.append(one())
    graph = found[0]
    once = device.seconds(lambda: device.replay(graph))
    count = max(3, int(0.25 / max(once, 1e-5)))
    device.seconds(lambda: [device.replay(graph) for _ in range(count)])
    return device.seconds(lambda: [device.replay(graph) for _ in range(count)]) / count / len(work) * 1e6


def report(what: str, us: float, nbytes: float, operations: float = 0.0) -> None:
    floor = nbytes / COPY * 1e6
    RESULTS.append(
        {"kernel": what, "us": round(us, 2), "floor_us": round(floor, 2), "tflops": round(operations / us / 1e6, 1)}
    )
    print(
        f"{what:46} {us:9.2f} us   floor {floor:8.2f}   {floor / us:6.1%}   {operations / us / 1e6:8.1f} T", flush=True
    )


def random_bytes(device: Device, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
    """Any valid codes or numbers of `dtype`; a million of them, repeated."""
    kind, count = np.dtype(dtype), 1 << 20
    if kind == np.dtype(np.int8):
        block: Any = RNG.integers(-127, 128, count, np.int8)
    elif kind == np.dtype(np.uint8):
        block = RNG.integers(0, 256, count, np.uint8)
    elif kind == np.dtype(ml_dtypes.float8_e4m3fn):
        block = RNG.integers(0, 0x70, count, np.uint8).view(kind)
    else:
        block = (RNG.standard_normal(count) * 0.05).astype(kind)
    return device.upload(np.resize(block, shape))


def weights(device: Device, kind: int, n: int, k: int, group: int, activations: str | None) -> list[DeviceWeight]:
    tiled = activations is None and mixed.packs(device, kind, (n, k), group, False)
    fields = layout.fields(kind, n, k, group, False, tiled)
    size = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in fields.values())
    made = []
    for _ in range(-(-350_000_000 // size)):
        arrays = {name: random_bytes(device, s, d) for name, (s, d) in fields.items()}
        made.append(DeviceWeight(kind, n, k, arrays["codes"], arrays.get("scale"), None, group or k, None, activations))
    return made


def time_gemm(device: Device, names: list[str], tokens: tuple[int, ...]) -> None:
    for name in names:
        kind, activations, group = KINDS[name]
        for shape, (n, k) in SHAPES.items():
            held = weights(device, kind, n, k, group, activations)
            for m in tokens:
                x = random_bytes(device, (m, k), device.dtype)
                a: Any = rows.quantize(device, x, ActSpec(activations)) if activations else Activation(values=x)  # type: ignore[arg-type]
                out = device.empty((m, n), device.dtype)
                work = [partial(gemm.linear, device, a, w, out) for w in held]
                us = microseconds(device, work)
                report(f"{name} {shape} M={m}", us, held[0].nbytes + m * k * 2 + m * n * 2, 2.0 * m * n * k)


def cache_of(device: Device, pages: int, dtype: Any) -> DeviceCache:
    shape = (pages, 8, 64, 128)
    one = device.upload(np.full(8, 0.01, np.float32))
    return DeviceCache(random_bytes(device, shape, dtype), random_bytes(device, shape, dtype), one, one)


def decode_batch(device: Device, sequences: int, context: int) -> DeviceBatch:
    pages = -(-context // 64)
    tables = RNG.permutation(pages * sequences).astype(np.int32).reshape(sequences, pages)
    none = device.upload(np.zeros(sequences, np.int32))
    starts = device.upload(np.arange(sequences + 1, dtype=np.int32))
    contexts = device.upload(np.full(sequences, context, np.int32))
    return DeviceBatch(none, none, none, starts, contexts, device.upload(tables), True, context, 1)


def prefill_batch(device: Device, tokens: int) -> DeviceBatch:
    none = device.upload(np.zeros(tokens, np.int32))
    starts = device.upload(np.array([0, tokens], np.int32))
    contexts = device.upload(np.array([tokens], np.int32))
    tables = device.upload(np.arange(tokens // 64, dtype=np.int32)[None])
    length = np.array([tokens])
    return DeviceBatch(none, none, none, starts, contexts, tables, False, tokens, tokens, length, length)


def time_attention(device: Device) -> None:
    for name, dtype in (("bf16", ml_dtypes.bfloat16), ("int8", np.int8), ("fp8", ml_dtypes.float8_e4m3fn)):
        for sequences, context in ((1, 1088), (8, 1088), (32, 1088), (128, 1088), (256, 1088), (32, 4096)):
            caches = [cache_of(device, -(-context // 64) * sequences, dtype)]
            while sum(c.k.nbytes * 2 for c in caches) < 300e6 and len(caches) < 24:
                caches.append(cache_of(device, -(-context // 64) * sequences, dtype))
            batch = decode_batch(device, sequences, context)
            q = random_bytes(device, (sequences, 4096), device.dtype)
            us = microseconds(device, [partial(attention.attention, device, q, batch, c) for c in caches])
            report(f"decode {name} S={sequences} context={context}", us, caches[0].k.nbytes * 2)
        tokens = 2048
        cache, batch = cache_of(device, tokens // 64, dtype), prefill_batch(device, tokens)
        q = random_bytes(device, (tokens, 4096), device.dtype)
        us = microseconds(device, [partial(attention.attention, device, q, batch, cache)])
        report(f"prefill {name} {tokens}", us, q.nbytes * 2 + cache.k.nbytes * 2, 2.0 * tokens * tokens * 4096)


def time_rows(device: Device) -> None:
    weight = device.upload(np.ones(4096, np.float32))
    for m in (1, 32, 256, 2048):
        x, delta = random_bytes(device, (m, 4096), np.float32), random_bytes(device, (m, 4096), device.dtype)
        gate_up = random_bytes(device, (m, 28672), device.dtype)
        for spec in (ActSpec(), ActSpec("int8"), ActSpec("fp8_e4m3")):
            us = microseconds(device, [partial(rows.add_norm, device, x, delta, weight, 1e-5, spec)] * 20)
            report(f"add_norm {spec.format} M={m}", us, m * 4096 * 12)
            us = microseconds(device, [partial(rows.silu_mul, device, gate_up, spec)] * 20)
            report(f"silu_mul {spec.format} M={m}", us, m * 14336 * 6)
    logits = random_bytes(device, (32, 128256), np.float32)
    us = microseconds(device, [partial(rows.argmax, device, logits)])
    report("argmax 32 x 128256", us, logits.nbytes)
    settings: list[Any] = [np.ones(32, np.float32), np.full(32, 50, np.int32), np.full(32, 0.9, np.float32)]
    given = [device.upload(s) for s in [*settings, RNG.random(32).astype(np.float32)]]
    us = microseconds(device, [partial(rows.sample, device, logits, *given)])
    report("sample 32 x 128256 (top-k 50, top-p 0.9)", us, logits.nbytes)


def main(arguments: list[str]) -> None:
    device = Device("bfloat16")
    print(device.name, device.arch)
    wanted = [a for a in arguments if not a.startswith("--") and not a.endswith(".json")] or [
        "gemm",
        "attention",
        "rows",
    ]
    if "gemm" in wanted:
        time_gemm(device, ["int8", "bf16", "fp8", "w4-128", "w8"], (1, 16, 32, 64, 128, 256))
    if "weight-only" in wanted:
        time_gemm(device, ["w4-128", "w8"], (1, 8, 32, 64))
    if "large" in wanted:
        time_gemm(device, ["int8", "fp8", "bf16", "w4-128"], (2048,))
    if "attention" in wanted:
        time_attention(device)
    if "rows" in wanted:
        time_rows(device)
    if "--json" in arguments:
        with open(arguments[arguments.index("--json") + 1], "w") as out:
            json.dump({"device": device.name, "arch": device.arch, "kernels": RESULTS}, out, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
