"""Tiny random models as HF directories, and a plan for each mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from quantbench.infer.checkpoint.record import Record
from quantbench.infer.checkpoint.shard import read_shard
from quantbench.infer.checkpoint.shard_writer import write_shard
from quantbench.infer.models import family_of, linear_names, model_tensors
from quantbench.quantizers.formats import FORMATS
from quantbench.quantizers.weight import quantize_weight, scale_shape
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import CachePlan, LayerPlan, VariantPlan, parse_mode

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(t, special=True) for t in ("<s>", "</s>", "<|user|>", "<|assistant|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9, "naïve 🙂 日本語"], trainer)
    return tokenizer.to_str()


def weights_of(hf: dict[str, Any], dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    config = family_of(hf).read_config(hf)
    return {name: (rng.standard_normal(s) * 0.1).astype(DTYPES[dtype]) for name, s in model_tensors(config).items()}


@pytest.fixture
def make_model(tmp_path: Path, tokenizer_json: str) -> Make:
    """make_model(name, dtype=…, shards=…, tensors=…, **config) writes a HF directory and returns it."""

    def make(
        name: str = "model", dtype: str = "float32", shards: int = 1, edit: Callable[..., Any] | None = None, **hf: Any
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        config = CONFIG | {"torch_dtype": dtype} | hf
        tensors = weights_of(config, dtype)
        if edit:
            edit(tensors)
        (directory / "config.json").write_text(json.dumps(config))
        write_tensors(directory, tensors, shards)
        (directory / "tokenizer.json").write_text(tokenizer_json)
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        return directory

    return make


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """By the safetensors library, so that our own reading is checked against it."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = sorted(tensors)
    weight_map = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def variant_of(mode: str, source: Any, name: str | None = None, **changes: Any) -> VariantPlan:
    """Every linear but lm_head in `mode`, as the default recipe plans it; `changes` go into each LayerPlan."""
    kind = parse_mode(mode)
    defaults = {"int8": ("channel", None), "int4": ("group", 32), "fp8_e4m3": ("tensor", None)}
    granularity, group = defaults.get(kind.weights, (None, None))
    plan = LayerPlan("", kind.weights, granularity, group, activations=kind.activations)
    layers = {n: replace(plan, name=n, **changes) for n in linear_names(source.config)}
    dtype = kind.weights if kind.weights in DTYPES else "bfloat16"
    layers["lm_head"] = LayerPlan("lm_head", dtype)
    return VariantPlan(name or mode, kind, dtype, CachePlan(kind.cache), layers)


def entry_of(plan: LayerPlan, w: np.ndarray) -> Entry:
    """Absmax (or min-max) scales of one weight."""
    fmt = FORMATS[plan.weights]
    rows, columns = w.shape
    shape = scale_shape(str(plan.granularity), w.shape, plan.group_size)
    height = {"tensor": rows, "channel": 1, "group": 1, "block": 128}[str(plan.granularity)]
    width = {"tensor": columns, "channel": columns, "group": plan.group_size or 1, "block": 128}[str(plan.granularity)]
    parts = [np.add.reduceat, np.maximum.reduceat, np.minimum.reduceat]
    spans = [np.arange(0, rows, height), np.arange(0, columns, width)]
    high, low = (part(part(w, spans[0], axis=0), spans[1], axis=1).reshape(shape) for part in parts[1:])
    absmax = np.maximum(np.abs(high), np.abs(low)).astype(np.float32)
    scale, zero = (fmt.scale_of(absmax), None) if plan.symmetric else fmt.affine_of(low, high)
    group = plan.group_size
    name = f"{plan.name}.weight"
    return Entry(
        name, "weight", plan.weights, str(plan.granularity), scale, zero, absmax, group, "absmax", "test", None
    )


def input_entry(plan: LayerPlan, absmax: float) -> Entry:
    values = np.array([absmax], np.float32)
    scale = FORMATS[str(plan.activations)].scale_of(values)
    return Entry(
        f"{plan.name}.input", "input", str(plan.activations), "tensor", scale, None, values, None, "absmax", "", None
    )


def table_of(source: Any, variant: VariantPlan) -> ScaleTable:
    table = ScaleTable()
    tied = variant.mode.weights == "fp8_e4m3"
    for plan in variant.layers.values():
        if plan.quantized:
            entry = entry_of(plan, source.float_tensor(f"{plan.name}.weight"))
            if tied and plan.granularity == "tensor":
                entry = replace(entry, scale=np.array([0.005], np.float32))
            table.add(entry)
            if plan.activations and not plan.dynamic:
                table.add(input_entry(plan, 4.0))
    return table


def block_of(source: Any, variant: VariantPlan, table: ScaleTable, layer: int) -> dict[str, np.ndarray]:
    """What calibrate.apply hands to the writer for one block."""
    from quantbench.infer.checkpoint.tensors import cache_tensors, linear_tensors

    prefix = f"model.layers.{layer}"
    found: dict[str, np.ndarray] = {}
    for name, w in source.float_block(layer).items():
        linear = f"{prefix}.{name.removesuffix('.weight')}"
        plan = variant.layers.get(linear)
        if name.endswith(".bias") or plan is None or not plan.quantized:
            found[name] = w
            continue
        scale = float(table[f"{linear}.input"].scale[0]) if f"{linear}.input" in table else None
        parts = linear_tensors(plan, quantize_weight(w, table[f"{linear}.weight"]), scale)
        found |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in parts.items()}
    if variant.cache.calibrated:
        heads = np.arange(1, source.config.num_kv_heads + 1, dtype=np.float32) / 100
        found |= cache_tensors(heads, heads * 2)
    return found


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """write_checkpoint(source, variant) -> directory, written block by block."""
    from quantbench.infer.checkpoint.write import CheckpointWriter

    def write(source: Any, variant: VariantPlan, path: Path | None = None) -> Path:
        writer = CheckpointWriter(path or tmp_path / variant.name, source, variant)
        table = table_of(source, variant)
        for layer in range(source.config.num_layers):
            writer.add_block(layer, block_of(source, variant, table, layer))
        return writer.finish(table)

    return write


def load_shard(file: Path) -> dict[str, np.ndarray]:
    """Copies of all tensors (the safetensors library has no e4m3 in numpy)."""
    return {name: tensor.read().copy() for name, tensor in read_shard(file).items()}


def save_shard(tensors: dict[str, np.ndarray], file: Path) -> None:
    write_shard(file, tensors, Record("", "", ""))
