from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from quantbench.scales.seed import FILES, seed_tables, write_seed_tables
from quantbench.scales.table import DIVISORS, Entry, ScaleTable

F32 = np.float32


def make(name: str, kind: str, granularity: str, absmax: object, format: str = "int8") -> Entry:
    values = np.array(absmax, F32)
    scale = np.where(values > 0, values / F32(DIVISORS.get(format, 1)), 1).astype(F32)
    return Entry(name, kind, format, granularity, scale, None, values, None, "absmax", "", None)


def table() -> ScaleTable:
    result = ScaleTable()
    for entry in (
        make("model.layers.0.input_layernorm.smooth", "transform", "channel", [1, 2], "float32"),
        make("model.layers.0.self_attn.q_proj.weight", "weight", "channel", [[1], [0], [3]]),
        make("model.layers.0.self_attn.q_proj.input", "input", "tensor", [5]),
        make("model.layers.1.mlp.up_proj.weight", "weight", "tensor", [4], "fp8_e4m3"),
        make("model.layers.1.mlp.up_proj.input", "input", "token", []),
        make("model.layers.1.mlp.down_proj.weight", "weight", "group", [[1, 2]], "int4"),
        make("model.layers.1.mlp.down_proj.input", "input", "tensor", [0], "fp8_e4m3"),
        make("model.layers.0.self_attn.k_cache", "cache", "head", [1, 2]),
        make("model.layers.0.self_attn.v_cache", "cache", "head", [3, 4]),
        make("lm_head.weight", "weight", "tensor", [9]),
    ):
        result.add(entry)
    return result


def test_keys_and_raw_absmax_values() -> None:
    assert seed_tables(table(), "llama", 3) == {
        "act_scales.json": {
            "llama.layers.0.self_attn.q_proj.activation_quanter": 5.0,
            "llama.layers.1.mlp.down_proj.activation_quanter": 448.0,  # saw only zeros: the range of scale 1
        },
        "weight_scales.json": {
            "llama.layers.0.self_attn.q_proj.weight_quanter": [1.0, 127.0, 3.0],
            "llama.layers.1.mlp.up_proj.weight_quanter": 4.0,
            "lm_head.weight_quanter": 9.0,
        },
        "cachekv_scales.json": {
            "llama.layers.0.self_attn.cachek_matmul.activation_quanter": [1.0, 1.0, 1.0, 2.0, 2.0, 2.0],
            "llama.layers.0.self_attn.cachev_matmul.activation_quanter": [3.0, 3.0, 3.0, 4.0, 4.0, 4.0],
        },
    }


def test_the_loader_of_paddlenlp_gets_its_kv_heads_back() -> None:
    """It takes every (num_heads / num_kv_heads)-th value."""
    values = seed_tables(table(), "qwen2", 3)["cachekv_scales.json"]
    assert values["qwen2.layers.0.self_attn.cachek_matmul.activation_quanter"][::3] == [1.0, 2.0]


def test_all_three_files_are_written_even_empty(tmp_path: Path) -> None:
    write_seed_tables(tmp_path / "new", ScaleTable(), "llama")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(FILES)
    assert all(json.loads((tmp_path / "new" / name).read_text()) == {} for name in FILES)


def test_written_values_are_the_float32_values(tmp_path: Path) -> None:
    one = ScaleTable()
    one.add(make("model.layers.0.self_attn.q_proj.input", "input", "tensor", [0.1]))
    write_seed_tables(tmp_path, one, "llama")
    (value,) = json.loads((tmp_path / "act_scales.json").read_text()).values()
    assert F32(value) == F32(0.1)
