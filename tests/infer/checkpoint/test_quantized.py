"""Opening quantized directories: damage is refused by tensor, other people's files are read by the same rules."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.record import RECORD
from quantbench.infer.checkpoint.source import open_model

from .conftest import load_shard, save_shard, variant_of

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def checkpoint(make_model, write_checkpoint):
    source = open_model(make_model())
    return write_checkpoint(source, variant_of("a8w8c8", source))


def shard_of(checkpoint, name):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return checkpoint / index["weight_map"][name]


def edit(checkpoint, name, change):
    """Rewrites one tensor in its shard."""
    file = shard_of(checkpoint, name)
    tensors = load_shard(file)
    tensors[name] = change(tensors[name].copy())
    save_shard(tensors, file)


def flip(array):
    array.view(np.uint8).reshape(-1)[0] ^= 1
    return array


@pytest.mark.parametrize("part", ["weight_scale", "input_scale"])
def test_one_flipped_bit_of_a_scale_is_refused_when_opened(checkpoint, part):
    edit(checkpoint, f"{UP}.{part}", flip)
    with pytest.raises(CheckpointError, match=rf"tensor {UP}\.{part}: its bytes are not those that were written"):
        open_model(checkpoint)


def test_one_flipped_bit_of_a_large_weight_is_refused_when_read(make_model, write_checkpoint):
    source = open_model(make_model(hidden_size=1024, intermediate_size=1536, num_hidden_layers=1, vocab_size=32))
    checkpoint = write_checkpoint(source, variant_of("a8w8", source))
    edit(checkpoint, f"{UP}.weight", flip)
    opened = open_model(checkpoint)
    assert opened.linear("model.layers.0.mlp.gate_proj").weight.codes.size > 1 << 20
    with pytest.raises(CheckpointError, match=rf"tensor {UP}\.weight: its bytes are not those"):
        opened.linear(UP)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_scales_that_make_no_sense_are_refused_without_a_record(checkpoint, value):
    def spoil(scale):
        scale[3] = value
        return scale

    edit(checkpoint, f"{UP}.weight_scale", spoil)
    (checkpoint / RECORD).unlink()
    message = (
        rf"tensor {UP}\.weight_scale: 1 of 128 scales are NaN, infinite, zero or negative \(first: .* at \[3, 0\]\)"
    )
    with pytest.raises(CheckpointError, match=message):
        open_model(checkpoint)


def test_a_truncated_shard_names_its_tensors(checkpoint):
    file = shard_of(checkpoint, f"{UP}.weight")
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(CheckpointError, match=r"truncated: \d+ bytes of \d+; incomplete tensors: .*model\.layers\.0\."):
        open_model(checkpoint)


def test_missing_extra_and_misshapen_tensors(checkpoint):
    (checkpoint / RECORD).unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_shard(file)
    del tensors[f"{UP}.input_scale"]
    tensors["model.layers.0.self_attn.q_scale"] = np.ones(1, np.float32)
    tensors[f"{UP}.weight_scale"] = np.ones((1, 128), np.float32)
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].astype(np.int32)
    save_shard(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        open_model(checkpoint)
    assert [p.partition(": ")[2] for p in refused.value.problems] == [
        f"tensor {UP}.input_scale is missing; expected shape [1]",
        "tensor model.layers.0.self_attn.q_scale is not part of this architecture",
        f"tensor {UP}.weight is int32; allowed: int8",
        f"tensor {UP}.weight_scale has shape [1, 128], expected [128, 1]",
    ]


def test_scales_in_the_models_dtype_and_scalar_input_scales(checkpoint):
    """llm-compressor stores scales as bfloat16; older versions stored input scales without a dimension."""
    (checkpoint / RECORD).unlink()
    edit(checkpoint, f"{UP}.weight_scale", lambda scale: scale.astype(ml_dtypes.bfloat16))
    edit(checkpoint, f"{UP}.input_scale", lambda scale: scale.reshape(()))
    linear = open_model(checkpoint).linear(UP)
    assert linear.weight.scale.dtype == np.float32
    assert linear.input_scale == pytest.approx(4 / 127)


def test_one_cache_scale_for_all_heads(checkpoint):
    (checkpoint / RECORD).unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "tensor"
    (checkpoint / "config.json").write_text(json.dumps(config))
    for layer in (0, 1):
        for side in "kv":
            edit(checkpoint, f"model.layers.{layer}.self_attn.{side}_scale", lambda scale: scale.reshape(-1)[:1])
    k, v = open_model(checkpoint).cache_scales(0)
    assert k.tolist() == pytest.approx([0.01, 0.01])
    assert v.tolist() == pytest.approx([0.02, 0.02])


def test_a_scheme_that_is_not_served_names_its_key(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config\.quant_method: 'gptq' is not supported"):
        open_model(checkpoint)


def test_dequantized_blocks(checkpoint):
    source = open_model(checkpoint)
    block = source.float_block(0)
    weight = source.linear(UP).weight
    assert np.array_equal(block["mlp.up_proj.weight"], weight.codes.astype(np.float32) * weight.scale)
    assert all(array.dtype == np.float32 for array in block.values())
