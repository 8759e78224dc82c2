"""Tiny random models on disk, one per family and RoPE kind, and engines on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from quantbench.errors import DependencyError
from quantbench.infer.checkpoint.source import EMBEDDING, LinearWeight, ModelSource, Quantization, open_model
from quantbench.infer.engine import Engine
from quantbench.infer.engine.convert import round_to_nearest
from quantbench.infer.models import family_of, linear_names, model_tensors
from quantbench.infer.ops import Ops, load_ops
from quantbench.quantizers.formats import FORMATS
from quantbench.vocabulary import CachePlan, LayerPlan

VOCABULARY = 97
INPUT_SCALES = {"self_attn.q_proj": 0.03, "self_attn.k_proj": 0.03, "self_attn.v_proj": 0.03, "self_attn.o_proj": 0.05,
                "mlp.gate_proj": 0.03, "mlp.up_proj": 0.03, "mlp.down_proj": 0.1}  # fmt: skip
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_bfloat16": LLAMA | {"torch_dtype": "bfloat16"},
    "llama_float16": LLAMA | {"torch_dtype": "float16"},
    "llama_untied_biased": LLAMA | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama_linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
    "llama3": LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_windowed": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "llama_odd": LLAMA | {  # no size is a multiple of any vector
        "hidden_size": 42, "intermediate_size": 37, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10,
    },
    "llama_wide_heads": LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 80},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 19},
}  # fmt: skip


def write_model(path: Path, hf: dict[str, Any], seed: int = 0) -> Path:
    """A random model of the given config: weights large enough that logits differ clearly from token to token."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in model_tensors(family_of(hf).read_config(hf)).items():
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * random.standard_normal(shape)
        else:
            tensors[name] = random.standard_normal(shape) * (1.5 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.3)
    path.mkdir(parents=True)
    dtype = ml_dtypes.bfloat16 if hf["torch_dtype"] == "bfloat16" else np.dtype(hf["torch_dtype"])
    save_file({k: v.astype(dtype) for k, v in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf))
    return path


def write_tokenizer(path: Path) -> None:
    """Id i is the character chr(33 + i); id 0 is the end of sequence."""
    fast = FastTokenizer(models.WordLevel({chr(33 + i): i for i in range(VOCABULARY)}, unk_token="!"))
    fast.decoder = decoders.Fuse()
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of the tiny model of a name in MODELS, or of "llama_text": llama with a tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def path_of(name: str) -> Path:
        path = root / name
        if not path.exists():
            write_model(path, BASE | MODELS[name.removesuffix("_text")])
            if name.endswith("_text"):
                write_tokenizer(path)
        return path

    return path_of


@pytest.fixture(scope="session", params=["reference", "cpu", "cuda"])
def column(request: pytest.FixtureRequest) -> str | Ops:
    """Every column of the op table in turn; the GPU is opened once, or skipped with the reason where there is none."""
    if request.param != "cuda":
        return str(request.param)
    try:
        return load_ops("cuda")
    except DependencyError as error:
        pytest.skip(f"runs on a machine with an NVIDIA GPU: {error}")


@pytest.fixture
def load(column: str | Ops, model_path: Callable[[str], Path]) -> Callable[..., Engine]:
    """`load(name, mode, **options)`: an engine; every test that asks for it runs on all columns of the op table."""

    def engine_of(name: str, mode: str | None = None, **options: Any) -> Engine:
        return Engine.load(str(model_path(name)), mode, **({"ops": column} | options))

    return engine_of


@dataclass
class Calibrated(ModelSource):
    """A float source served as if it had been calibrated: int8 weights, static scales, a cache with scales per head."""

    own_scales: dict[str, float] = field(default_factory=dict)  # of linears that were calibrated apart
    own_formats: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # "mlp.up_proj": weights, activations
    damaged: str = ""

    def linear(self, name: str) -> LinearWeight:
        if name == "lm_head":
            return LinearWeight(name, self.read(EMBEDDING), None)
        weight = self.read(f"{name}.weight")
        if name == self.damaged:
            return LinearWeight(name, np.full_like(weight, np.nan), None)
        kind = name.split(".", 3)[3]
        if kind in self.own_formats:
            weights, activations = self.own_formats[kind]
            held = weight if weights == "float32" else round_to_nearest(weight, weights)
            return LinearWeight(name, held, None, activations)
        scale = self.own_scales.get(name, INPUT_SCALES[kind])
        return LinearWeight(name, round_to_nearest(weight, "int8"), None, "int8", scale)

    def cache_scales(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        divisor = (
            FORMATS[self.quantization.cache.format].divisor if self.quantization and self.quantization.cache else 1
        )
        return tuple(np.array([4 + layer, 6], np.float32) / np.float32(divisor) for _ in "kv")


@pytest.fixture
def calibrated(model_path: Callable[[str], Path]) -> Callable[..., Calibrated]:
    def source_of(cache: str = "int8", **changes: object) -> Calibrated:
        source = open_model(str(model_path("llama")))
        layers = {name: LayerPlan(name, "int8", "channel", activations="int8") for name in linear_names(source.config)}
        own = {f.name: getattr(source, f.name) for f in fields(ModelSource)}
        return Calibrated(**(own | {"quantization": Quantization(layers, CachePlan(cache))} | changes))

    return source_of
