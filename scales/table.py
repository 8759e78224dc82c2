"""The scale table: every number calibration decided, with its reason and its loss.

On disk two files in one directory: `scales.safetensors` (arrays `<name>.scale`, `.zero`, `.absmax`) and `scales.json`
(everything else, and the sha256 of the first, so that a damaged or mixed-up pair is refused).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as serialize_arrays

from quantbench.errors import CheckpointError
from quantbench.scales.arrays import F32, I32, Array

DIVISORS = {"int8": 127.0, "int4": 7.5, "fp8_e4m3": 448.0}  # symmetric scale = absmax / divisor
KINDS = ("weight", "input", "cache", "transform", "offset")
_TEXT = ("kind", "format", "granularity", "observer", "reason", "loss", "group_size")


@dataclass(frozen=True, eq=False)
class Entry:
    """One decision. `absmax` is the raw range (before the division by 127, 7.5 or 448), shaped like `scale`.

    kind        name                                             granularity and shape of scale
    weight      model.layers.0.self_attn.q_proj.weight           tensor [1], channel [N, 1], group [N, K/G], block
    input       model.layers.0.self_attn.q_proj.input            tensor [1]; token [0] (dynamic: decided at run time)
    cache       model.layers.0.self_attn.k_cache, ….v_cache      head [KV]; token [0] (dynamic)
    transform   model.layers.0.input_layernorm.smooth            channel [C]: the norm's output is divided by scale
    offset      model.layers.0.self_attn.v_proj.shift            channel [C]: its output moves down by scale
                model.layers.0.attn_in.bias_correction           channel [C]: absmax is the input's mean, scale that of
                                                                 the quantized input. Offsets may be of any sign
    """

    name: str
    kind: str
    format: str
    granularity: str
    scale: F32
    zero: I32 | None
    absmax: F32
    group_size: int | None
    observer: str
    reason: str
    loss: float | None  # sum of squared errors / sum of squares of this tensor under this scale; None where not known


@dataclass
class ScaleTable:
    entries: dict[str, Entry] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"the scale table has no entry {name!r} ({len(self.entries)} others)") from None

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def add(self, entry: Entry) -> None:
        """Raises CheckpointError if the name is already decided: a scale has one owner."""
        if entry.name in self.entries:
            raise CheckpointError(f"{entry.name}: decided twice in one scale table")
        self.entries[entry.name] = entry

    @staticmethod
    def merge(*tables: ScaleTable) -> ScaleTable:
        """The union of tables of different blocks. Raises CheckpointError where two decide the same name."""
        union = ScaleTable()
        for table in tables:
            for entry in table:
                union.add(entry)
        return union

    def save(self, directory: Path) -> None:
        """Writes both files, each atomically. The same table always gives the same bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Array] = {}
        for entry in self:
            arrays[f"{entry.name}.scale"] = np.ascontiguousarray(entry.scale, np.float32)
            arrays[f"{entry.name}.absmax"] = np.ascontiguousarray(entry.absmax, np.float32)
            if entry.zero is not None:
                arrays[f"{entry.name}.zero"] = np.ascontiguousarray(entry.zero, np.int32)
        data = serialize_arrays(arrays)
        words = {e.name: {k: getattr(e, k) for k in _TEXT} | {"shape": list(e.scale.shape)} for e in self}
        text = json.dumps({"sha256": hashlib.sha256(data).hexdigest(), "entries": words}, indent=1)
        write_atomically(directory / "scales.safetensors", data)
        write_atomically(directory / "scales.json", text.encode() + b"\n")

    @staticmethod
    def load(directory: Path) -> ScaleTable:
        """Reads both files. Raises CheckpointError listing everything that is missing, damaged or inconsistent."""
        words, arrays = _read(directory)
        problems: list[str] = []
        table = ScaleTable()
        for name, fields in words.items():
            problem = _problem(name, fields, arrays)
            if problem:
                problems.append(f"{directory / 'scales.json'}: {name}: {problem}")
                continue
            rest = {k: fields[k] for k in _TEXT}
            scale, absmax, zero = arrays[f"{name}.scale"], arrays[f"{name}.absmax"], arrays.get(f"{name}.zero")
            table.add(Entry(name=name, scale=scale, absmax=absmax, zero=zero, **rest))
        owned = {f"{name}.{part}" for name in words for part in ("scale", "absmax", "zero")}
        problems += [
            f"{directory / 'scales.safetensors'}: {n}: no entry in scales.json" for n in sorted(set(arrays) - owned)
        ]
        if problems:
            raise CheckpointError(*problems)
        return table


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds the old bytes or `data`, never half."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; then it is flushed to disk and renamed to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(directory: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Array]]:
    try:
        data = (directory / "scales.safetensors").read_bytes()
        document = json.loads((directory / "scales.json").read_text())
        checksum, words = document["sha256"], document["entries"]
        if checksum != hashlib.sha256(data).hexdigest():
            raise CheckpointError(
                f"{directory}: scales.safetensors is not the file that scales.json describes (sha256 differs); "
                "restore both from the same run"
            )
        return words, parse_arrays(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: the scale table cannot be read: {error}") from error


def _problem(name: str, fields: dict[str, Any], arrays: dict[str, Array]) -> str | None:
    """What is wrong with one entry, or None."""
    missing = [k for k in (*_TEXT, "shape") if k not in fields]
    if missing:
        return f"without {', '.join(missing)}"
    if fields["kind"] not in KINDS:
        return f"kind {fields['kind']!r} is not one of {', '.join(KINDS)}"
    absent = [f"{name}.{part}" for part in ("scale", "absmax") if f"{name}.{part}" not in arrays]
    if absent:
        return f"scales.safetensors has no {', '.join(absent)}"
    shape = arrays[f"{name}.scale"].shape
    if list(shape) != fields["shape"]:
        return f"scale has shape {list(shape)}, scales.json says {fields['shape']}"
    return None
