"""One row per linear and per other tensor, for everything that opens."""

from __future__ import annotations

import pytest

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.inspect import describe
from quantbench.infer.checkpoint.source import open_model

from .conftest import variant_of
from .gguf_files import write_gguf


def rows(path):
    return {row.name: row for row in describe(path)}


@pytest.mark.parametrize(
    ("mode", "plan", "stored", "inputs"),
    [
        ("a8w8", {}, "int8 channel", "int8 static 0.0315"),
        ("a8w8", {"dynamic": True}, "int8 channel", "int8 per token"),
        ("weight_only_int4", {"symmetric": False}, "int4 group 32, asymmetric", "float"),
    ],
)
def test_a_checkpoint(make_model, write_checkpoint, mode, plan, stored, inputs):
    source = open_model(make_model())
    path = write_checkpoint(source, variant_of(mode, source, **plan))
    found = rows(path)
    row = found["model.layers.0.mlp.up_proj"]
    assert (row.stored, row.inputs, row.shape) == (stored, inputs, (128, 64))
    assert 0 < row.scale_min < row.scale_max
    assert found["model.embed_tokens.weight"].stored == "bfloat16"
    back = open_model(path)
    assert sum(r.bytes for r in found.values()) == sum(back.read(name).nbytes for name in back.names())


def test_a_float_directory(make_model):
    found = describe(make_model(dtype="float16", num_hidden_layers=11))
    assert {row.stored for row in found} == {"float16"}
    layers = [int(row.name.split(".")[2]) for row in found if ".layers." in row.name]
    assert layers == sorted(layers)


def test_cache_scales_and_biases(make_model, write_checkpoint):
    source = open_model(make_model(architectures=["Qwen2ForCausalLM"], model_type="qwen2"))
    found = rows(write_checkpoint(source, variant_of("a8w8c8", source)))
    cache = found["model.layers.1.self_attn.v_scale"]
    assert (cache.scale_min, cache.scale_max) == pytest.approx((0.02, 0.04))
    assert found["model.layers.1.self_attn.v_proj.bias"].shape == (32,)


def test_a_dynamic_cache(make_model, write_checkpoint):
    source = open_model(make_model())
    cache = rows(write_checkpoint(source, variant_of("bf16c8_fp8_dynamic", source)))["kv_cache"]
    assert (cache.stored, cache.shape, cache.bytes) == ("fp8_e4m3 per token and head", (2, 16), 0)


def test_a_gguf_file(make_model, tmp_path):
    found = rows(write_gguf(tmp_path / "m.gguf", make_model(), "Q8_0"))
    row = found["model.layers.0.mlp.up_proj.weight"]
    assert (row.stored, row.inputs, row.bytes) == ("Q8_0", "float", 128 * 64 // 32 * 34)


def test_nothing_there():
    with pytest.raises(ModelError, match="no such model"):
        describe("/nowhere")
