"""Every native test runs once per instruction set that this processor has."""

from __future__ import annotations

import pytest

from quantbench.infer.ops.cpu import CpuOps, available_isas
from quantbench.infer.ops.reference import ReferenceOps


@pytest.fixture(scope="session", params=available_isas())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(request.param)


@pytest.fixture(scope="session")
def reference() -> ReferenceOps:
    return ReferenceOps()
