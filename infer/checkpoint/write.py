"""Writing a checkpoint block by block, so that a killed run loses at most one block and ends with the same bytes.

In `<path>.partial` lie the unfinished checkpoint and a record for every committed block: a block counts once its
record exists, which is written after its shard. `finish` writes what is outside the blocks, lints the whole, renames
the unfinished directory to `path`, and compares what can then be read with what was meant to be written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantbench import __version__
from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.lint import lint_checkpoint
from quantbench.infer.checkpoint.prefix import KEY, Prefix, write_prefix
from quantbench.infer.checkpoint.quantized import expected_kinds
from quantbench.infer.checkpoint.record import RECORD, Record, RecordedStore
from quantbench.infer.checkpoint.scheme import quantization_config
from quantbench.infer.checkpoint.shard import Array, ShardedStore
from quantbench.infer.checkpoint.shard_writer import sync_to_disk, write_shard
from quantbench.infer.checkpoint.source import ModelSource, Quantization
from quantbench.infer.checkpoint.tensors import linear_tensors
from quantbench.infer.models import block_prefix, outer_tensors
from quantbench.quantizers.finite import count_not_finite
from quantbench.quantizers.weight import quantize_weight
from quantbench.scales.seed import write_seed_tables
from quantbench.scales.table import ScaleTable, write_atomically
from quantbench.vocabulary import VariantPlan

_DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class CheckpointWriter:
    """Writes the checkpoint of one variant to `path`. Raises CheckpointError for anything that does not fit the plan.

    `add_block` in any order, then `finish`. A new writer on the same path goes on where the last one stopped,
    provided that model and plan are the same.
    """

    def __init__(self, path: Path, source: ModelSource, variant: VariantPlan) -> None:
        self.path, self.source, self.variant = Path(path), source, variant
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._staging = self.partial / "checkpoint"
        self._identity = _identity(source, variant)
        layers = {name: plan for name, plan in variant.layers.items() if plan.quantized}
        self._quantization = Quantization(layers, variant.cache if variant.cache.quantized else None)
        # A quantized head has codes of its own, which it cannot share with the embedding.
        tied = source.config.tie_word_embeddings and "lm_head" not in layers
        self._config = replace(source.config, tie_word_embeddings=tied)
        self._kinds = expected_kinds(self._config, self._quantization)
        self.done = self._finished()
        if self.done:
            shutil.rmtree(self.partial, ignore_errors=True)  # left by a kill just after the rename
        else:
            self._begin()

    def committed_blocks(self) -> list[int]:
        """Layers whose blocks are safely on disk."""
        layers = range(self._config.num_layers)
        return list(layers) if self.done else [layer for layer in layers if self._record_path(layer).exists()]

    def add_block(self, layer: int, tensors: Mapping[str, Array]) -> None:
        """Commits one block. Names are full or within the block; floats are rounded to the variant's dtype."""
        prefix = f"{block_prefix(layer)}."
        full = {name if name.startswith(prefix) else prefix + name: array for name, array in tensors.items()}
        self._commit(layer, full, {n for n in self._kinds if n.startswith(prefix)})

    def finish(self, table: ScaleTable, prefix: Prefix | None = None) -> Path:
        """Completes the checkpoint, with the seed's scale tables and the prefix beside the shards; returns its path."""
        if self.done:
            return self.path
        missing = sorted(set(range(self._config.num_layers)) - set(self.committed_blocks()))
        if missing:
            raise CheckpointError(f"{self.partial}: blocks {missing} were never added; add them, then finish")
        outside = self._config.num_layers
        if not self._record_path(outside).exists():
            self._commit(outside, self._outer(table), {n for n in self._kinds if ".layers." not in n})
        record = self._merged_record()
        self._write_texts(record, table, prefix)
        self._lint()
        self._rename()
        _compare(self.path, record)
        self.done = True
        return self.path

    def partial_source(self) -> ModelSource:
        """The blocks committed so far as a model: `linear`, `float_block` and `cache_scales` of those layers work."""
        files = [self._staging / self._shard_name(layer) for layer in self.committed_blocks()]
        return ModelSource(
            name=self.variant.name,
            path=self.partial,
            config=self._config,
            hf_config=self.source.hf_config,
            store=ShardedStore.of_files(files, CheckpointError),
            load_tokenizer=self.source.load_tokenizer,
            quantization=self._quantization,
        )

    def _begin(self) -> None:
        self._staging.mkdir(parents=True, exist_ok=True)
        for stale in self._staging.glob(".*.tmp"):  # half-written when an earlier run was killed
            stale.unlink()
        identity = self.partial / "plan.sha256"
        if not identity.exists():
            write_atomically(identity, self._identity.encode())
        elif identity.read_text() != self._identity:
            raise CheckpointError(
                f"{self.partial}: begun from another model or plan; its blocks are of no use. Remove it and start again"
            )

    def _finished(self) -> bool:
        record = self.path / RECORD
        return record.exists() and Record.read(record).plan == self._identity

    def _commit(self, index: int, tensors: Mapping[str, Array], expected: set[str]) -> None:
        stored = {name: self._as_stored(name, array) for name, array in tensors.items()}
        problems = [f"tensor {name} is missing" for name in sorted(expected - set(stored))]
        problems += [f"tensor {name} is not part of the plan" for name in sorted(set(stored) - expected)]
        problems += [p for name in sorted(expected & set(stored)) for p in self._problems(name, stored[name])]
        if problems:
            raise CheckpointError(*(f"variant {self.variant.name}: {problem}" for problem in problems))
        record = self._empty_record()
        write_shard(self._staging / self._shard_name(index), stored, record)
        sync_to_disk(self._staging)  # the record must not reach the disk before the shard it vouches for
        write_atomically(self._record_path(index), record.to_json())

    def _as_stored(self, name: str, array: Array) -> Array:
        _, dtype = self._kinds.get(name, ((), array.dtype))
        if dtype != np.float32:
            return array
        wanted = np.float32 if name.endswith("_scale") else _DTYPES[self.variant.dtype]
        with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported by name
            return array.astype(wanted, copy=False)

    def _problems(self, name: str, array: Array) -> list[str]:
        shape, dtype = self._kinds[name]
        problems = []
        if array.shape != shape:
            problems.append(f"tensor {name} has shape {list(array.shape)}, expected {list(shape)}")
        if dtype == np.float32:
            if count_not_finite(array):
                problems.append(f"tensor {name} has values that are NaN or infinite as {array.dtype.name}")
        elif array.dtype != dtype:
            problems.append(f"tensor {name} is {array.dtype.name}, expected {dtype.name}")
        return problems

    def _outer(self, table: ScaleTable) -> dict[str, Array]:
        """Embedding, final norm and head; the head quantized where the plan says so."""
        found: dict[str, Array] = {}
        for name in outer_tensors(self._config):
            plan = self._quantization.layers.get(name.removesuffix(".weight"))
            if plan is None:
                found[name] = self._as_stored(name, self.source.read(name))  # now: the float32 array is let go
                continue
            weight = quantize_weight(self.source.float_tensor(name), table[name])
            scale = float(table["lm_head.input"].scale[0]) if plan.activations and not plan.dynamic else None
            found |= {f"lm_head.{part}": array for part, array in linear_tensors(plan, weight, scale).items()}
        return found

    def _merged_record(self) -> Record:
        record = self._empty_record()
        for index in range(self._config.num_layers + 1):
            record.add(Record.read(self._record_path(index)))
        return record

    def _write_texts(self, record: Record, table: ScaleTable, prefix: Prefix | None) -> None:
        weight_map = {name: tensor.file for name, tensor in sorted(record.tensors.items())}
        total = sum(tensor.bytes for tensor in record.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(self._staging / "model.safetensors.index.json", _json(index))
        entry = {} if prefix is None else {KEY: write_prefix(self._staging, prefix)}
        write_atomically(self._staging / "config.json", _json(self._hf_config() | entry))
        generation = self.source.path / "generation_config.json"
        if generation.is_file():
            write_atomically(self._staging / generation.name, generation.read_bytes())
        self.source.tokenizer().save(self._staging)
        queries = self._config.num_heads // self._config.num_kv_heads
        write_seed_tables(self._staging, table, self._config.family, queries)
        write_atomically(self._staging / RECORD, record.to_json())

    def _hf_config(self) -> dict[str, Any]:
        config = {k: v for k, v in self.source.hf_config.items() if k not in ("quantization_config", "dtype", KEY)}
        config |= {"torch_dtype": self.variant.dtype, "tie_word_embeddings": self._config.tie_word_embeddings}
        quantization = quantization_config(self.variant)
        return config if quantization is None else config | {"quantization_config": quantization}

    def _lint(self) -> None:
        errors = [f for f in lint_checkpoint(self._staging) if f.severity == "error"]
        if errors:
            raise CheckpointError(*(f"{self._staging}: {f.name}: {f.message}" for f in errors))

    def _rename(self) -> None:
        sync_to_disk(self._staging)
        old = self.path.with_name(self.path.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self._staging, self.path)
        sync_to_disk(self.path.parent)
        shutil.rmtree(self.partial)
        shutil.rmtree(old, ignore_errors=True)

    def _empty_record(self) -> Record:
        return Record(self.variant.name, self._identity, __version__)

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self._config.num_layers + 1:05d}.safetensors"

    def _record_path(self, index: int) -> Path:
        return self.partial / f"block_{index:05d}.json"


def _identity(source: ModelSource, variant: VariantPlan) -> str:
    """sha256 over model and plan: blocks made under another identity must not be mixed in."""
    plan = json.dumps(asdict(variant), sort_keys=True)
    return hashlib.sha256(f"{source.sha256()}\n{plan}".encode()).hexdigest()


def _compare(path: Path, record: Record) -> None:
    """Reads every tensor of the renamed checkpoint again. Raises CheckpointError where a byte is not as written."""
    store = RecordedStore(path, record)
    damaged = [problem for name in store.names() for problem in store.damage(name)]
    if damaged:
        raise CheckpointError(*damaged)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
