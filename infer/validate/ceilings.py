"""What this machine can do at best with the threads in use, measured, not looked up: the denominators of every share.

The native kernels measure themselves with the instruction set they run with: summing a buffer far larger than the
caches, and multiply-accumulate on registers. The numpy column is measured through numpy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from quantbench.errors import DependencyError, unknown
from quantbench.infer.ops.cpu import CpuOps, set_threads
from quantbench.infer.validate.roofline import Ceilings

READ_BYTES = 256 << 20
ROUNDS = 40  # of reading, a quarter of a second; the best counts
PEAK_SECONDS = 0.15
SIZE = 768  # of the numpy column's matrix product


def measure_ceilings(ops: str = "cpu", threads: int | None = None) -> Ceilings:
    """Read bandwidth in GB/s, float32, int8 × int8 and bf16 peaks in GOP/s (a multiplication and an addition are two).

    Raises DependencyError for an unknown op table, and for "cpu" without the compiled extension.
    """
    if ops == "reference":
        return _numpy_ceilings()
    if ops == "cuda":
        return _cuda_ceilings()
    if ops != "cpu":
        raise DependencyError(unknown("operations backend", ops, ("cpu", "cuda", "reference")))
    kernels = CpuOps().kernels
    set_threads(threads)
    read = kernels.read_gb_per_s(READ_BYTES, ROUNDS)
    peaks = (kernels.gop_per_s(kind, PEAK_SECONDS) for kind in ("float32", "int8", "bf16"))
    return Ceilings(read, *peaks)


def _cuda_ceilings() -> Ceilings:
    """Floats are multiplied in bf16 there, and int8 codes as fast as e4m3 ones."""
    from quantbench.infer.cuda.bench import measure_ceilings as measure_gpu
    from quantbench.infer.cuda.device import Device

    found = measure_gpu(Device())
    peaks = (found[f"matrix_{name}_tflop_per_s"] * 1e3 for name in ("bf16", "8bit"))
    return Ceilings(found["read_tb_per_s"] * 1e3, *peaks)


def _numpy_ceilings() -> Ceilings:
    """numpy multiplies codes as floats: its int8 peak is its float32 peak."""
    buffer = np.ones(READ_BYTES // 4, np.float32)
    a = np.ones((SIZE, SIZE), np.float32)
    read = buffer.nbytes / best_seconds(lambda: buffer.dot(buffer)) / 1e9
    peak = 2.0 * SIZE**3 / best_seconds(lambda: a.dot(a)) / 1e9
    return Ceilings(read, peak, peak)


def best_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The shortest of `rounds` runs after one to warm up: a ceiling is what the machine can do undisturbed."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
