"""Writing one safetensors file: straight from the arrays, without a second copy of them in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quantbench.infer.checkpoint.record import Record, ShardRecord, TensorRecord, crc
from quantbench.infer.checkpoint.shard import DTYPES, Array


def write_shard(path: Path, tensors: Mapping[str, Array], record: Record) -> None:
    """Writes `tensors` to a temporary file, flushes it and renames it to `path`; adds the shard to `record`.

    The same tensors always give the same bytes: wider elements first (which keeps every tensor aligned), then by name.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        for chunk in (len(head).to_bytes(8, "little"), head):
            file.write(chunk)
            digest.update(chunk)
        for name in names:
            array = np.ascontiguousarray(tensors[name])
            data = array.reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
            record.tensors[name] = TensorRecord(
                path.name, array.dtype.name, list(array.shape), array.nbytes, crc(array)
            )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    record.shards[path.name] = ShardRecord(8 + len(head) + end, digest.hexdigest())


def sync_to_disk(path: Path) -> None:
    """Flushes a file, or the entries of a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
