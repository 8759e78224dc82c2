"""What the layers of one step need to know, on the device: indices of tokens and sequences, and the cache's pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.infer.cuda.array import DeviceArray

Lengths = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class DeviceBatch:
    """`types.Batch` on the device. The host numbers bound grids; lengths are read on the device, so that a captured
    graph serves every step. A padded row has slot -1 and its sequence context 0: nothing is written for it."""

    ids: DeviceArray  # i32[T]
    positions: DeviceArray  # i32[T]
    slots: DeviceArray  # i64[T]
    starts: DeviceArray  # i32[S + 1]
    context: DeviceArray  # i32[S]
    tables: DeviceArray  # i32[S, P]
    decode: bool  # every sequence has one row
    max_context: int  # no context is longer
    max_rows: int  # no sequence has more rows
    lengths: Lengths | None = None  # host: rows of each sequence, where one has more than one
    contexts: Lengths | None = None  # host: as `context`, where one has more than one
    tiles: dict[int, DeviceArray] = field(default_factory=dict)  # of prompt attention, made by the step's first layer

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def sequences(self) -> int:
        return len(self.context)


@dataclass(frozen=True)
class DeviceCache:
    """`types.LayerCache` on the device: pages [pages, kv_heads, 64, head_dim], scales f32[kv_heads], or dynamic
    f32[pages, kv_heads, 64]."""

    k: DeviceArray
    v: DeviceArray
    k_scale: DeviceArray
    v_scale: DeviceArray

    @property
    def dynamic(self) -> bool:
        return len(self.k_scale.shape) == 3

    @property
    def arrays(self) -> list[DeviceArray]:
        """Everything that is kept per page, as in `LayerCache`."""
        return [self.k, self.v, self.k_scale, self.v_scale] if self.dynamic else [self.k, self.v]
