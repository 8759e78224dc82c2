"""One safetensors file: its header checked at the door, its tensors mapped one at a time.

The header is read here rather than through `safetensors.safe_open` because three things are needed that it does not
give: bfloat16 and e4m3 as numpy arrays, the names of the tensors that a truncated file has lost, and a mapping that
ends with the array (so that the resident memory of a pass over the model is one block, not the model).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quantbench.errors import ModelError, QuantbenchError

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_COPIED = 1 << 14  # bytes up to which reading is cheaper than mapping
_MAX_HEADER = 100_000_000  # the limit the safetensors library sets itself


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` in bytes from the start of `file`."""

    name: str
    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> Array:
        """The array, read-only. A large one is mapped from the file: paged in when touched, released with the array."""
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        if self.nbytes <= _COPIED:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                return np.frombuffer(file.read(self.nbytes), self.dtype).reshape(self.shape)
        return np.require(map_bytes(self.file, self.offset, self.nbytes).view(self.dtype), requirements="A").reshape(
            self.shape
        )


def map_bytes(file: Path, offset: int, count: int) -> npt.NDArray[np.uint8]:
    """`count` bytes of a file from `offset` on, mapped, read-only. As np.memmap, which takes ten times as long."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with file.open("rb", buffering=0) as opened:
        mapped = mmap.mmap(opened.fileno(), offset - start + count, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, np.uint8, count, offset - start)


class TensorStore(Protocol):
    """Named tensors on disk, read one at a time: sharded safetensors or a GGUF file."""

    @property
    def files(self) -> list[Path]: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def read(self, name: str) -> Array: ...


def read_shard(path: Path, error: type[QuantbenchError] = ModelError) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file. Raises `error`, all problems at once, where the file is not one."""
    size = path.stat().st_size
    header, start = _header(path, size, error)
    found, problems, lost = {}, [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        problem = _entry_problem(entry)
        if problem:
            problems.append(f"{path}: tensor {name}: {problem}")
            continue
        begin, end = entry["data_offsets"]
        if start + end > size:
            lost.append(name)
        found[name] = StoredTensor(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
    if lost:
        need = start + max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        problems.append(
            f"{path}: truncated: {size} bytes of {need}; incomplete tensors: {', '.join(sorted(lost))}. Copy it again"
        )
    if problems:
        raise error(*problems)
    return found


def _header(path: Path, size: int, error: type[QuantbenchError]) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise error(f"{path}: not a safetensors file, or truncated within its header ({size} bytes). Copy it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as reason:
        raise error(f"{path}: the safetensors header is not JSON ({reason}). Copy it again") from None
    if not isinstance(header, dict):
        raise error(f"{path}: the safetensors header is not a JSON object. Copy it again")
    return header, 8 + length


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return "its header entry lacks dtype, shape or data_offsets"
    if entry["dtype"] not in DTYPES:
        return f"dtype {entry['dtype']!r} is not supported. Known: {', '.join(sorted(DTYPES))}"
    begin, end = entry["data_offsets"]
    need = DTYPES[entry["dtype"]].itemsize * int(np.prod(entry["shape"], dtype=np.int64))
    if begin < 0 or end - begin != need:
        return f"shape {entry['shape']} of {entry['dtype']} needs {need} bytes, its offsets give {end - begin}"
    return None


class ShardedStore:
    """The tensors of one directory: `model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, directory: Path, error: type[QuantbenchError] = ModelError) -> None:
        self.files, indexed = _shard_files(directory, error)
        self._tensors = _merged(self.files, error)
        lost = [
            f"{directory / file}: {name} is listed by the index but not there"
            for name, file in indexed.items()
            if name not in self._tensors or self._tensors[name].file.name != file
        ]
        if lost:
            raise error(*lost)

    @classmethod
    def of_files(cls, files: list[Path], error: type[QuantbenchError] = ModelError) -> ShardedStore:
        """The tensors of some shards, whatever any index says."""
        store = cls.__new__(cls)
        store.files, store._tensors = files, _merged(files, error)
        return store

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._tensors[name].dtype

    def read(self, name: str) -> Array:
        return self._tensors[name].read()

    def file_of(self, name: str) -> Path:
        return self._tensors[name].file


def _merged(files: list[Path], error: type[QuantbenchError]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            tensors |= read_shard(file, error)
        except error as bad:
            problems += bad.problems
    if problems:
        raise error(*problems)
    return tensors


def _shard_files(directory: Path, error: type[QuantbenchError]) -> tuple[list[Path], dict[str, str]]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise error(f"{directory}: neither model.safetensors nor {index.name} is there. Give a HF model directory")
        return [single], {}
    try:
        indexed: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError) as reason:
        raise error(f"{index}: not an index of shards ({reason!r}). Copy it again") from None
    files = [directory / name for name in sorted(set(indexed.values()))]
    absent = [f"{index}: names {file.name}, which is absent. Copy it again" for file in files if not file.exists()]
    if absent:
        raise error(*absent)
    return files, indexed
