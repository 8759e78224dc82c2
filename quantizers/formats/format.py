"""A number format is a record: how many bits, which codes, how a range becomes a scale, how values become codes.

This numpy code is the reference that Paddle's simulation, the C++ and the CUDA kernels must equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.registry import Registry
from quantbench.scales.arrays import F32, I32, Array

SMALLEST_SCALE = np.float32(np.finfo(np.float32).tiny)  # below it float32 loses digits, and some machines flush to zero


@dataclass(frozen=True)
class Format:
    """One quantized format. `qmin` and `qmax` bound the codes; a range divided by `divisor` is its scale."""

    name: str
    bits: int
    qmin: int
    qmax: float
    divisor: float
    storage: np.dtype[np.generic]  # of one code in memory
    packed_storage: np.dtype[np.generic]  # of the words in a checkpoint

    @property
    def integer(self) -> bool:
        return self.storage.kind == "i"

    def scale_of(self, absmax: F32) -> F32:
        """absmax / divisor, float32, same shape. 1 where the range is zero or so small that the scale is subnormal.

        Raises CalibrationError for NaN, infinite or negative ranges.
        """
        absmax = np.asarray(absmax, np.float32)
        if not np.all(np.isfinite(absmax) & (absmax >= 0)):
            raise CalibrationError(f"{self.name}: a range is NaN, infinite or negative; ranges are finite and >= 0")
        scale = absmax / np.float32(self.divisor)
        return np.where(scale < SMALLEST_SCALE, np.float32(1), scale).astype(np.float32)

    def affine_of(self, minimum: F32, maximum: F32) -> tuple[F32, I32]:
        """Scale and zero point (a code) that span [min(minimum, 0), max(maximum, 0)]; value = (code - zero) * scale.

        Jacob et al. 2018 (arXiv 1712.05877) eq. 1 and section 3: zero itself is always a code. Integer formats only.
        """
        low, high = np.minimum(minimum, np.float32(0)), np.maximum(maximum, np.float32(0))
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
            raise CalibrationError(f"{self.name}: a range is NaN or infinite; ranges are finite")
        step = high / np.float32(self.qmax - self.qmin) - low / np.float32(self.qmax - self.qmin)
        scale = np.where(step < SMALLEST_SCALE, np.float32(1), step).astype(np.float32)
        zero = np.clip(np.rint(self.qmin - low / scale), self.qmin, self.qmax)
        return scale, zero.astype(np.int32)

    def encode(self, x: F32, scale: F32, zero: I32 | None = None) -> Array:
        """Codes of finite `x`: clip(round_half_even(x / scale) + zero, qmin, qmax) in float32; e4m3: the cast rounds.

        Division, not multiplication by a reciprocal: the two differ in the last bit and so in some codes.
        """
        q = np.asarray(np.asarray(x, np.float32) / scale)
        if self.integer:
            np.rint(q, out=q)
        if zero is not None:
            q = np.asarray(q + zero.astype(np.float32))
        np.maximum(q, np.float32(self.qmin), out=q)
        return np.minimum(q, np.float32(self.qmax), out=q).astype(self.storage)

    def decode(self, codes: Array, scale: F32, zero: I32 | None = None) -> F32:
        """(codes - zero) * scale in float32."""
        q = codes.astype(np.float32)
        if zero is not None:
            q -= zero.astype(np.float32)
        return np.asarray(q * scale, np.float32)


FORMATS: Registry[Format] = Registry("format")
