"""A decoder's dimensions, read once from a HF `config.json` (or from GGUF metadata) and never guessed again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `kind`: default | linear | dynamic | llama3. Fields as in HF's `rope_scaling`."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0

    def inverse_frequencies(self, head_dim: int, length: int) -> npt.NDArray[np.float32]:
        """Rotation speeds, shape [head_dim/2], float32, for a sequence of `length` tokens.

        linear: positions divided by `factor` (Chen et al. 2023, Position Interpolation). dynamic: the base grows with
        the length beyond the trained one (NTK-aware). llama3: low frequencies divided by `factor`, high ones kept,
        linear in between (Llama 3.1 release).
        """
        theta = self.theta
        if self.kind == "dynamic" and length > self.original_max_positions:
            growth = self.factor * length / self.original_max_positions - (self.factor - 1)
            theta = theta * growth ** (head_dim / (head_dim - 2))
        inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            inverse = inverse / self.factor
        if self.kind == "llama3":
            inverse = self._llama3(inverse)
        return inverse.astype(np.float32)

    def _llama3(self, inverse: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        wavelength = 2 * math.pi / inverse
        low, high = (self.original_max_positions / f for f in (self.low_freq_factor, self.high_freq_factor))
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * inverse / self.factor + smooth * inverse
        return np.where(wavelength > low, inverse / self.factor, np.where(wavelength < high, inverse, between))


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions and switches of one model. All counts are per model, `head_dim` per head."""

    family: str  # HF model_type: "llama", "qwen2", "qwen3", "mistral"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    max_positions: int
    tie_word_embeddings: bool
    dtype: str  # of the stored tensors: "float32" | "bfloat16" | "float16"
    attention_bias: bool = False  # bias on q, k, v (Qwen2: always)
    output_bias: bool = False  # bias on o_proj (Llama with attention_bias)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head of q and k before RoPE (Qwen3)
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()  # per layer; empty = all layers are windowed when sliding_window is set
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def window_of(self, layer: int) -> int | None:
        """Attention window of a layer in tokens, or None for full attention."""
        if self.sliding_window is None or (self.windowed_layers and not self.windowed_layers[layer]):
            return None
        return self.sliding_window


def tokens_of(value: Any) -> tuple[int, ...]:
    """HF writes `eos_token_id` as null, a number or a list."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)
