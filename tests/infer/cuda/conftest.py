"""A GPU where there is one: tests that need it ask for `device`, and are skipped with the reason elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from quantbench.errors import DependencyError
from quantbench.infer.cuda.device import DTYPES, Device


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The GPU, opened once for all tests."""
    try:
        return Device()
    except DependencyError as error:
        pytest.skip(f"runs on a machine with an NVIDIA GPU: {error}")


@pytest.fixture
def device(gpu: Device) -> Device:
    """The GPU holding float32 between operations, its step memory poisoned: 0xFF everywhere is NaN as a float."""
    return poisoned(gpu, "float32")


@pytest.fixture
def device_bf16(gpu: Device) -> Device:
    """The same, holding bfloat16 between operations."""
    return poisoned(gpu, "bfloat16")


def poisoned(gpu: Device, dtype: str) -> Device:
    gpu.dtype, gpu.exact = DTYPES[dtype], dtype == "exact"
    gpu.fill(gpu.empty((256 << 20,), np.uint8), 0xFF)
    gpu.fill(gpu.bad, 0)
    gpu.synchronize()
    return gpu
