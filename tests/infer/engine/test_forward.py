"""The layer loop against an independent forward: float64, one sequence, no cache, written from the papers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from quantbench.infer.engine import Engine
from quantbench.infer.engine.forward import Rows, batch_of

F64 = npt.NDArray[np.float64]
NAMES = (
    "llama", "llama_untied_biased", "llama_linear", "llama_dynamic", "llama3", "llama_odd", "llama_wide_heads",
    "qwen2", "qwen2_windowed", "qwen3", "mistral",
)  # fmt: skip


def frequencies(hf: dict[str, Any], d: int, length: int) -> F64:
    theta, scaling = hf["rope_theta"], hf.get("rope_scaling") or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor", 1.0)
    trained = hf["max_position_embeddings"]
    if kind == "dynamic" and length > trained:
        theta *= (factor * length / trained - factor + 1) ** (d / (d - 2))
    speeds = np.array([theta ** (-2 * i / d) for i in range(d // 2)])
    if kind == "linear":
        speeds /= factor
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * speeds / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        speeds = speeds * keep + speeds / factor * (1 - keep)
    return speeds


def slow_forward(path: Path, ids: list[int]) -> tuple[list[F64], F64]:
    """Hidden state after each block, and logits."""
    hf = json.loads((path / "config.json").read_text())
    t = {name: tensor.astype(np.float64) for name, tensor in load_file(path / "model.safetensors").items()}
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    d = hf.get("head_dim", hf["hidden_size"] // heads)
    n = len(ids)
    turn = np.exp(1j * np.outer(np.arange(n), frequencies(hf, d, n)))

    def norm(x: F64, w: F64) -> F64:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + hf["rms_norm_eps"]) * w

    def linear(x: F64, name: str) -> F64:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    def rotate(x: F64) -> F64:  # one head [n, d], a pair (i, i + d/2) is one complex number
        z = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    x, hidden = t["model.embed_tokens.weight"][ids], []
    for layer in range(hf["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        windowed = hf.get("use_sliding_window", "sliding_window" in hf) and layer >= hf.get("max_window_layers", 0)
        reach = hf["sliding_window"] if windowed else n
        y = norm(x, t[f"{p}.input_layernorm.weight"])
        q, k, v = (linear(y, f"{p}.self_attn.{s}_proj").reshape(n, -1, d) for s in "qkv")
        if f"{p}.self_attn.q_norm.weight" in t:
            q, k = norm(q, t[f"{p}.self_attn.q_norm.weight"]), norm(k, t[f"{p}.self_attn.k_norm.weight"])
        out = np.zeros((n, heads, d))
        for h in range(heads):
            qh, kh, vh = rotate(q[:, h]), rotate(k[:, h * kv_heads // heads]), v[:, h * kv_heads // heads]
            for i in range(n):
                first = max(0, i - reach + 1)
                s = np.exp(kh[first : i + 1] @ qh[i] / math.sqrt(d))
                out[i, h] = s @ vh[first : i + 1] / s.sum()
        x = x + linear(out.reshape(n, -1), f"{p}.self_attn.o_proj")
        y = norm(x, t[f"{p}.post_attention_layernorm.weight"])
        gate = linear(y, f"{p}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{p}.mlp.up_proj"), f"{p}.mlp.down_proj")
        hidden.append(x)
    head = t["model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"]
    return hidden, norm(x, t["model.norm.weight"]) @ head.T


def relative(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("chunk", [512, 33])
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_slow_forward(
    name: str, chunk: int, load: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    ids = np.random.default_rng(1).integers(0, 97, 100).tolist()  # longer than a page, a window and the trained length
    _, expected = slow_forward(model_path(name), ids)
    assert relative(load(name, chunk=chunk).score(ids), expected) < 2e-6


@pytest.mark.parametrize("chunk", [512, 33])
def test_a_trace_equals_the_slow_forward_in_every_layer(
    chunk: int, load: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    ids = np.random.default_rng(2).integers(0, 97, 70).tolist()
    hidden, logits = slow_forward(model_path("qwen2"), ids)
    trace = load("qwen2", chunk=chunk).trace(ids)
    assert len(trace.hidden) == len(hidden)
    for ours, theirs in zip(trace.hidden, hidden, strict=True):
        assert relative(ours, theirs) < 2e-6
    assert relative(trace.logits, logits) < 2e-6


def test_batch_indices_by_hand() -> None:
    batch = batch_of([Rows([5, 6, 7], 63, [4, 2]), Rows([9], 0, [1])])
    assert batch.ids.tolist() == [5, 6, 7, 9]
    assert batch.positions.tolist() == [63, 64, 65, 0]
    assert batch.slots.tolist() == [4 * 64 + 63, 2 * 64, 2 * 64 + 1, 64]
    assert batch.starts.tolist() == [0, 3, 4]
    assert batch.context.tolist() == [66, 1]
    assert batch.tables.tolist() == [[4, 2], [1, 0]]


def test_a_batch_of_single_tokens_is_as_any_other() -> None:
    rows = [Rows([5], 63, [4, 2]), Rows([9], 0, [1]), Rows([7], 130, [3, 0, 6])]
    batch = batch_of(rows)
    whole = batch_of([*rows, Rows([1, 2], 0, [5])])  # with a prompt beside them
    for name in ("ids", "positions", "slots", "context"):
        alone, beside = getattr(batch, name), getattr(whole, name)
        assert alone.dtype == beside.dtype
        assert np.array_equal(alone, beside[:3])
    assert batch.starts.tolist() == [0, 1, 2, 3]
    assert np.array_equal(batch.tables, whole.tables[:3])
