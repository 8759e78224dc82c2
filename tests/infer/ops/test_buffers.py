"""A buffer is used again exactly when nobody can see it any more."""

from __future__ import annotations

import numpy as np

from quantbench.infer.ops.buffers import KEPT, SMALL, Buffers

F32 = np.dtype(np.float32)
SHAPE = (3, SMALL)


def test_an_array_in_use_is_never_handed_out_again() -> None:
    buffers = Buffers()
    held = [buffers.array(SHAPE, F32) for _ in range(KEPT + 2)]
    for i, array in enumerate(held):
        array[:] = i
    assert [float(array.max()) for array in held] == list(range(KEPT + 2))


def test_a_view_keeps_its_buffer() -> None:
    buffers = Buffers()
    view = buffers.array(SHAPE, F32)[1:, 5].T
    view[:] = 7
    buffers.array(SHAPE, F32)[:] = 0
    assert np.all(view == 7)


def test_a_released_buffer_comes_back() -> None:
    buffers = Buffers()
    first = buffers.array(SHAPE, F32)
    address = first.ctypes.data
    del first
    again = buffers.array(SHAPE, np.dtype(np.int8))
    assert again.dtype == np.int8
    assert again.shape == SHAPE
    del again
    assert buffers.array(SHAPE, F32).ctypes.data == address


def test_small_arrays_are_plain() -> None:
    small = Buffers().array((2, 3), F32)
    assert small.base is None
