"""Settings of the process: they must do something, whatever the machine's libraries are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from quantbench.infer.ops.cpu import CpuOps
from quantbench.process import give_freed_memory_back, one_thread_per_product, reuse_freed_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_freed_arrays_stay_until_they_are_given_back() -> None:
    reuse_freed_memory()
    arrays = [np.ones(8 << 20, np.uint8) for _ in range(16)]
    full = resident_bytes()
    del arrays[:-1]  # the last one holds the top of the heap
    kept = resident_bytes()
    give_freed_memory_back()
    assert full - kept < 8 << 20
    assert full - resident_bytes() > 100 << 20


def test_inside_a_product_takes_one_thread() -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    ops = CpuOps()
    before, pool = threads(), ops.set_threads(2)
    with one_thread_per_product():
        assert threads() == [1] * len(before)
        assert ops.threads == 1
    assert threads() == before != []
    assert ops.threads == pool
    ops.set_threads(None)
