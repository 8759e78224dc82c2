"""What a decode step reads besides weights and pages, at fixed addresses, so that a captured graph serves every step.

One device buffer holds everything; the host writes one of a few pinned copies and sends it. The fields that change
even where the device goes on by itself (see kernels/step.cu) come first, so that only they are sent then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch
from quantbench.infer.cuda.device import Device
from quantbench.infer.engine.scheduler import Chunk, Running

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)  # sequences of a step, padded up
COPIES = 3  # pinned copies: one being sent, one being written, one to spare
_ALIGN = 16


@dataclass(frozen=True)
class Row:
    """One sequence's part of a decode step. The last four choose its next token."""

    id: int
    position: int
    pages: list[int]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0


class StepInputs:
    """Buffers for steps of up to `sequences` sequences of up to `pages` pages."""

    def __init__(self, device: Device, sequences: int, pages: int) -> None:
        self._device = device
        self.pages = pages
        i32, i64, f32 = (np.dtype(t) for t in (np.int32, np.int64, np.float32))
        first: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = [
            ("flag", (1,), i32), ("uniform", (sequences,), f32), ("tables", (sequences, pages), i32),
        ]  # fmt: skip
        rest: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = [
            ("ids", (sequences,), i32), ("positions", (sequences,), i32), ("context", (sequences,), i32),
            ("starts", (sequences + 1,), i32), ("slots", (sequences,), i64), ("temperature", (sequences,), f32),
            ("top_k", (sequences,), i32), ("top_p", (sequences,), f32),
        ]  # fmt: skip
        self._fields: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        end = 0
        for name, shape, dtype in [*first, *rest]:
            self._fields[name] = (end, shape, dtype)
            end += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGN) * _ALIGN
            if name == "tables":
                self._changing = end
        self._buffer = device.allocate((end,), np.uint8)
        device.fill(self._buffer, 0)
        self._hosts = [device.pinned((end,), np.uint8) for _ in range(COPIES)]
        self._turn = 0
        self.tokens = device.allocate((sequences,), np.int32)  # chosen by the step
        device.fill(self.tokens, 0)

    def __getitem__(self, name: str) -> DeviceArray:
        offset, shape, dtype = self._fields[name]
        return DeviceArray(self._buffer.pointer + offset, shape, dtype, self._buffer)

    def batch(self, sequences: int, max_context: int) -> DeviceBatch:
        """The first `sequences` rows as a decode batch."""
        names = ("ids", "positions", "slots", "context", "tables")
        ids, positions, slots, context, tables = (self[name].rows(0, sequences) for name in names)
        return DeviceBatch(
            ids, positions, slots, self["starts"].rows(0, sequences + 1), context, tables,
            decode=True, max_context=max_context, max_rows=1,
        )  # fmt: skip

    def send(self, rows: list[Row], count: int, ahead: bool) -> None:
        """Writes a step of `rows`, padded to `count`. `ahead`: the device makes ids and positions from its last step,
        and only pages and random numbers are sent."""
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % COPIES
        field = {name: self._host(host, name) for name in self._fields}
        field["flag"][0] = int(ahead)
        for row, table in zip(rows, field["tables"], strict=False):
            table[: len(row.pages)] = row.pages
        field["uniform"][: len(rows)] = [row.uniform for row in rows]
        if not ahead:
            self._write_rest(field, rows, count)
        size = self._changing if ahead else len(host)
        self._device.write(self._buffer.view((size,)), host[:size])

    def hold(self) -> None:
        """From now on replays repeat the same step: nothing advances until the next `send`."""
        self._device.fill(self["flag"], 0)

    def _host(self, host: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        offset, shape, dtype = self._fields[name]
        return host[offset : offset + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    @staticmethod
    def _write_rest(field: dict[str, npt.NDArray[Any]], rows: list[Row], count: int) -> None:
        n = len(rows)
        for name in ("ids", "positions", "context"):
            field[name][:count] = 0
        field["slots"][:count] = -1
        field["ids"][:n] = [row.id for row in rows]
        field["positions"][:n] = [row.position for row in rows]
        field["context"][:n] = field["positions"][:n] + 1
        field["slots"][:n] = [row.pages[row.position // 64] * 64 + row.position % 64 for row in rows]
        field["starts"][: count + 1] = np.arange(count + 1)
        field["temperature"][:n] = [row.temperature for row in rows]
        field["top_k"][:n] = [row.top_k for row in rows]
        field["top_p"][:n] = [row.top_p for row in rows]
        field["temperature"][n:count] = 0


def row_of(sequence: Running, token: int, position: int, further: int) -> Row:
    p = sequence.sampler.params
    uniform = sequence.sampler.uniform(sequence.generated + further) if p.temperature > 0 else 0.0
    return Row(token, position, sequence.pages, p.temperature, p.top_k, p.top_p, uniform)


def decodes(chunk: Chunk) -> bool:
    """Whether a chunk is one new token whose successor the device can choose."""
    return chunk.count == 1 and chunk.last and chosen_here(chunk)


def chosen_here(chunk: Chunk) -> bool:
    """Whether the device can choose the next token: it knows nothing of penalties and minimum lengths."""
    p = chunk.sequence.sampler.params
    return p.repetition_penalty == 1.0 and chunk.sequence.generated >= p.min_tokens


def bound_of(context: int, most: int) -> int:
    """A bound on the context, of few different ones: each gets its own graph."""
    step = 256 if context <= 2048 else 1024 if context <= 16384 else 8192
    return min(most, -(-context // step) * step)
