"""`quantbench.json`: what was written into a checkpoint, tensor by tensor, so that damage is found by name.

It lists every shard (bytes, sha256) and every tensor (file, dtype, shape, crc32 of its bytes). Tensors are checked
before they are used: scales and other small ones when the checkpoint is opened, weights when they are first read.
A crc32 finds damage; it is no protection against someone who wants to deceive.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantbench.errors import CheckpointError, ModelError, QuantbenchError
from quantbench.infer.checkpoint.shard import Array, ShardedStore

RECORD = "quantbench.json"
VERSION = 1
_SMALL = 1 << 16  # bytes; up to here a tensor is checked when the checkpoint is opened
_PARTS = ("scale", "zero_point", "shape")


@dataclass(frozen=True)
class TensorRecord:
    file: str
    dtype: str
    shape: list[int]
    bytes: int
    crc32: int


@dataclass(frozen=True)
class ShardRecord:
    bytes: int
    sha256: str


@dataclass
class Record:
    """What a checkpoint should contain. `plan` identifies what it was made by: the same plan gives the same bytes."""

    variant: str
    plan: str
    quantbench: str
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)

    def add(self, other: Record) -> None:
        self.shards |= other.shards
        self.tensors |= other.tensors

    def to_json(self) -> bytes:
        fields = {"format_version": VERSION, **asdict(self)}
        fields["shards"] = dict(sorted(fields["shards"].items()))
        fields["tensors"] = dict(sorted(fields["tensors"].items()))
        return json.dumps(fields, indent=1).encode() + b"\n"

    @staticmethod
    def read(path: Path) -> Record:
        """Raises CheckpointError where the file is not a record of a known version."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
            version = fields.pop("format_version")
            shards = {n: ShardRecord(**s) for n, s in fields.pop("shards").items()}
            tensors = {n: TensorRecord(**t) for n, t in fields.pop("tensors").items()}
            record = Record(**fields, shards=shards, tensors=tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise CheckpointError(f"{path}: not a record of a checkpoint ({reason!r}). Copy it again") from None
        if version != VERSION:
            raise CheckpointError(
                f"{path}: format_version {version}, allowed: {VERSION}. Use the quantbench that wrote it"
            )
        return record


def crc(array: Array) -> int:
    """crc32 of the array's bytes, row-major."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return zlib.crc32(flat.data)


class RecordedStore(ShardedStore):
    """The tensors of a checkpoint that has a record; each is compared with it before its first use."""

    def __init__(self, directory: Path, record: Record, error: type[QuantbenchError] = CheckpointError) -> None:
        super().__init__(directory, error)
        self.record = record
        self._checked: set[str] = set()
        problems = self._listing_problems(directory)
        small = [name for name in self.names() if name in record.tensors and self._is_small(name)]
        problems += [problem for name in small for problem in self.damage(name)]
        if problems:
            raise CheckpointError(*problems)
        self._checked.update(small)

    def read(self, name: str) -> Array:
        """Raises CheckpointError where the bytes are not those that were written."""
        if name not in self._checked:
            problems = self.damage(name)
            if problems:
                raise CheckpointError(*problems)
            self._checked.add(name)
        return super().read(name)

    def damage(self, name: str) -> list[str]:
        """A line if the tensor's bytes differ from the record, else nothing."""
        if crc(super().read(name)) == self.record.tensors[name].crc32:
            return []
        return [
            f"{self.file_of(name)}: tensor {name}: its bytes are not those that were written (crc32). Copy it again"
        ]

    def _is_small(self, name: str) -> bool:
        size = self.dtype(name).itemsize * int(np.prod(self.shape(name)))
        return name.endswith(_PARTS) or size <= _SMALL

    def _listing_problems(self, directory: Path) -> list[str]:
        stored, listed = set(self.names()), self.record.tensors
        problems = [f"{directory}: tensor {n} is in {RECORD} but not stored" for n in sorted(set(listed) - stored)]
        problems += [f"{directory}: tensor {n} is stored but not in {RECORD}" for n in sorted(stored - set(listed))]
        for name in sorted(stored & set(listed)):
            found = (self.file_of(name).name, self.dtype(name).name, list(self.shape(name)))
            wanted = (listed[name].file, listed[name].dtype, listed[name].shape)
            if found != wanted:
                problems.append(f"{directory}: tensor {name} is {found}, {RECORD} says {wanted}. Copy it again")
        return problems


def open_store(directory: Path, quantized: bool) -> ShardedStore:
    """The tensors of a model directory, checked against its record where it has one."""
    path = directory / RECORD
    if path.exists():
        return RecordedStore(directory, Record.read(path))
    return ShardedStore(directory, CheckpointError if quantized else ModelError)
