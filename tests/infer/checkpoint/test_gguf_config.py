"""Metadata of a GGUF file as a HF config."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.gguf_config import shortest
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.models import Rope

from .gguf_files import write_gguf


@pytest.mark.parametrize("value", [1e-5, 1e-6, 5e-6, 10000.0, 500000.0, 1000000.0, 0.1])
def test_the_decimal_the_author_wrote(value):
    assert shortest(float(np.float32(value))) == value


def test_llama3_scaling_from_its_divisors(make_model, tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    directory = make_model(rope_theta=500000.0, head_dim=64, rope_scaling=scaling)
    rope = open_model(directory).config.rope
    divisors = Rope(500000.0).inverse_frequencies(64, 0) / rope.inverse_frequencies(64, 0)
    found = open_model(write_gguf(tmp_path / "m.gguf", directory, tensors={"rope_freqs.weight": divisors}))
    assert found.config.rope == rope
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not llama3's rule"):
        open_model(write_gguf(tmp_path / "n.gguf", directory, tensors={"rope_freqs.weight": divisors * 2}))


def test_linear_scaling(make_model, tmp_path):
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = open_model(write_gguf(tmp_path / "m.gguf", make_model(), fields=fields)).config
    assert (config.rope.kind, config.rope.factor) == ("linear", 4.0)


def test_several_end_tokens(make_model, tmp_path):
    source = open_model(write_gguf(tmp_path / "m.gguf", make_model(), fields={"tokenizer.ggml.eot_token_id": 3}))
    assert source.config.eos_token_ids == (1, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type 'yarn' is not supported\. Known: none, linear"),
        ({"llama.attention.sliding_window": 128}, "llama with attention.sliding_window is not supported from GGUF"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"attention\.head_count_kv differs between layers \(\[2, 4\]\)"),
    ],
)
def test_what_is_refused(make_model, tmp_path, fields, message):
    with pytest.raises(ModelError, match=message):
        open_model(write_gguf(tmp_path / "m.gguf", make_model(), fields=fields))


def test_missing_metadata_is_listed(make_model, tmp_path):
    fields = {"llama.block_count": None, "llama.context_length": None}
    with pytest.raises(ModelError) as refused:
        open_model(write_gguf(tmp_path / "m.gguf", make_model(), fields=fields, tensors={"token_embd.weight": None}))
    assert [p.rpartition("gguf: ")[2] for p in refused.value.problems] == [
        "metadata llama.block_count is missing",
        "metadata llama.context_length is missing",
        "tensor token_embd.weight is missing",
    ]


def test_the_configuration_is_plain_json(make_model, tmp_path):
    source = open_model(write_gguf(tmp_path / "m.gguf", make_model()))
    assert json.loads(json.dumps(source.hf_config)) == source.hf_config
