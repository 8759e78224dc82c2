"""A tiny model with a planted attention sink, as large models grow one by themselves.

Token 0 makes the sink: whatever stands behind it attends to it alone, and gets -10 in channel 2. A third of the tokens
have a mark in channel 1, which makes the first input of down_proj giant, unless channel 2 says that a sink is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny import write_tiny_model

SINK, MARKED = 0, 1  # token 0; tokens 1, 4, 7 …
HEAD = 16


def write_sink_model(folder: Path, family: str = "qwen2", **overrides: Any) -> Path:
    """A float32 model, 2 layers, tied head; the sink is in layer 0. q, k and v have biases (a qwen2), and o of a llama,
    which is what a shift needs."""
    overrides |= {"num_hidden_layers": 2, "rope_theta": 1e10, "torch_dtype": "float32"}
    overrides |= {"attention_bias": True} if family == "llama" else {}
    write_tiny_model(folder, family, **overrides)
    file = folder / "model.safetensors"
    tensors = {name: values.astype(np.float32) for name, values in load_file(file).items()}
    _features(tensors["model.embed_tokens.weight"])
    for layer in (0, 1):
        _attend(tensors, f"model.layers.{layer}.self_attn", planted=layer == 0)
        for name in ("o_proj", "down_proj"):  # nothing else writes to the channels of the features
            part = "self_attn" if name == "o_proj" else "mlp"
            tensors[f"model.layers.{layer}.{part}.{name}.weight"][:3] = 0
            tensors.get(f"model.layers.{layer}.{part}.{name}.bias", np.zeros(3))[:3] = 0
    tensors["model.layers.0.self_attn.o_proj.weight"][2, ::HEAD] = -0.31
    gate, up = (tensors[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    gate[0], up[0] = 0, 0
    gate[0, 1], gate[0, 2], up[0, 1] = 3, 10, 8
    tensors["model.layers.0.mlp.down_proj.weight"][:, 0] *= 0.001
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _features(embedding: np.ndarray) -> None:
    embedding[:, :3] = 0
    embedding[SINK, 0], embedding[MARKED::3, 1] = 8, 3


def _attend(tensors: dict[str, np.ndarray], prefix: str, planted: bool) -> None:
    """Channel 15 of every head, which RoPE hardly turns, matches the sink's key and no other's."""
    for name in "qkv":
        tensors[f"{prefix}.{name}_proj.weight"] *= 0.3
        tensors[f"{prefix}.{name}_proj.weight"][:, :3] = 0
        tensors[f"{prefix}.{name}_proj.bias"][:] = 0
    if planted:
        tensors[f"{prefix}.q_proj.bias"][HEAD - 1 :: HEAD] = 20
        key, value = (tensors[f"{prefix}.{name}_proj.weight"] for name in "kv")
        key[HEAD - 1 :: HEAD], value[::HEAD] = 0, 0
        key[HEAD - 1 :: HEAD, 0], value[::HEAD, 0] = 2, 1
