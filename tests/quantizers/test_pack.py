from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantbench.errors import CheckpointError
from quantbench.quantizers.pack import pack_int32, unpack_int32

shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)


def test_order_of_the_codes_in_a_word() -> None:
    codes = np.array([[-8, -7, 0, 7, -8, -8, -8, 7]], np.int8)
    assert pack_int32(codes, 4).view(np.uint32)[0, 0] == 0xF000F810


def test_eight_bit_codes_are_stored_with_their_offset() -> None:
    codes = np.array([[-128, -1, 0, 127]], np.int8)
    assert pack_int32(codes, 8).view(np.uint8).tolist() == [[0, 127, 128, 255]]


def test_a_ragged_row_is_padded_with_zero_bits() -> None:
    packed = pack_int32(np.full((2, 9), 7, np.int8), 4)
    assert packed.shape == (2, 2)
    assert packed[:, 1].tolist() == [15, 15]


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.data())
def test_unpack_is_the_inverse(bits: int, data: st.DataObject) -> None:
    low = -(1 << (bits - 1))
    codes = data.draw(hnp.arrays(np.int8, shapes, elements=st.integers(low, -low - 1)))
    packed = pack_int32(codes, bits)
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 32))
    assert np.array_equal(unpack_int32(packed, bits, codes.shape[1]), codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="codes from -9 to 0 do not fit 4 bits"):
        pack_int32(np.array([[-9, 0]], np.int8), 4)


def test_odd_widths_are_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot pack 3-bit codes into int32 words; allowed: 1, 2, 4, 8"):
        pack_int32(np.zeros((1, 1), np.int8), 3)


@pytest.mark.parametrize("columns", [8, 17])
def test_a_wrong_number_of_columns_is_refused(columns: int) -> None:
    with pytest.raises(CheckpointError, match=f"2 words hold 16 codes of 4 bits, not {columns}"):
        unpack_int32(np.zeros((1, 2), np.int32), 4, columns)
