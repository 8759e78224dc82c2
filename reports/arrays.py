"""The arrays of a run folder: scale tables, statistics and the sizes of a checkpoint's tensors.

Read with the safetensors library alone. Hessians are never touched: a file is opened lazily and only its ranges leave
the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from quantbench.errors import CheckpointError
from quantbench.reports import files

Floats = npt.NDArray[np.float32]
PERCENTILE = 0.999


@dataclass(frozen=True)
class ScaleEntry:
    """One line of a scale table. `absmax` is the raw range, `scale` what it became; both empty when dynamic."""

    name: str
    about: files.TableEntry
    scale: Floats
    absmax: Floats


@dataclass(frozen=True)
class TapRange:
    """What reached one tap of one block. absmax, p999: float32 [rows]; channel_absmax: float32 [channels]."""

    tokens: int
    absmax: Floats
    p999: (
        Floats | None
    )  # 99.9% of the values are at most this (upper edge of a histogram bin); None without a histogram
    channel_absmax: Floats


Taps = dict[int, dict[str, TapRange]]  # block -> tap -> range


def read_table(folder: Path) -> dict[str, ScaleEntry] | None:
    if not (folder / "scales.json").is_file():
        return None
    table = files.read_json(folder / "scales.json", files.Table, "choose")
    _check_pair(folder, table)
    arrays = _read_arrays(folder / "scales.safetensors", "choose", lambda key: key.endswith((".scale", ".absmax")))
    empty = np.zeros(0, np.float32)
    return {
        name: ScaleEntry(
            name, about, arrays.get(f"{name}.scale", empty).ravel(), arrays.get(f"{name}.absmax", empty).ravel()
        )
        for name, about in table.entries.items()
    }


def _check_pair(folder: Path, table: files.Table) -> None:
    path = folder / "scales.safetensors"
    if table.sha256 is None or not path.is_file():
        return
    if hashlib.sha256(path.read_bytes()).hexdigest() != table.sha256:
        raise CheckpointError(
            f"{path}: not the file that scales.json describes (sha256 differs); restore both from the same run, or "
            "write them again with `quantbench calibrate RECIPE --from choose`"
        )


def _read_arrays(path: Path, stage: str, wanted: Callable[[str], bool]) -> dict[str, npt.NDArray[Any]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: absent; write it again with `quantbench calibrate RECIPE --from {stage}`")
    try:
        with safe_open(path, framework="numpy") as archive:
            return {key: archive.get_tensor(key) for key in archive.keys() if wanted(key)}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file ({error}); "
            f"write it again with `quantbench calibrate RECIPE --from {stage}`"
        ) from error


_RANGE_FIELDS = ("tokens", "absmax", "histogram", "limit", "channel_absmax")


def read_stream(folder: Path) -> Taps:
    problems: list[str] = []
    taps: Taps = {}
    for path in sorted(folder.glob("block_*.safetensors")):
        number = path.stem.removeprefix("block_")
        if not number.isdecimal():
            problems.append(f"{path}: expected a name like block_00012.safetensors; remove it")
            continue
        try:
            taps[int(number)] = _read_block(path)
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    return taps


def _read_block(path: Path) -> dict[str, TapRange]:
    arrays = _read_arrays(path, "collect", lambda key: key.rpartition("/")[2] in _RANGE_FIELDS)
    taps = sorted({key.rpartition("/")[0] for key in arrays})
    absent = [f"{tap}/{name}" for tap in taps for name in ("absmax", "channel_absmax") if f"{tap}/{name}" not in arrays]
    if absent:
        raise CheckpointError(
            *(
                f"{path}: {key}: absent; write it again with `quantbench calibrate RECIPE --from collect`"
                for key in absent
            )
        )
    return {tap: _tap_range(tap, arrays) for tap in taps}


def _tap_range(tap: str, arrays: dict[str, npt.NDArray[Any]]) -> TapRange:
    histogram, limit = arrays.get(f"{tap}/histogram"), arrays.get(f"{tap}/limit")
    absmax = arrays[f"{tap}/absmax"].astype(np.float32).ravel()
    tokens = arrays.get(f"{tap}/tokens")
    return TapRange(
        tokens=int(tokens.ravel()[0]) if tokens is not None and tokens.size else 0,
        absmax=absmax,
        p999=None if histogram is None or limit is None else percentile(histogram, limit, absmax),
        channel_absmax=arrays[f"{tap}/channel_absmax"].astype(np.float32).ravel(),
    )


def percentile(
    histogram: npt.NDArray[Any], limit: npt.NDArray[Any], absmax: Floats, share: float = PERCENTILE
) -> Floats:
    """float32 [R]: the smallest bin edge that `share` of the counts of |x| lie below, at most the largest value seen.

    histogram: [R, bins] counts, bin width = limit/bins; limit, absmax: [R]. An upper edge, so that "99.9% of the
    values are below this" is true whatever the bin width."""
    counts = np.atleast_2d(histogram).astype(np.float64).cumsum(axis=1)
    total = counts[:, -1:]
    index = (counts < share * total).sum(axis=1) + 1
    edges = index * (limit.astype(np.float64).ravel() / counts.shape[1])
    below: Floats = np.minimum(np.where(total[:, 0] > 0, edges, 0.0), absmax).astype(np.float32)
    return below


_KINDS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("self_attn", "attention"),
    ("mlp", "feed-forward"),
    ("norm", "norms"),
)


def bytes_by_kind(folder: Path) -> dict[str, int]:
    """Bytes on disk by kind of weight, from the safetensors headers; scales count with the weight they belong to."""
    total: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, size in _tensor_sizes(path).items():
            kind = next((kind for mark, kind in _KINDS if mark in name), "other")
            total[kind] = total.get(kind, 0) + size
    return total


def _tensor_sizes(path: Path) -> dict[str, int]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        return {
            name: about["data_offsets"][1] - about["data_offsets"][0]
            for name, about in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a safetensors file; write it again with `--from apply`") from error
