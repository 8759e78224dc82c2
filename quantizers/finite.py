"""The door every number passes before it is quantized: NaN and Inf have no code, so they stop here, by name."""

from __future__ import annotations

import numpy as np

from quantbench.errors import CalibrationError
from quantbench.scales.arrays import Array


def require_finite(x: Array, name: str) -> None:
    """Raises CalibrationError that names the tensor and the first bad position."""
    bad = ~np.isfinite(x)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CalibrationError(
            f"{name}: {int(bad.sum())} of {x.size} values are NaN or Inf (first at {first}: {x[first]}); "
            "only finite values can be quantized: check the model's weights and dtype"
        )
