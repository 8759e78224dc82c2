"""Hidden states between two blocks: f32[S, L, D], in memory or on disk, and committed block by block.

The states before block n live in `hidden_<n>.f32` (raw little-endian float32, row-major). Block n writes those of
n+1 beside it under a temporary name; `commit` makes them durable and renames them, and only then deletes the old
file: whenever the process dies, exactly one newest complete file remains, and resuming from it gives the same
bytes. Save the statistics of block n before committing, so that a resumed run never lacks them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantbench.calibrate.forward import Float, Int
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.shard_writer import sync_to_disk

_NAME = re.compile(r"hidden_(\d{5})\.f32")
_DISK_TYPE = np.dtype("<f4")


@dataclass
class HiddenStates:
    """States of S samples of L tokens before block `layer`. `lengths` i32[S] says how many tokens of each are real.

    `work` None: memory only, nothing survives the process. Otherwise every committed layer is on disk, and
    `in_memory` says whether a copy stays in memory as well (set by `start` and `resume` from a limit in bytes).
    """

    lengths: Int
    shape: tuple[int, int, int]
    layer: int
    work: Path | None
    in_memory: bool
    values: Float | None = None  # f32[S, L, D] where in_memory

    @classmethod
    def start(cls, first: Float, lengths: Int, work: Path | None = None, limit_bytes: int = 1 << 30) -> HiddenStates:
        """States before block 0, committed. Kept in memory up to `limit_bytes` (or always, without `work`)."""
        states = cls._empty(lengths, first.shape, 0, work, limit_bytes)
        states.write(0, first)
        states.commit()
        return states

    @classmethod
    def resume(
        cls, lengths: Int, shape: tuple[int, int, int], work: Path, limit_bytes: int = 1 << 30
    ) -> HiddenStates | None:
        """The newest committed states in `work`, or None where there are none.

        Raises CalibrationError where the file does not hold `shape`: it belongs to other data or another model.
        """
        found = sorted(p for p in work.glob("hidden_*.f32") if _NAME.fullmatch(p.name)) if work.is_dir() else []
        if not found:
            return None
        newest = found[-1]
        expected = int(np.prod(shape)) * _DISK_TYPE.itemsize
        if newest.stat().st_size != expected:
            raise CalibrationError(
                f"{newest}: {newest.stat().st_size} bytes, but this calibration's hidden states {list(shape)} take "
                f"{expected}. The file is of another run: start without --resume, or delete {work}"
            )
        layer = int(newest.name[len("hidden_") : -len(".f32")])
        states = cls._empty(lengths, shape, layer, work, limit_bytes)
        if states.in_memory:
            states.values = np.fromfile(newest, _DISK_TYPE).reshape(shape).astype(np.float32, copy=False)
        return states

    @classmethod
    def _empty(
        cls, lengths: Int, shape: tuple[int, ...], layer: int, work: Path | None, limit_bytes: int
    ) -> HiddenStates:
        samples, length, channels = shape
        size = samples * length * channels * _DISK_TYPE.itemsize
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        in_memory = work is None or size <= limit_bytes
        return cls(np.asarray(lengths, np.int32), (samples, length, channels), layer, work, in_memory)

    def following(self) -> HiddenStates:
        """Uncommitted states of the next block, to be filled by `write`."""
        return HiddenStates(self.lengths, self.shape, self.layer + 1, self.work, self.in_memory)

    def batches(self, size: int) -> Iterator[slice]:
        """Sample ranges of at most `size` samples, in order."""
        return (slice(i, min(i + size, self.shape[0])) for i in range(0, self.shape[0], size))

    def read(self, samples: slice) -> Float:
        """f32[n, L, D] of a sample range that is written, committed or not."""
        if self.values is not None:
            return self.values[samples]
        stride = self.shape[1] * self.shape[2]
        count, offset = (samples.stop - samples.start) * stride, samples.start * stride * _DISK_TYPE.itemsize
        try:
            flat = np.fromfile(self._partial(), _DISK_TYPE, count, offset=offset)
        except FileNotFoundError:  # committed, perhaps since the line above
            flat = np.fromfile(self._path(), _DISK_TYPE, count, offset=offset)
        return flat.reshape(-1, *self.shape[1:]).astype(np.float32, copy=False)

    def write(self, start: int, values: Float) -> None:
        """Put f32[n, L, D] at samples start .. start+n of states that are not committed yet."""
        if self.in_memory:
            if self.values is None:
                self.values = np.empty(self.shape, np.float32)
            self.values[start : start + len(values)] = values
            return
        partial = self._partial()
        with open(partial, "r+b" if partial.exists() else "w+b") as file:
            file.seek(start * self.shape[1] * self.shape[2] * _DISK_TYPE.itemsize)
            file.write(_on_disk(values))

    def commit(self) -> None:
        """Make these states the durable ones; those of earlier blocks are deleted, those of later ones may be begun."""
        if self.work is None:
            return
        if self.values is not None:
            self._partial().write_bytes(_on_disk(self.values))
        sync_to_disk(self._partial())
        os.replace(self._partial(), self._path())
        sync_to_disk(self.work)
        for old in self.work.glob("hidden_*.f32*"):
            if old.name < self._path().name:
                old.unlink()

    def _path(self) -> Path:
        if self.work is None:
            raise ValueError("hidden states in memory have no file")
        return self.work / f"hidden_{self.layer:05d}.f32"

    def _partial(self) -> Path:
        return self._path().with_suffix(".f32.partial")


def _on_disk(values: Float) -> memoryview:
    return np.ascontiguousarray(values, _DISK_TYPE).data.cast("B")
