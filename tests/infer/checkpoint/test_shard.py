"""Safetensors files: read as the safetensors library writes them, refused by name when damaged."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from quantbench.errors import CheckpointError, ModelError
from quantbench.infer.checkpoint.record import Record
from quantbench.infer.checkpoint.shard import DTYPES, ShardedStore, read_shard
from quantbench.infer.checkpoint.shard_writer import write_shard

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def arrays(seed: int, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2, shape).astype(dtype) for name, shape in shapes.items()}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("abcé.", min_size=1, max_size=6), st.tuples(SHAPES, st.sampled_from(sorted(DTYPES)))))
def test_what_is_written_is_read_back(tmp_path_factory, spec):
    tensors = {name: arrays(i, {name: s}, DTYPES[d])[name] for i, (name, (s, d)) in enumerate(spec.items())}
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    record = Record("v", "p", "0")
    write_shard(path, tensors, record)
    back = read_shard(path)
    assert set(back) == set(tensors) == set(record.tensors)
    for name, array in tensors.items():
        read = back[name].read()
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()
        assert read.flags.aligned
    with safe_open(path, "numpy") as file:  # the library finds the same tensors
        assert set(file.keys()) == set(tensors)


def test_reads_what_the_library_writes(tmp_path: Path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    back = read_shard(tmp_path / "x.safetensors")
    assert np.array_equal(back["a"].read(), tensors["a"])
    assert np.array_equal(back["b"].read(), tensors["b"])


def test_the_library_reads_what_we_write(tmp_path: Path):
    tensors = {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.ones((3, 1), np.float32)}
    write_shard(tmp_path / "x.safetensors", tensors, Record("v", "p", "0"))
    back = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_the_order_of_the_tensors_does_not_change_the_bytes(tmp_path: Path):
    tensors = {"a": np.arange(3, dtype=np.int8), "b": np.ones(2, np.float32)}
    for name, order in (("x", ("a", "b")), ("y", ("b", "a"))):
        write_shard(tmp_path / name, {key: tensors[key] for key in order}, Record("v", "p", "0"))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_reading_does_not_keep_the_file_in_memory(tmp_path: Path):
    values = {"large": np.arange(9000, dtype=np.float32).reshape(90, 100), "small": np.arange(5, dtype=np.int16)}
    write_shard(tmp_path / "x", values, Record("v", "p", "0"))
    read = {name: tensor.read() for name, tensor in read_shard(tmp_path / "x").items()}
    assert all(np.array_equal(read[name], values[name]) for name in values)
    assert not any(array.flags.writeable for array in read.values())
    base = read["large"]
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def test_a_truncated_file_names_its_lost_tensors(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_shard(path, {"first": np.zeros(8, np.float64), "last": np.zeros(8, np.int8)}, Record("v", "p", "0"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"truncated: \d+ bytes of \d+; incomplete tensors: last\. Copy it again"):
        read_shard(path)


def header_file(path: Path, header: object, body: bytes = b"") -> Path:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return path


def test_damaged_headers(tmp_path: Path):
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(ModelError, match="not a safetensors file, or truncated within its header"):
        read_shard(tmp_path / "short")
    with pytest.raises(CheckpointError, match="the safetensors header is not JSON"):
        read_shard(header_file(tmp_path / "text", b"no json!"), CheckpointError)
    with pytest.raises(ModelError, match="not a JSON object"):
        read_shard(header_file(tmp_path / "list", []))


def test_every_bad_tensor_is_listed(tmp_path: Path):
    good = {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}
    header = {"a": good, "b": {"dtype": "I8"}, "c": good | {"dtype": "F6"}, "d": good | {"shape": [3]}}
    with pytest.raises(ModelError) as refused:
        read_shard(header_file(tmp_path / "x", header, b"\0\0"))
    text = str(refused.value)
    assert len(refused.value.problems) == 3
    assert "tensor b: its header entry lacks dtype, shape or data_offsets" in text
    assert "tensor c: dtype 'F6' is not supported. Known: BF16" in text
    assert "tensor d: shape [3] of I8 needs 3 bytes, its offsets give 2" in text


def test_an_index_must_fit_its_shards(tmp_path: Path):
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json is there"):
        ShardedStore(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ModelError, match="not an index of shards"):
        ShardedStore(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(ModelError) as refused:
        ShardedStore(tmp_path)
    assert [p.rpartition(": ")[2] for p in refused.value.problems] == [
        "names x.safetensors, which is absent. Copy it again",
        "names y.safetensors, which is absent. Copy it again",
    ]
    for file, name in (("x.safetensors", "a"), ("y.safetensors", "other")):
        save_file({name: np.zeros(1, np.float32)}, tmp_path / file)
    with pytest.raises(ModelError, match=r"y\.safetensors: b is listed by the index but not there"):
        ShardedStore(tmp_path)
