"""How a weight lies on the device: codes row by row, or in the order in which the kernels of its kind unpack them."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantbench.errors import CheckpointError
from quantbench.infer.cuda import mixed
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, DTYPES, F16, F32, INT4, INT8
from quantbench.infer.cuda.weight import DeviceWeight
from quantbench.infer.ops.pack import INT8_DOT, Part
from quantbench.infer.ops.types import Array

F16_MAX = 65504.0
INT4_BLOCK = 128  # int4 rows are padded to whole blocks of so many inputs


def fields(
    kind: int, rows: int, columns: int, group_size: int, zero: bool, tiled: bool = False
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of a device weight's arrays. Scales and zero points are [K / group, N], one row per group.
    `tiled`: codes as kernels/mixed.cu wants them, where `mixed.packs` says so."""
    groups = -(-columns // group_size) if group_size else 1
    if tiled:
        codes: tuple[tuple[int, ...], Any] = mixed.tiles_shape(kind, rows, columns), np.dtype(np.uint8)
    elif kind == INT4:
        codes = (rows, -(-columns // INT4_BLOCK) * INT4_BLOCK // 2), np.dtype(np.uint8)
    else:
        codes = (rows, columns), DTYPES[INT8 if kind == INT8_DOT else kind]
    out = {"codes": codes}
    if kind not in (F32, BF16, F16):
        out["scale"] = (groups, rows), np.dtype(np.float32)
    if zero:
        out["zero"] = (groups, rows), np.dtype(np.int32)
    return out


def pack(device: Device, part: Part) -> DeviceWeight:
    """The weights of `part` on the device: codes row by row, or in the order in which kernels unpack them. Where
    float16 passes between operations, float weights are held in it too: products want both alike. Raises
    CheckpointError for a weight beyond float16's range."""
    codes = np.concatenate(part.codes) if len(part.codes) > 1 else part.codes[0]
    kind = part.kind
    if part.activations is None and mixed.packs(
        device, kind, (part.rows, part.columns), part.group_size, part.zero is not None
    ):
        codes = mixed.pack_tiles(kind, codes)
    elif kind == INT4:
        codes = pack_int4(codes)
    if kind in (BF16, F32) and device.dtype == np.float16:
        codes, kind = _as_float16(codes, part.names), F16
    return DeviceWeight(
        kind,
        part.rows,
        part.columns,
        device.upload(np.ascontiguousarray(codes)),
        None if part.scale is None else device.upload(np.ascontiguousarray(part.scale.T)),
        None if part.zero is None else device.upload(np.ascontiguousarray(part.zero.T)),
        part.group_size,
        None if part.bias is None else device.upload(part.bias),
        part.activations,
    )


def _as_float16(codes: Array, names: tuple[str, ...]) -> Array:
    wide = codes.astype(np.float32)
    if (largest := float(np.abs(wide).max(initial=0.0))) > F16_MAX:
        raise CheckpointError(
            f"{', '.join(names)}: a weight of magnitude {largest:.6g} is beyond float16's {F16_MAX:.0f}; "
            f"set QUANTBENCH_CUDA_DTYPE to bfloat16 or float32"
        )
    return wide.astype(np.float16)


def pack_int4(codes: Array) -> Array:
    """int8 codes [N, K] in -8..7 as bytes [N, ceil(K / 128) * 64].

    A word holds eight neighbours, stored as code + 8, in nibbles 0 2 4 6 1 3 5 7 of increasing input: two neighbours
    then stand 16 bits apart, where tensor-core registers want them. The 16 words of 128 inputs are transposed as a
    4 x 4 matrix, so that the 16 bytes that lane t of four reads are inputs 8t.. of each run of 32: a tensor-core step
    then takes 32 inputs of one group.
    """
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // INT4_BLOCK) * INT4_BLOCK), np.int8)
    padded[:, :columns] = codes
    nibbles = (padded.reshape(rows, -1, 8) + 8).astype(np.uint32)
    words = np.zeros(nibbles.shape[:2], np.uint32)
    for i in range(8):
        words |= nibbles[:, :, i] << np.uint32(4 * (i % 2 * 4 + i // 2))
    words = words.reshape(rows, -1, 4, 4).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(words).reshape(rows, -1).view(np.uint8)
