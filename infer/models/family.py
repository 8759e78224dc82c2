"""What a model family is, as data: its tensors, which norm feeds which linears, and how its config is read.

All families here are pre-norm decoders with the block of `LINEARS`; they differ in biases, q/k norms, windows and
defaults. Adding one = one file beside this one that registers a `Family`, and one row in tests/infer/models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantbench.errors import ModelError, unknown
from quantbench.infer.models.config import ModelConfig
from quantbench.registry import Registry


@dataclass(frozen=True)
class Linear:
    """One projection of a block. `tap` names its input (shared inside a fused group), `source` what produces it."""

    name: str  # within the block, e.g. "self_attn.q_proj"
    tap: str  # "attn_in" | "o_in" | "mlp_in" | "down_in"
    fused: str  # linears of one fused group share the input and, at export, static scales
    source: str  # the norm or linear (within the block) whose output channels are this input's channels


LINEARS: tuple[Linear, ...] = (
    Linear("self_attn.q_proj", "attn_in", "qkv", "input_layernorm"),
    Linear("self_attn.k_proj", "attn_in", "qkv", "input_layernorm"),
    Linear("self_attn.v_proj", "attn_in", "qkv", "input_layernorm"),
    Linear("self_attn.o_proj", "o_in", "o", "self_attn.v_proj"),
    Linear("mlp.gate_proj", "mlp_in", "gate_up", "post_attention_layernorm"),
    Linear("mlp.up_proj", "mlp_in", "gate_up", "post_attention_layernorm"),
    Linear("mlp.down_proj", "down_in", "down", "mlp.up_proj"),
)
TAPS: tuple[str, ...] = ("attn_in", "o_in", "mlp_in", "down_in")
CACHE_TAPS: tuple[str, ...] = ("k", "v")  # after RoPE, [tokens, kv_heads, head_dim]


@dataclass(frozen=True)
class Family:
    """One model family. `read_config` turns a HF config.json into a ModelConfig, raising ModelError."""

    name: str  # HF model_type and the prefix of PaddleNLP's scale tables
    architectures: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    gguf_arch: str | None = None
    gguf_interleaved_rope: bool = False  # llama.cpp stores this family's q and k rows pairwise interleaved
    bias_switches: tuple[tuple[str, tuple[str, ...]], ...] = ()  # key of config.json -> the linears it gives a bias


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FAMILIES: Registry[Family] = Registry("model family", ModelError)


def family_of(hf_config: dict[str, Any]) -> Family:
    """The family of a HF `config.json`, by `architectures`, else by `model_type`."""
    names = hf_config.get("architectures") or []
    by_architecture = {a: FAMILIES[f] for f in FAMILIES for a in FAMILIES[f].architectures}
    for name in names:
        if name in by_architecture:
            return by_architecture[name]
    if not names and hf_config.get("model_type") in FAMILIES:
        return FAMILIES[hf_config["model_type"]]
    raise ModelError(
        "config.json: " + unknown("architecture", str((names or [hf_config.get("model_type")])[0]), by_architecture)
    )


def block_prefix(layer: int) -> str:
    return f"model.layers.{layer}"


def linear_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear of a block."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    d, i = c.hidden_size, c.intermediate_size
    return {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q), "mlp.gate_proj": (i, d), "mlp.up_proj": (i, d), "mlp.down_proj": (d, i),
    }  # fmt: skip


def biased(c: ModelConfig) -> frozenset[str]:
    """Names of the linears of a block that have a bias."""
    names: tuple[str, ...] = ()
    if c.attention_bias:
        names += ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    if c.output_bias:
        names += ("self_attn.o_proj",)
    if c.mlp_bias:
        names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return frozenset(names)


def block_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within the block -> shape of every float tensor of one block, as HF stores it."""
    shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": s for n, s in linear_shapes(c).items()}
    shapes |= {f"{n}.bias": (s[0],) for n, s in linear_shapes(c).items() if n in biased(c)}
    shapes |= {"input_layernorm.weight": (c.hidden_size,), "post_attention_layernorm.weight": (c.hidden_size,)}
    if c.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    return shapes


def outer_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors outside the blocks. A tied model has no lm_head.weight."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def model_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every tensor of the float model."""
    blocks = {f"{block_prefix(i)}.{n}": s for i in range(c.num_layers) for n, s in block_tensors(c).items()}
    return blocks | outer_tensors(c)


def linear_names(c: ModelConfig) -> list[str]:
    """Full names of every linear a recipe may decide on, in order, `lm_head` last."""
    return [f"{block_prefix(i)}.{line.name}" for i in range(c.num_layers) for line in LINEARS] + ["lm_head"]
