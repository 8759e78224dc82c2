"""quantbench.json and the tensors it vouches for."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.record import RECORD, Record, crc
from quantbench.infer.checkpoint.source import file_sha256, open_model

from .conftest import variant_of


@pytest.fixture
def checkpoint(make_model, write_checkpoint):
    source = open_model(make_model())
    return write_checkpoint(source, variant_of("a8w8", source))


def test_it_describes_what_is_there(checkpoint):
    record = Record.read(checkpoint / RECORD)
    for name, shard in record.shards.items():
        assert shard.bytes == (checkpoint / name).stat().st_size
        assert shard.sha256 == file_sha256(checkpoint / name)
    stored = {}
    for file in checkpoint.glob("*.safetensors"):
        stored |= load_file(file)
    assert {n: (t.dtype, t.shape, t.bytes, t.crc32) for n, t in record.tensors.items()} == {
        n: (a.dtype.name, list(a.shape), a.nbytes, zlib.crc32(a.tobytes())) for n, a in stored.items()
    }
    assert record.to_json() == (checkpoint / RECORD).read_bytes()


def test_the_checksum_is_of_the_bytes_in_order():
    a = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert crc(a.T) == zlib.crc32(np.ascontiguousarray(a.T).tobytes()) != crc(a)
    assert crc(np.empty((0, 3), np.float32)) == 0


def test_a_record_that_cannot_be_read(checkpoint):
    file = checkpoint / RECORD
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"format_version": 2}))
    with pytest.raises(CheckpointError, match=r"format_version 2, allowed: 1\. Use the quantbench that wrote it"):
        open_model(checkpoint)
    for damaged in ("{", "[]", "{}", json.dumps(fields | {"more": 1})):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match="not a record of a checkpoint"):
            open_model(checkpoint)


def test_tensors_that_are_not_where_the_record_says(checkpoint):
    file = checkpoint / "model-00001-of-00003.safetensors"
    index = checkpoint / "model.safetensors.index.json"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["more"] = np.zeros(1, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(2, np.float32)
    save_file(tensors, file)
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.layers.0.mlp.up_proj.weight_scale"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as refused:
        open_model(checkpoint)
    text = str(refused.value)
    assert "tensor model.layers.0.mlp.up_proj.weight_scale is in quantbench.json but not stored" in text
    assert "tensor more is stored but not in quantbench.json" in text
    assert (
        "tensor model.layers.0.input_layernorm.weight is ('model-00001-of-00003.safetensors', 'float32', [2])" in text
    )
