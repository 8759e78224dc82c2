"""Speed of random weights on a GPU: prefill, decode by batch, the ceilings they are held against, a profile by kernel.

Everything large on such a GPU is limited by its power: clocks fall after the first milliseconds. So a decode figure is
the mean of the second half of about a second of steps, host loop included, and a prefill figure likewise.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ml_dtypes
import numpy as np

from quantbench.infer.cuda.blas import Blas, open_blas
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, E4M3
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.cuda.random import fill_random, random_engine
from quantbench.infer.cuda.runner import CudaRunner
from quantbench.infer.engine.engine import Engine
from quantbench.infer.engine.request import Request
from quantbench.infer.engine.sampling import SamplingParams
from quantbench.infer.engine.scheduler import Running

SUSTAINED_S = 1.0
PROMPT_TOKENS = 8192  # of one prefill step


@dataclass(frozen=True)
class CudaLoad:
    """What is measured. Tokens and sequences; a decode batch goes from `context` to `context + output` tokens."""

    config: str = "llama-3-8b"
    context: int = 1024
    output: int = 128
    batches: tuple[int, ...] = (1, 32, 128, 256)
    dtype: str = "bfloat16"
    profile: bool = False

    @property
    def length(self) -> int:
        return self.context + self.output

    @property
    def prompts(self) -> int:
        """Of one prefill step: whole ones, so that a step computes all of what it is counted for."""
        return max(1, min(PROMPT_TOKENS // self.context, max(self.batches)))


def bench_modes(modes: list[str], load: CudaLoad, progress: Callable[[str], None]) -> dict[str, Any]:
    """The content of a benchmark file: machine, ceilings, and per mode prefill and decode figures."""
    device = Device(load.dtype)
    progress("ceilings")
    ceilings = measure_ceilings(device)
    device.release()
    found: dict[str, Any] = {}
    for mode in modes:
        ops = CudaOps(load.dtype)
        found[mode] = bench_mode(mode, ops, load, ceilings, progress)
        ops.device.release()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(device),
        "load": {
            "config": load.config, "context": load.context, "output": load.output, "dtype": load.dtype,
            "prefill_tokens": PROMPT_TOKENS, "sustained_s": SUSTAINED_S,
        },
        "ceilings": ceilings,
        "modes": found,
    }  # fmt: skip


def bench_mode(
    mode: str, ops: CudaOps, load: CudaLoad, ceilings: dict[str, float], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of one mode. `share_of_ceiling`: the larger of bytes over bandwidth and operations over matrix peak,
    over the measured time."""
    engine = random_engine(load.config, mode, ops, max(load.batches), load.length, load.prompts * load.context)
    progress(f"{mode} prefill")
    row: dict[str, Any] = {"memory": engine.memory, "prefill": prefill(engine, load, ceilings), "decode": {}}
    if load.profile:
        row["prefill"]["profile_us"] = profile_prefill(engine, load)
    for batch in load.batches:
        progress(f"{mode} decode {batch}")
        seconds, gpu_seconds = decode_step(engine, batch, load)
        context = load.context + load.output // 2
        found = achieved(engine, batch, context, seconds, ceilings)
        row["decode"][str(batch)] = {
            "step_ms": seconds * 1e3,
            "graph_ms": gpu_seconds * 1e3,
            "tokens_per_s": batch / seconds,
        } | found
        if load.profile:
            row["decode"][str(batch)]["profile_us"] = profile(engine, batch, load)
    return row


