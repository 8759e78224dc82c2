from __future__ import annotations

import ml_dtypes
import numpy as np

from quantbench.infer.cuda.array import DeviceArray


def test_rows_and_views_are_the_same_memory() -> None:
    array = DeviceArray(4096, (10, 6), np.dtype(ml_dtypes.bfloat16))
    assert (array.size, array.nbytes, len(array)) == (60, 120, 10)
    part = array.rows(2, 5)
    assert (part.pointer, part.shape) == (4096 + 24, (3, 6))
    assert array.view((3, 5), np.dtype(np.float32)).nbytes == 60
    assert DeviceArray(4096, (0, 6), np.dtype(np.int8)).rows(0, 0).nbytes == 0


def test_a_part_keeps_its_memory_alive() -> None:
    owner = object()
    array = DeviceArray(0, (4, 2), np.dtype(np.float32), owner)
    assert array.rows(1, 2).owner is owner
    assert array.view((2,)).owner is owner
