"""One linear on the device, as gemm.py packed it."""

from __future__ import annotations

from dataclasses import dataclass

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.ops.types import Packed


@dataclass(frozen=True)
class DeviceWeight:
    """Weights [rows, columns] of one kind (infer/ops/pack.py). `codes`, `scale` and `zero` lie as `layout.fields` says;
    `activations` is how the input arrives: None for floats."""

    kind: int
    rows: int
    columns: int
    codes: DeviceArray
    scale: DeviceArray | None = None
    zero: DeviceArray | None = None
    group_size: int = 0
    bias: DeviceArray | None = None
    activations: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.codes, self.scale, self.zero, self.bias) if a is not None)


@dataclass(frozen=True)
class CudaPacked(Packed):
    """What `pack` made of a fused group: one weight for each run of rows that are held alike."""

    weights: tuple[DeviceWeight, ...] = ()
