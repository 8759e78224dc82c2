"""What a calibrating process does with its memory and its cores: settings of the C library and of BLAS.

What each does to a run's time and memory is told in docs/measuring.md, "What a calibration costs".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

from quantbench.calibrate.observe import native_ops

# malloc.h: parameters of mallopt
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def reuse_freed_memory() -> None:
    """One heap for all threads; what is freed stays for the next array, up to 64 MiB at its end.

    For the life of the process, and best before its first thread. C libraries other than glibc have nothing to set.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 16 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def give_freed_memory_back() -> None:
    """What is freed and unused goes back to the system now: between stages that need different arrays."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Inside, a matrix product of numpy or of our own kernels takes one thread: cores work on several side by side.

    Two threads that call a BLAS of two threads wait for each other, and the last bits of its product depend on how many
    share it: with one, calibration gives the same bytes whatever the number of cores.
    """
    ops = native_ops()
    threads = ops.threads if ops else 1
    with threadpool_limits(limits=1, user_api="blas"):
        if ops:
            ops.set_threads(1)
        try:
            yield
        finally:
            if ops:
                ops.set_threads(threads)
