"""PaddleNLP's three JSON tables: act_scales.json, weight_scales.json, cachekv_scales.json.

Flat `{key: value}`, values are raw absmax (its loaders divide by 127 or 448 themselves). Keys are PaddleNLP's module
names: `llama.layers.0.self_attn.q_proj.activation_quanter`, `….weight_quanter`,
`llama.layers.0.self_attn.cachek_matmul.activation_quanter`, `…cachev_matmul.activation_quanter`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from quantbench.scales.arrays import F32
from quantbench.scales.table import DIVISORS, Entry, ScaleTable, write_atomically

SeedTable = dict[str, float | list[float]]
FILES = ("act_scales.json", "weight_scales.json", "cachekv_scales.json")
_CACHE = {"k_cache": "cachek_matmul", "v_cache": "cachev_matmul"}


def seed_tables(table: ScaleTable, family_name: str, queries_per_kv_head: int = 1) -> dict[str, SeedTable]:
    """File name -> table. PaddleNLP has no place for dynamic inputs and caches, group or block scales and transforms.

    act: one float per linear with a static input. weight: list[out] per channel, one float per tensor. cachekv:
    a list as long as the *query* heads (each KV head's value `queries_per_kv_head` times), because PaddleNLP observes
    behind repeat_kv and its loader takes every (num_heads / num_kv_heads)-th entry.
    """
    act, weight, cache = SeedTable(), SeedTable(), SeedTable()
    for entry in table:
        absmax = _finite_inverse(entry)
        name = _module(entry.name, family_name)
        if entry.kind == "input" and entry.granularity == "tensor":
            act[f"{name}.activation_quanter"] = float(absmax[0])
        elif entry.kind == "weight" and entry.granularity == "tensor":
            weight[f"{name}.weight_quanter"] = float(absmax[0])
        elif entry.kind == "weight" and entry.granularity == "channel":
            weight[f"{name}.weight_quanter"] = [float(v) for v in absmax[:, 0]]
        elif entry.kind == "cache" and entry.granularity == "head":
            key = f"{name}.{_CACHE[entry.name.rsplit('.', 1)[1]]}.activation_quanter"
            cache[key] = [float(v) for v in np.repeat(absmax, queries_per_kv_head)]
    return dict(zip(FILES, (act, weight, cache), strict=True))


def write_seed_tables(directory: Path, table: ScaleTable, family_name: str, queries_per_kv_head: int = 1) -> None:
    """Writes all three files, `{}` where a table is empty, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in seed_tables(table, family_name, queries_per_kv_head).items():
        # A line per module. json's own `indent` would write a line per number, twenty times as slowly.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        write_atomically(directory / name, ("{" + ",\n ".join(lines) + "}\n").encode())


def _module(name: str, family_name: str) -> str:
    """ "model.layers.0.mlp.up_proj.weight" -> "llama.layers.0.mlp.up_proj"."""
    module = name.rsplit(".", 1)[0]
    return f"{family_name}.{module.removeprefix('model.')}" if module.startswith("model.") else module


def _finite_inverse(entry: Entry) -> F32:
    """absmax, but where it is 0 (scale 1) the range that gives scale 1: PaddleNLP takes 1/absmax."""
    return np.where(entry.absmax > 0, entry.absmax, np.float32(DIVISORS.get(entry.format, 1.0))).astype(np.float32)