def prefill(engine: Engine, load: CudaLoad, ceilings: dict[str, float]) -> dict[str, float]:
    """Steps of a queue of prompts of `context` tokens, `PROMPT_TOKENS` a step, as many as it takes to be sustained."""
    each = load.prompts
    random = np.random.default_rng(0)

    def steps(count: int) -> list[float]:
        for prompt in random.integers(0, engine.config.vocab_size, (count * each, load.context)).tolist():
            engine.add(Request(prompt, SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)))
        times, last = [], time.perf_counter()
        for _ in range(count):
            engine.step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return times

    times = steps(math.ceil(SUSTAINED_S / steps(2)[-1]))
    seconds = float(np.mean(times[len(times) // 2 :]))
    tokens = each * load.context
    operations = tokens * (engine.operations_per_token(load.context // 2) - _head_operations(engine))
    return {
        "tokens_per_s": tokens / seconds,
        "tflop_per_s": operations / seconds / 1e12,
        "share_of_ceiling": operations / seconds / (ceilings[_peak(engine)] * 1e12),
    }


def _head_operations(engine: Engine) -> float:
    return float(sum(2 * p.shape[0] * p.shape[1] for p in engine.runner.model.head.packed))


def _peak(engine: Engine) -> str:
    return "matrix_8bit_tflop_per_s" if engine.mode.activations else "matrix_bf16_tflop_per_s"


def admit(engine: Engine, batch: int, load: CudaLoad) -> list[Running]:
    """`batch` sequences that have `context` - 1 tokens in the cache, without computing them."""
    ids = np.random.default_rng(1).integers(0, engine.config.vocab_size, (batch, load.context)).tolist()
    params = SamplingParams(max_tokens=load.output, ignore_eos=True, detokenize=False)
    admitted = []
    for prompt in ids:
        number = engine.add(Request(prompt, params))
        sequence = engine.scheduler.waiting.pop()
        assert sequence.number == number
        engine.scheduler.place(sequence, load.context - 1)
        admitted.append(sequence)
    return admitted


def decode_step(engine: Engine, batch: int, load: CudaLoad) -> tuple[float, float]:
    """Seconds of one decode step with the host's loop, and of its graph alone, replayed back to back."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    times: list[float] = []
    while sum(times) < SUSTAINED_S:
        admitted = admit(engine, batch, load)
        for _ in range(4):  # captures the graph, fills the pipeline
            engine.step()
        start = time.perf_counter()
        for _ in range(load.output - 8):
            engine.step()
            now = time.perf_counter()
            times.append(now - start)
            start = now
        for sequence in admitted:
            engine.abort(sequence.number)
    seconds = float(np.mean(times[len(times) // 2 :]))
    return seconds, runner.graph_seconds(max(4, int(SUSTAINED_S / 4 / seconds)))


def achieved(engine: Engine, batch: int, context: int, seconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    moved = batch * engine.bytes_per_token(batch, context)
    operations = batch * engine.operations_per_token(context)
    floor = max(moved / (ceilings["read_tb_per_s"] * 1e12), operations / (ceilings[_peak(engine)] * 1e12))
    return {
        "tb_per_s": moved / seconds / 1e12,
        "tflop_per_s": operations / seconds / 1e12,
        "share_of_ceiling": floor / seconds,
    }


def profile_prefill(engine: Engine, load: CudaLoad) -> dict[str, float]:
    """Microseconds of one prefill step by kernel, each timed alone."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    prompts = np.random.default_rng(2).integers(0, engine.config.vocab_size, (load.prompts, load.context)).tolist()
    params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    return _by_kernel(runner.device.timed(lambda: _drop(engine.generate(prompts, params))))


def _drop(result: object) -> None:
    """Only the launches are of interest."""


def _by_kernel(launches: list[tuple[str, float]]) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for name, seconds in launches:
        spent[name] += seconds * 1e6
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def profile(engine: Engine, batch: int, load: CudaLoad) -> dict[str, float]:
    """Microseconds of one decode step by kernel, each timed alone: without graphs and without overlap."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    admitted = admit(engine, batch, load)
    engine.step()
    spent = _by_kernel(runner.device.timed(runner.repeat))
    for sequence in admitted:
        engine.abort(sequence.number)
    return spent


def measure_ceilings(device: Device) -> dict[str, float]:
    """Sustained: bytes read from memory, and matrix products of cuBLASLt on random numbers (0 without it)."""
    big = device.empty((4 << 30,), np.uint8)
    fill_random(device, big, 4)
    reader = device.kernel("bench.cu", "read_all", KIND=4)
    grid = 8 * device.multiprocessors

    def read() -> None:
        device.launch(reader, grid, 512, big, np.int64(big.nbytes // 16), device.bad)

    found = {"read_tb_per_s": big.nbytes / sustained(device, read) / 1e12}
    blas = open_blas(device)
    for name, kind, dtype in (("bf16", BF16, ml_dtypes.bfloat16), ("8bit", E4M3, ml_dtypes.float8_e4m3fn)):
        usable = blas is not None and (kind == BF16 or device.capability == (9, 0))
        found[f"matrix_{name}_tflop_per_s"] = product(device, blas, kind, dtype) if usable and blas else 0.0
    return found


def product(device: Device, blas: Blas, kind: int, dtype: Any, size: int = 8192) -> float:
    """TFLOP/s of a square matrix product."""
    x, w = (device.empty((size, size), dtype) for _ in range(2))
    out = device.empty((size, size), ml_dtypes.bfloat16)
    scale = device.empty((size,), np.float32)
    device.write(scale, np.full(size, 1e-2, np.float32))
    for seed, array in enumerate((x, w)):
        fill_random(device, array, kind, 1.0, seed)
    scales = (scale, scale) if kind == E4M3 else None
    return float(2.0 * size**3 / sustained(device, lambda: blas.matmul(x, w, out, scales)) / 1e12)


def sustained(device: Device, work: Callable[[], None]) -> float:
    """Seconds of `work`, the mean over the second half of about a second of it."""

    def times(count: int) -> float:
        def run() -> None:
            for _ in range(count):
                work()

        return device.seconds(run) / count

    count = max(4, int(SUSTAINED_S / times(3) / 2))
    times(count)
    return times(count)


def describe(device: Device) -> dict[str, Any]:
    """GPU, driver and versions, for the record."""
    packages = ("cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cublas", "numpy")
    return {
        "gpu": device.name,
        "arch": device.arch,
        "multiprocessors": device.multiprocessors,
        "memory_bytes": device.memory[1],
        "driver": device.driver_version,
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
