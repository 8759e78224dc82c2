"""Every family: one row. Configurations are read as HF reads them, and refused with everything that is wrong."""

from __future__ import annotations

import pytest

from quantbench.errors import ModelError
from quantbench.infer.models import (
    FAMILIES,
    LINEARS,
    biased,
    block_tensors,
    family_of,
    linear_names,
    linear_shapes,
    model_tensors,
    outer_tensors,
)

BASE = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
ROWS = {  # family -> architecture, what the family itself decides, biased linears
    "llama": ("LlamaForCausalLM", {"head_dim": 16, "qk_norm": False, "sliding_window": None}, ""),
    "mistral": ("MistralForCausalLM", {"head_dim": 16, "qk_norm": False, "sliding_window": 4096}, ""),
    "qwen2": ("Qwen2ForCausalLM", {"head_dim": 16, "qk_norm": False, "sliding_window": None}, "qkv"),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128, "qk_norm": True, "sliding_window": None}, ""),
}


def config_of(family, **hf):
    return family_of({"architectures": [ROWS[family][0]]} | BASE | hf).read_config(BASE | hf)


def test_every_family_has_a_row():
    assert set(FAMILIES) == set(ROWS)


@pytest.mark.parametrize("family", ROWS)
def test_a_family(family):
    architecture, decided, biases = ROWS[family]
    assert family_of({"architectures": [architecture]}).name == family
    assert family_of({"model_type": family}).name == family
    config = config_of(family)
    assert {key: getattr(config, key) for key in decided} == decided
    assert biased(config) == frozenset(f"self_attn.{letter}_proj" for letter in biases)
    shapes = model_tensors(config)
    d = config.head_dim
    assert shapes["model.layers.2.self_attn.q_proj.weight"] == (4 * d, 64)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (2 * d, 64)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 4 * d)
    assert ("model.layers.0.self_attn.q_norm.weight" in shapes) == config.qk_norm
    assert len(shapes) == 3 * len(block_tensors(config)) + len(outer_tensors(config))
    assert len(linear_names(config)) == 3 * len(LINEARS) + 1
    assert set(linear_shapes(config)) == {line.name for line in LINEARS}


def test_biases():
    config = config_of("llama", attention_bias=True, mlp_bias=True)
    assert biased(config) == frozenset(line.name for line in LINEARS)
    assert block_tensors(config)["mlp.down_proj.bias"] == (64,)
    assert biased(config_of("qwen3", attention_bias=True)) == {f"self_attn.{x}_proj" for x in "qkvo"}


def test_head_of_its_own():
    assert "lm_head.weight" in outer_tensors(config_of("llama"))
    assert "lm_head.weight" not in outer_tensors(config_of("llama", tie_word_embeddings=True))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_qwen(family):
    window = {"sliding_window": 128, "max_window_layers": 1}
    assert config_of(family, **window).window_of(2) is None
    config = config_of(family, use_sliding_window=True, **window)
    assert [config.window_of(i) for i in range(3)] == [None, 128, 128]
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    named = config_of(family, use_sliding_window=True, layer_types=kinds, **window)
    assert [named.window_of(i) for i in range(3)] == [128, None, None]


def test_window_of_mistral():
    assert config_of("mistral", sliding_window=256).window_of(1) == 256
    assert config_of("mistral", sliding_window=None).window_of(1) is None


def test_the_first_known_architecture_counts():
    assert family_of({"architectures": ["Unknown", "Qwen2ForCausalLM"]}).name == "qwen2"
    with pytest.raises(ModelError, match=r"unknown architecture 'None'\. Known: LlamaForCausalLM"):
        family_of({})


def test_everything_wrong_is_said_at_once():
    hf = {k: v for k, v in BASE.items() if k != "vocab_size"} | {"num_hidden_layers": 0, "hidden_act": "gelu"}
    with pytest.raises(ModelError) as refused:
        FAMILIES["llama"].read_config(hf | {"rope_scaling": {"type": "yarn"}})
    assert [p.removeprefix("config.json: ") for p in refused.value.problems] == [
        "vocab_size is missing",
        "num_hidden_layers is 0; it must be a whole number above 0",
        "rope_scaling.rope_type 'yarn' is not supported. Known: default, linear, dynamic, llama3",
        "hidden_act 'gelu' is not supported for llama; only silu is",
    ]


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim 15 is odd; rotation needs pairs"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing; rope_type linear needs it"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported; only 1\.0 is"),
    ],
)
def test_what_is_refused(hf, message):
    with pytest.raises(ModelError, match=message):
        config_of("llama", **hf)
