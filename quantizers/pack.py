"""Dense packing of small integer codes into int32 words, in compressed-tensors' order.

Code c of `bits` bits is stored as c + 2^(bits-1); element i of a row starts at bit i*bits of the row, little end
first. A row whose bits are no multiple of 32 is padded with zero bits.
"""

from __future__ import annotations

import numpy as np

from quantbench.errors import CheckpointError
from quantbench.scales.arrays import I32, Array


def pack_int32(codes: Array, bits: int) -> I32:
    """int8 codes [N, K] -> int32 words [N, ceil(K*bits/32)]. `bits` divides 32. Raises CheckpointError otherwise."""
    per_word = _codes_per_word(bits)
    rows, columns = codes.shape
    unsigned = codes.astype(np.int32) + (1 << (bits - 1))
    if unsigned.size and (unsigned.min() < 0 or unsigned.max() >= 1 << bits):
        raise CheckpointError(f"codes from {codes.min()} to {codes.max()} do not fit {bits} bits")
    padded = np.zeros((rows, -(-columns // per_word) * per_word), np.uint32)
    padded[:, :columns] = unsigned
    words = np.zeros((rows, padded.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        words |= padded[:, i::per_word] << np.uint32(i * bits)
    return words.view(np.int32)


def unpack_int32(packed: I32, bits: int, columns: int | None = None) -> Array:
    """int32 words [N, W] -> int8 codes [N, columns]; `columns` drops the padding (default: every code of the words)."""
    per_word = _codes_per_word(bits)
    words = np.ascontiguousarray(packed, "<i4")
    stored = words.view(np.uint8)  # no code crosses a byte: bytes are a quarter of the work that words are
    per_byte = per_word // 4
    codes = np.empty((words.shape[0], words.shape[1] * per_word), np.int8)
    mask, offset = np.uint8((1 << bits) - 1), np.uint8(1 << (bits - 1))
    for i in range(per_byte):
        field = stored & mask if i == 0 else (stored >> np.uint8(i * bits)) & mask
        codes[:, i::per_byte] = np.subtract(field, offset, out=field).view(np.int8)  # wraps below 0, as int8 does
    if columns is not None and not 0 <= codes.shape[1] - columns < per_word:
        raise CheckpointError(f"{words.shape[1]} words hold {codes.shape[1]} codes of {bits} bits, not {columns}")
    return codes[:, :columns]


def _codes_per_word(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise CheckpointError(f"cannot pack {bits}-bit codes into int32 words; allowed: 1, 2, 4, 8")
    return 32 // bits
