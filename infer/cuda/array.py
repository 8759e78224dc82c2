"""Arrays on the device: an address, a shape and a dtype. No arithmetic: kernels do that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DeviceArray:
    """C-contiguous memory of the device. `owner` keeps the memory from being used again while the array lives."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> DeviceArray:
        """Rows start..stop, in place."""
        stride = self.nbytes // self.shape[0] if self.shape[0] else 0
        return DeviceArray(self.pointer + start * stride, (stop - start, *self.shape[1:]), self.dtype, self.owner)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None) -> DeviceArray:
        """The first bytes of the same memory under another shape and dtype."""
        return DeviceArray(self.pointer, shape, dtype or self.dtype, self.owner)
