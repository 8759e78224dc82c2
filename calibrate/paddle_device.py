"""Importing PaddlePaddle, choosing its device, and using every core of a CPU: what is not maths in the forward."""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from quantbench.errors import CalibrationError, DependencyError

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def quiet_import() -> Iterator[None]:
    """For imports that print warnings and set up the whole program's logging, as Paddle's and PaddleSlim's do."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    root.level, root.handlers[:] = before


@cache
def import_paddle() -> Any:
    """The `paddle` module, quiet, with one thread for each of its operators. Raises DependencyError."""
    if _is_amd():
        # Paddle's MKL (2019) takes a slow path on AMD unless told that the CPU has AVX2: 39 -> 99 GFLOP/s per core.
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    os.environ.setdefault("GLOG_minloglevel", "2")
    # Transposed tensors as copies: a view is walked element by element by what reads it (1.2 times a block's time).
    os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    threads = os.environ.get("OMP_NUM_THREADS")
    with quiet_import():
        try:
            import paddle
        except ImportError as error:
            raise DependencyError(
                f"calibration computes with PaddlePaddle, which cannot be imported here ({error}). Install it with: "
                'pip install "paddlepaddle>=3.3,<3.4" (CPU), or paddlepaddle-gpu of the same version for a GPU'
            ) from error
    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)  # its import sets it to 1, for us and for every child process
    paddle.base.core.set_num_threads(1)
    return paddle


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return int(os.environ.get("OMP_NUM_THREADS", "0")) or cores


def select_device(paddle: Any, device: str) -> None:
    """Make `device` ("cpu", "gpu:0", …) Paddle's own. Raises CalibrationError naming those it has."""
    try:
        paddle.set_device(device)
    except (ValueError, RuntimeError) as error:
        has = ", ".join(["cpu", *paddle.device.get_available_device()])
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"device {device!r} cannot be used by this PaddlePaddle ({reason}). It has: {has}"
        ) from error


def each(threads: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work(item)` for every item, `threads` of them at once; results in the order of `items`.

    At most `threads` items are begun and not yet taken.
    """
    if threads == 1:
        yield from map(work, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        pending = deque(pool.submit(work, item) for item in islice(remaining, threads))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")[:4096]
