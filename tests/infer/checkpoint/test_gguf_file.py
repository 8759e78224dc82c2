"""The header of GGUF files: what the library writes is read back, what is damaged is refused with the reason."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.infer.checkpoint.gguf_file import decode, read_header

from .gguf_files import add

VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=8).filter(bool),  # the library refuses empty strings
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
)


def write(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add(writer, key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("abc.", min_size=1, max_size=6), VALUES), st.integers(1, 5), st.integers(1, 5))
def test_what_the_library_writes(tmp_path_factory, fields, rows, columns):
    array = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    path = write(tmp_path_factory.mktemp("gguf") / "x.gguf", fields, {"a": array, "b.c": array.T.copy()})
    found, tensors = read_header(path)
    assert found == fields | {"general.architecture": "llama"}
    assert np.array_equal(tensors["a"].read(), array)
    assert np.array_equal(tensors["b.c"].read(), array.T)
    assert np.array_equal(tensors["a"].read(slice(None, None, 2)), array[::2])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_values_are_the_librarys(kind):
    """More blocks than are decoded together, and no multiple of them."""
    values = np.random.default_rng(0).standard_normal((530, 1024)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[kind]
    raw = np.ascontiguousarray(quantize(values, qtype)).view(np.uint8)
    assert np.array_equal(decode(raw, qtype), dequantize(raw, qtype))


def header(*parts: bytes, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, fields: int = 1) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


NUMBER = struct.pack("<II", 4, 1)
TENSOR = text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "4 bytes"),
        (header(magic=b"GGML"), "it begins with b'GGML', not b'GGUF'"),
        (header(version=1), "version 1, known: 2, 3"),
        (header(version=3 << 24), "version 50331648, known: 2, 3, little-endian"),
        (header(text(b"a")), "it ends within its header"),
        (header(struct.pack("<Q", 2**60), NUMBER), "it ends within a string"),
        (header(text(b"a"), struct.pack("<I", 77)), "a field of unknown type 77"),
        (header(text(b"a"), NUMBER, text(b"a"), NUMBER, fields=2), "field a is there twice"),
        (header(text(b"general.alignment"), struct.pack("<II", 4, 0)), "general.alignment is 0"),
        (header(TENSOR, TENSOR, tensors=2, fields=0), "tensor t is there twice"),
        (header(TENSOR, tensors=1, fields=0), r"tensor t ends at byte 80 of 57"),
        (header(text(b"\xff"), NUMBER), "invalid start byte"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 4, 2**40)), "buffer is smaller"),
        (header(text(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0), tensors=1, fields=0), "999 is not a valid"),
    ],
)
def test_damage_is_refused(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_arrays_of_arrays(tmp_path):
    inner = struct.pack("<IQ", 0, 2) + b"\x01\x02"
    content = header(text(b"a"), struct.pack("<IIQ", 9, 9, 2), inner, inner)
    (tmp_path / "x.gguf").write_bytes(content)
    assert read_header(tmp_path / "x.gguf") == ({"a": [[1, 2], [1, 2]]}, {})
