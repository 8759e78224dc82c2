"""Numbers that kernels know dtypes by: the enum in kernels/common.cuh, equal to the kinds of infer/ops/pack.py."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

F32, BF16, F16, INT8, INT4, E4M3 = range(6)
KINDS: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): F32,
    np.dtype(ml_dtypes.bfloat16): BF16,
    np.dtype(np.float16): F16,
    np.dtype(np.int8): INT8,
    np.dtype(ml_dtypes.float8_e4m3fn): E4M3,
}
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
CODES = {"int8": INT8, "fp8_e4m3": E4M3}  # of an ActSpec's format


def kind_of(dtype: np.dtype[Any]) -> int:
    return KINDS[np.dtype(dtype)]
