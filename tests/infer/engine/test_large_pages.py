from __future__ import annotations

import gc

import numpy as np
import pytest

from quantbench.infer.engine import large_pages
from quantbench.infer.engine.large_pages import LARGE, large_zeros


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, LARGE // 8), (LARGE // 4,), (LARGE // 4 + 1, 1)])
def test_zeros_that_can_be_written_and_live_as_long_as_they_are_used(shape: tuple[int, ...]) -> None:
    array = large_zeros(shape)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.float32, True)
    assert not array.any()
    array[...] = 7
    part = array[-1]
    del array
    gc.collect()
    assert (part == 7).all()


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(large_pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert not large_zeros((LARGE,)).any()
