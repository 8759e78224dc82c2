"""HF model directories: config.json, safetensors (one file or shards with an index), tokenizer files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantbench.errors import ModelError
from quantbench.infer.checkpoint.check import shown, tensor_problems
from quantbench.infer.checkpoint.prefix import KEY, read_prefix
from quantbench.infer.checkpoint.record import open_store
from quantbench.infer.checkpoint.source import EMBEDDING, ModelSource
from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.models import ModelConfig, family_of, model_tensors
from quantbench.infer.models.config import tokens_of


def open_directory(path: Path, name: str | None = None) -> ModelSource:
    """Opens a HF directory, float or compressed-tensors. Raises ModelError or CheckpointError, all problems at once."""
    hf_config = read_json(path / "config.json")
    config = _with_generation_eos(family_of(hf_config).read_config(hf_config), path)
    quantized = hf_config.get("quantization_config") is not None
    store = open_store(path, quantized)
    source = ModelSource(
        name=name or path.resolve().name,
        path=path,
        config=config,
        hf_config=hf_config,
        store=store,
        load_tokenizer=lambda: Tokenizer.from_directory(path, config.bos_token_id, config.eos_token_ids),
        prefix=read_prefix(path, hf_config[KEY], config) if KEY in hf_config else None,
    )
    if quantized:
        from quantbench.infer.checkpoint.quantized import open_quantized

        return open_quantized(source)
    problems = tensor_problems(store, model_tensors(config), {}, config.tie_word_embeddings)
    if problems:
        raise ModelError(*shown(path, problems))
    source.config = replace(config, dtype=store.dtype(EMBEDDING).name)
    return source


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises ModelError where it is absent or something else."""
    if not path.exists():
        raise ModelError(f"{path}: absent. A HF model directory has one; give such a directory")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as reason:
        raise ModelError(f"{path}: not JSON ({reason}). Copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object. Copy it again")
    return value


def _with_generation_eos(config: ModelConfig, path: Path) -> ModelConfig:
    """Chat models list their end tokens in generation_config.json, which is then the fuller one."""
    file = path / "generation_config.json"
    more = tokens_of(read_json(file).get("eos_token_id")) if file.exists() else ()
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))
