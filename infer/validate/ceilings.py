"""What this machine can do at best with the threads in use, measured, not looked up: the denominators of every share.

The native kernels measure themselves with the instruction set they run with: reading a buffer far larger than the
caches, and the inner products of their own matrix kernels on registers. The numpy column is measured through numpy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from quantbench.errors import DependencyError, unknown
from quantbench.infer.validate.machine import native_kernels
from quantbench.infer.validate.roofline import Ceilings

READ_BYTES = 256 << 20
SIZE = 768


def measure_ceilings(ops: str = "cpu", threads: int | None = None) -> Ceilings:
    """Read bandwidth in GB/s, float32 and int8 × int8 peaks in GOP/s (a multiplication and an addition are two).

    Raises DependencyError for an unknown op table, and for "cpu" without the compiled extension.
    """
    if ops == "reference":
        return _numpy_ceilings()
    if ops != "cpu":
        raise DependencyError(unknown("operations backend", ops, ("cpu", "reference")))
    measured = native_kernels().ceilings(threads or 0)
    return Ceilings(*(float(measured[k]) for k in ("read_gb_per_s", "float32_gop_per_s", "int8_gop_per_s")))


def _numpy_ceilings() -> Ceilings:
    """numpy multiplies codes as floats: its int8 peak is its float32 peak."""
    buffer = np.ones(READ_BYTES // 4, np.float32)
    a = np.ones((SIZE, SIZE), np.float32)
    read = buffer.nbytes / best_seconds(lambda: buffer.dot(buffer)) / 1e9
    peak = 2.0 * SIZE**3 / best_seconds(lambda: a.dot(a)) / 1e9
    return Ceilings(read, peak, peak)


def best_seconds(work: Callable[[], object], rounds: int = 4) -> float:
    """The shortest of `rounds` runs after one to warm up: a ceiling is what the machine can do undisturbed."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
