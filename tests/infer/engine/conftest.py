"""Tiny random models on disk, one per family and RoPE kind, and engines on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from quantbench.infer.engine import Engine
from quantbench.infer.models import family_of, model_tensors

VOCABULARY = 97
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


@pytest.fixture(params=["reference", "cpu"])
def load(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> Callable[..., Engine]:
    """`load(name, mode, **options)`: an engine; every test that asks for it runs on both columns of the op table."""

    def engine_of(name: str, mode: str | None = None, **options: Any) -> Engine:
        return Engine.load(str(model_path(name)), mode, **({"ops": request.param} | options))

    return engine_of
