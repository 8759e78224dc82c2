"""Outputs without page faults: large arrays come from buffers that are used again once nobody holds them.

A fresh array of megabytes costs a page fault per 4 KiB, which for an int8 prefill is more than the multiplication. A
buffer is free when only this list refers to it: every array handed out is a view that keeps its buffer alive.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

from quantbench.infer.ops.types import Array

SMALL = 1 << 16  # bytes; below, malloc reuses memory by itself
_UNUSED = 3  # references to a free buffer while it is looked at: the list, the loop's variable, the call's argument
KEPT = 4  # free buffers per size that are kept


class Buffers(threading.local):
    """One set per thread, so that no two threads find the same buffer free."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[Array]] = {}

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialized C-contiguous array. `dtype` is an object: making one from a type costs time."""
        needed = math.prod(shape) * dtype.itemsize
        if needed < SMALL:
            return np.empty(shape, dtype)
        flat = self._free(1 << (needed - 1).bit_length())[:needed]
        array: Array = flat.view(dtype).reshape(shape)
        return array

    def _free(self, size: int) -> Array:
        buffers = self._by_size.setdefault(size, [])
        for buffer in buffers:
            if sys.getrefcount(buffer) == _UNUSED:
                return buffer
        fresh = np.empty(size, np.uint8)
        if len(buffers) < KEPT:
            buffers.append(fresh)
        return fresh
