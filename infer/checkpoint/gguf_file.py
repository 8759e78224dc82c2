"""The header of a GGUF file: its fields and where its tensors lie; and the values of a tensor.

The header is read here because the `gguf` library makes several numpy arrays of every string, which for a vocabulary of
150,000 tokens takes seconds. Block formats are decoded by the library, many blocks at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf.quants
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from quantbench.infer.checkpoint.shard import Array, map_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_FLOATS: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_TOGETHER = 1 << 18  # values decoded together: the library's intermediate arrays then stay within the L2 cache


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file; `shape` in numpy order (GGUF lists the fastest dimension first)."""

    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self._byte_shape)

    @property
    def _byte_shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in quant_shape_to_byte_shape(self.shape, self.kind))

    def read(self, rows: slice = slice(None)) -> Array:
        """float32, dequantized; `rows` restricts the first dimension."""
        raw = map_bytes(self.file, self.offset, self.nbytes).reshape(self._byte_shape)[rows]
        return decode(np.ascontiguousarray(raw), self.kind)


def decode(raw: Array, kind: GGMLQuantizationType) -> Array:
    """Bytes u8[…, row bytes] as float32[…, row]."""
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind]).astype(np.float32)
    values, size = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size)
    decode_blocks: Callable[[Array], Array] = getattr(gguf.quants, kind.name).dequantize_blocks
    out = np.empty((len(blocks), values), np.float32)
    step = max(1, _TOGETHER // values)
    for first in range(0, len(blocks), step):
        out[first : first + step] = decode_blocks(blocks[first : first + step])
    return out.reshape(*raw.shape[:-1], raw.shape[-1] // size * values)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Fields by key (strings, numbers, lists of them) and tensors by name.

    Raises ValueError, saying what is wrong, where the file is not GGUF, is truncated or lists a thing twice.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{size} bytes")
    header = _Header(map_bytes(path, 0, size))
    try:
        fields = header.fields()
        tensors = header.tensors(path, int(fields.get("general.alignment", _ALIGNMENT)))
    except struct.error:
        raise ValueError("it ends within its header") from None
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > size:
            raise ValueError(f"tensor {name} ends at byte {tensor.offset + tensor.nbytes} of {size}")
    return fields, tensors


class _Header:
    """Reads from a position that moves on."""

    def __init__(self, data: Array) -> None:
        self._data: memoryview = data.data
        self._at = 0
        if bytes(self._data[:4]) != MAGIC:
            raise ValueError(f"it begins with {bytes(self._data[:4])!r}, not {MAGIC!r}")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, known: {', '.join(map(str, VERSIONS))}, little-endian")
        self._tensor_count, self._field_count = self._number("Q"), self._number("Q")

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(self._field_count):
            key = self._string()
            if key in found:
                raise ValueError(f"field {key} is there twice")
            found[key] = self._value(self._number("I"))
        return found

    def tensors(self, path: Path, alignment: int) -> dict[str, GgufTensor]:
        """To be read after the fields. Offsets count from the end of the header, aligned."""
        listed: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(self._tensor_count):
            name = self._string()
            if name in listed:
                raise ValueError(f"tensor {name} is there twice")
            shape = tuple(self._number("Q") for _ in range(self._number("I")))
            kind = GGMLQuantizationType(self._number("I"))
            listed[name] = (kind, tuple(reversed(shape)), self._number("Q"))
        if alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        return {name: GgufTensor(path, kind, shape, start + at) for name, (kind, shape, at) in listed.items()}

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data, at, found = self._data, self._at, []
        length_of = struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = length_of(data, at)
            end = at + 8 + length
            found.append(str(data[at + 8 : end], "utf-8"))
            at = end
        if at > len(data):
            raise ValueError("it ends within a string")
        self._at = at
        return found

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a field of unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            return self._strings(count)
        if inner not in _SCALARS:
            return [self._value(inner) for _ in range(count)]
        values = np.frombuffer(self._data, np.dtype("<" + _SCALARS[inner]), count, self._at)
        self._at += values.nbytes
        return values.tolist()
