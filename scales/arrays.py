"""Names for the array types that scale tables and quantizers exchange. The dtype is part of the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]  # stored tensors: int8, int32, int64, bfloat16, float8_e4m3fn, float16, float32
