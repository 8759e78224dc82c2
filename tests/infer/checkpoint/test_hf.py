"""HF directories: every float dtype, one shard or several, tied or not; everything wrong is said at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.source import LinearWeight, open_model

from .conftest import CONFIG, weights_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_read_as_stored(make_model, dtype, shards, tied):
    source = open_model(make_model(dtype=dtype, shards=shards, tie_word_embeddings=tied))
    expected = weights_of(CONFIG | {"tie_word_embeddings": tied}, dtype)
    assert source.names() == sorted(expected)
    assert all(source.read(name).tobytes() == array.tobytes() for name, array in expected.items())
    assert source.config.dtype == dtype
    assert source.quantization is None
    assert source.cache_scales(0) is None
    head = source.linear("lm_head")
    assert np.array_equal(head.weight, expected["model.embed_tokens.weight" if tied else "lm_head.weight"])


def test_a_block_in_float32(make_model):
    source = open_model(make_model(dtype="bfloat16", architectures=["Qwen2ForCausalLM"], model_type="qwen2"))
    block = source.float_block(1)
    assert {a.dtype for a in block.values()} == {np.dtype(np.float32)}
    stored = source.read("model.layers.1.self_attn.q_proj.bias")
    assert np.array_equal(block["self_attn.q_proj.bias"], stored.astype(np.float32))
    linear = source.linear("model.layers.1.self_attn.q_proj")
    assert isinstance(linear, LinearWeight)
    assert np.array_equal(linear.bias, block["self_attn.q_proj.bias"])
    assert source.linear("model.layers.1.mlp.up_proj").bias is None


def test_an_unknown_tensor_is_refused(make_model):
    with pytest.raises(ModelError, match="no tensor nothing"):
        open_model(make_model()).read("nothing")


def test_harmless_extras_are_tolerated(make_model):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)

    assert open_model(make_model(edit=edit)).config.tie_word_embeddings


def test_every_wrong_tensor_is_listed(make_model):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.extra.weight"] = np.zeros(1, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
        tensors["model.layers.1.input_layernorm.weight"] = np.zeros(64, np.int32)

    with pytest.raises(ModelError) as refused:
        open_model(make_model(edit=edit))
    assert [p.partition(": ")[2] for p in refused.value.problems] == [
        "tensor model.norm.weight is missing; expected shape [64]",
        "tensor model.layers.0.mlp.extra.weight is not part of this architecture",
        "tensor model.layers.1.input_layernorm.weight is int32; allowed: bfloat16, float16, float32",
        "tensor model.layers.1.mlp.up_proj.weight has shape [3, 3], expected [128, 64]",
    ]


def test_a_long_list_is_cut(make_model):
    directory = make_model(num_hidden_layers=4, edit=lambda tensors: [tensors.pop(n) for n in sorted(tensors)[:28]])
    with pytest.raises(ModelError, match="and 8 more problems of this kind") as refused:
        open_model(directory)
    assert len(refused.value.problems) == 21


def test_config_json_must_be_there_and_an_object(make_model, tmp_path):
    path = make_model() / "config.json"
    path.write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        open_model(path.parent)
    path.write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        open_model(path.parent)
    path.unlink()
    with pytest.raises(ModelError, match=r"absent\. A HF model directory has one"):
        open_model(path.parent)


def test_an_unknown_architecture_lists_the_known(make_model):
    directory = make_model()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["LamaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"unknown architecture 'LamaForCausalLM'\. Did you mean LlamaForCausalLM"):
        open_model(directory)


def test_no_such_model():
    with pytest.raises(ModelError, match=r"/nowhere: no such model\. Give a HF directory.*demo:smollm2"):
        open_model("/nowhere")


def test_end_tokens_of_the_generation_config(make_model):
    directory = make_model()
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    source = open_model(directory)
    assert source.config.eos_token_ids == (1, 3)
    assert source.tokenizer().eos_ids == (1, 3)


def test_the_hash_follows_the_content(make_model):
    one, two = open_model(make_model("one")), open_model(make_model("two"))
    other = open_model(make_model("three", edit=lambda t: t["model.norm.weight"].__setitem__(0, 9)))
    assert one.sha256() == two.sha256() != other.sha256()
    assert len(one.sha256()) == 64
