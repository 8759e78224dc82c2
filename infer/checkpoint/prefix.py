"""A prefix: tokens whose keys and values stand in front of every sequence, computed once by the float model.

The first token of a sequence (the attention sink; Xiao et al. 2023, arXiv 2309.17453) has inputs of down_proj that are
thousands of times larger than any other token's. Under one static scale they leave no codes to the others. Behind a
prefix the text has no first token, so no giant input is ever quantized (PrefixQuant, Chen et al. 2024, arXiv
2410.05265).

In a checkpoint it is a file of its own, which the index of shards does not name, and an entry of config.json:

    prefix.safetensors   k, v f32[layers, kv_heads, p, head_dim], K after RoPE at positions 0 .. p-1
    config.json          "quantbench_prefix": {"token_ids": [1], "file": …, "sha256": …, "reason": "…"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.errors import CheckpointError, QuantbenchError
from quantbench.infer.checkpoint.record import Record
from quantbench.infer.checkpoint.shard import StoredTensor, read_shard
from quantbench.infer.checkpoint.shard_writer import write_shard
from quantbench.infer.models import ModelConfig

F32 = npt.NDArray[np.float32]
KEY = "quantbench_prefix"
FILE = "prefix.safetensors"


@dataclass(frozen=True, eq=False)
class Prefix:
    """`k` and `v` f32[layers, kv_heads, p, head_dim] of the tokens `ids`; `reason` says why these."""

    ids: tuple[int, ...]
    k: F32
    v: F32
    reason: str = ""

    def __len__(self) -> int:
        return len(self.ids)


def write_prefix(folder: Path, prefix: Prefix) -> dict[str, Any]:
    """Writes the file into `folder`, atomically; returns the entry that config.json holds under KEY."""
    record = Record("", "", "")
    tensors = {"k": np.asarray(prefix.k, np.float32), "v": np.asarray(prefix.v, np.float32)}
    write_shard(folder / FILE, tensors, record)
    sha256 = record.shards[FILE].sha256
    return {"token_ids": list(prefix.ids), "file": FILE, "sha256": sha256, "reason": prefix.reason}


def read_prefix(folder: Path, entry: Any, config: ModelConfig) -> Prefix:
    """The prefix that config.json's `entry` speaks of. Raises CheckpointError, all problems at once."""
    if problems := list(_entry_problems(entry, config)):
        raise CheckpointError(*(f"{folder / 'config.json'}: {KEY}: {problem}" for problem in problems))
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: absent, but config.json says that the model has a prefix. Copy it again")
    tensors = _tensors(path, entry["sha256"])
    if problems := list(_shape_problems(tensors, len(entry["token_ids"]), config)):
        raise CheckpointError(*(f"{path}: {problem}. Copy it again" for problem in problems))
    k, v = (np.array(tensors[name].read(), np.float32) for name in "kv")
    if not (np.isfinite(k).all() and np.isfinite(v).all()):
        raise CheckpointError(f"{path}: has NaN or infinite values. Calibrate again")
    return Prefix(tuple(entry["token_ids"]), k, v, str(entry.get("reason", "")))


def _tensors(path: Path, sha256: str) -> Mapping[str, StoredTensor]:
    from quantbench.infer.checkpoint.source import file_sha256  # which imports this module

    try:
        tensors = read_shard(path, CheckpointError)
    except QuantbenchError as damaged:
        raise CheckpointError(*damaged.problems) from None
    if file_sha256(path) != sha256:
        raise CheckpointError(f"{path}: its bytes are not those that were written (sha256). Copy it again")
    return tensors


def _entry_problems(entry: Any, config: ModelConfig) -> Iterator[str]:
    if not isinstance(entry, dict) or not {"token_ids", "file", "sha256"} <= set(entry):
        yield "not an object with token_ids, file and sha256. Copy it again"
        return
    ids = entry["token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        yield f"token_ids: {ids} are not ids of the vocabulary of {config.vocab_size}. Copy it again"
    elif len(ids) >= config.max_positions:
        yield f"token_ids: {len(ids)} tokens leave nothing of the model's {config.max_positions} positions"
    if entry["file"] != FILE:
        yield f"file: {entry['file']!r}, allowed: {FILE}"


def _shape_problems(tensors: Mapping[str, StoredTensor], tokens: int, config: ModelConfig) -> Iterator[str]:
    expected = (config.num_layers, config.num_kv_heads, tokens, config.head_dim)
    for name in sorted({"k", "v"} | set(tensors)):
        if name not in ("k", "v"):
            yield f"tensor {name} is unknown"
        elif name not in tensors:
            yield f"tensor {name} is missing"
        elif tensors[name].shape != expected or tensors[name].dtype != np.float32:
            found = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            yield f"tensor {name} is {found}, expected float32 {list(expected)}"
