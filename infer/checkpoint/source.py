"""A model to read from, whatever it is stored in: one interface over HF directories, our checkpoints and GGUF files.

`open_model` checks everything that can be checked without reading weights; reading is one tensor at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.shard import Array, TensorStore
from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.models import ModelConfig, biased, block_prefix, block_tensors
from quantbench.vocabulary import CachePlan, LayerPlan

if TYPE_CHECKING:
    from quantbench.quantizers.weight import QuantizedWeight

F32 = npt.NDArray[np.float32]
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class LinearWeight:
    """One linear as the engine takes it. `weight` [N, K] in f32/bf16/f16, or quantized; `bias` f32 [N].

    `activations` names the format its input is quantized to (None: stays float); `input_scale` is then the static
    scale, or None for one scale per token.
    """

    name: str
    weight: Array | QuantizedWeight
    bias: F32 | None
    activations: str | None = None
    input_scale: float | None = None


@dataclass(frozen=True)
class Quantization:
    """What config.json's `quantization_config` says: the plan of every quantized linear, and of the KV cache."""

    layers: dict[str, LayerPlan]
    cache: CachePlan | None = None


@dataclass
class ModelSource:
    """An opened model. `path` is the directory or file; `config` its dimensions; `quantization` None for float ones.
    `prefix`: what stands in front of every sequence, for the few checkpoints that have one."""

    name: str
    path: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    store: TensorStore
    load_tokenizer: Callable[[], Tokenizer] = field(repr=False)
    quantization: Quantization | None = None
    prefix: Prefix | None = None

    def names(self) -> list[str]:
        """Full HF names of the stored tensors."""
        return self.store.names()

    def read(self, name: str) -> Array:
        """One tensor in its stored dtype, read-only. Raises ModelError for a name that is not stored."""
        if name not in self._known:
            raise ModelError(f"{self.path}: no tensor {name}. It has {len(self._known)} others; names() lists them")
        return self.store.read(name)

    def float_tensor(self, name: str) -> F32:
        """`<linear or norm>.weight` or `.bias` in float32, dequantized where it is stored quantized."""
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and self.quantization and layer in self.quantization.layers:
            from quantbench.infer.checkpoint.quantized import float_weight

            return float_weight(self.linear(layer))
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = EMBEDDING
        return self.read(name).astype(np.float32)

    def float_block(self, layer: int) -> dict[str, F32]:
        """Every float tensor of one block in float32, by name within the block (`self_attn.q_proj.weight`, …)."""
        prefix = block_prefix(layer)
        return {name: self.float_tensor(f"{prefix}.{name}") for name in block_tensors(self.config)}

    def linear(self, name: str) -> LinearWeight:
        """A linear by full name (`model.layers.0.mlp.up_proj`, `lm_head`), its weight as stored."""
        if self.quantization and name in self.quantization.layers:
            from quantbench.infer.checkpoint.quantized import read_linear

            return read_linear(self, name, self._bias(name))
        tied = name == "lm_head" and self.config.tie_word_embeddings
        return LinearWeight(name, self.read(EMBEDDING if tied else f"{name}.weight"), self._bias(name))

    def cache_scales(self, layer: int) -> tuple[F32, F32] | None:
        """Static scales of K and V, each f32 [kv_heads], or None where the cache has none: it is float, or dynamic."""
        cache = self.quantization.cache if self.quantization else None
        if cache is None or not cache.calibrated:
            return None
        names = (f"{block_prefix(layer)}.self_attn.{side}_scale" for side in "kv")
        k, v = (np.asarray(self.read(name), np.float32).reshape(-1) for name in names)
        heads = self.config.num_kv_heads
        return np.broadcast_to(k, heads).copy(), np.broadcast_to(v, heads).copy()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelError where it has none that can be read."""
        return self.load_tokenizer()

    def sha256(self) -> str:
        """Of the file, or of the sorted names and contents of the directory's config and shards. Read once."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        config = self.path / "config.json"
        for file in sorted(self.store.files) + ([config] if config.exists() else []):
            digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.store.names())

    def _bias(self, name: str) -> F32 | None:
        if name.rpartition("layers.")[2].partition(".")[2] not in biased(self.config):
            return None
        return self.read(f"{name}.bias").astype(np.float32)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_model(name: str) -> Path:
    """Downloads what `name` (`demo:<name>` or `org/name` of a hub) stands for, once, and returns where it lies.

    Raises ModelError for another kind of name or a failed download.
    """
    from quantbench.infer.checkpoint import demo, hub

    if name.startswith("demo:"):
        return demo.fetch_demo(name)
    if hub.is_hub_name(name):
        return hub.fetch_hub(name)
    raise ModelError(
        f"{name}: nothing to fetch. Give {', '.join(sorted(demo.MODELS | demo.TEXTS))} or a hub name (org/name)"
    )


def open_model(spec: str | Path) -> ModelSource:
    """The model `spec` names: a HF directory, a checkpoint of ours, a .gguf file, `demo:<name>`, or a hub name already
    in the local cache. Nothing is downloaded. Raises ModelError (CheckpointError for quantized directories) listing
    every problem: missing or extra tensors, wrong shapes and dtypes, unreadable shards, an unknown architecture.
    """
    text, path = str(spec), Path(spec)  # imported below is what is needed: the gguf library alone takes 70 ms
    if text.startswith("demo:"):
        from quantbench.infer.checkpoint import demo, gguf

        return gguf.open_gguf(demo.demo_model(text), name=text)
    if path.suffix == ".gguf" and path.is_file():
        from quantbench.infer.checkpoint import gguf

        return gguf.open_gguf(path)
    from quantbench.infer.checkpoint import hf

    if path.is_dir():
        return hf.open_directory(path)
    from quantbench.infer.checkpoint import demo, hub

    if hub.is_hub_name(text):
        return hf.open_directory(hub.cached_directory(text), name=text)
    raise ModelError(
        f"{text}: no such model. Give a HF directory, a checkpoint directory, a .gguf file, a demo name "
        f"({', '.join(sorted(demo.MODELS))}) or a hub name (org/name)"
    )
