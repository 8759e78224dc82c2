"""The engine's Runner on the GPU: weights and pages stay there, logits leave only where someone asks for them.

A step in which every sequence decodes one token is a graph, captured once per bucket of batch and context: padded
rows write nothing. All other steps (prompts, chunks, mixtures) are launched operation by operation.

The host runs one step behind. When a decode step is queued and nothing waits for admission, the step after it is
queued at once: its input is the token that the GPU has just chosen. If a sequence then turns out to have ended, its
row of that step was for nothing, and nobody reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.errors import CheckpointError
from quantbench.infer.cuda import sample
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch
from quantbench.infer.cuda.cache import Pages
from quantbench.infer.cuda.device import Graph
from quantbench.infer.cuda.forward import DeviceModel, Rope, logits_of, run_layers
from quantbench.infer.cuda.inputs import (
    BUCKETS,
    COPIES,
    Row,
    StepInputs,
    bound_of,
    chosen_here,
    decodes,
    row_of,
)
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.engine.cache import KVCache, pages_for
from quantbench.infer.engine.forward import Model, Rows, batch_of
from quantbench.infer.engine.limits import Limits
from quantbench.infer.engine.runner import Runner
from quantbench.infer.engine.scheduler import Chunk, Running
from quantbench.infer.models import block_prefix
from quantbench.infer.ops import PAGE

F32 = npt.NDArray[np.float32]
LOGITS = 2  # bit of Device.bad that stands for logits that are not finite; bit 1: what was to be quantized


@dataclass(frozen=True)
class Queued:
    """A decode step that was launched. `place`: request -> (row, token's position); `tokens` are there after
    `event`."""

    rows: list[Row]
    sequences: list[Running]
    place: dict[int, tuple[int, int]]
    tokens: npt.NDArray[np.int32]
    event: Any


class CudaRunner(Runner):
    """Everything that touches weights and pages, on one GPU."""

    ops: CudaOps

    def __init__(self, ops: CudaOps, model: Model, cache: KVCache, limits: Limits) -> None:
        super().__init__(ops, model, cache, limits)
        self.device = ops.device
        self.weights = DeviceModel.upload(self.device, model)
        self.pages = Pages(self.device, cache)
        self._tables = (self.device.upload(self._rope[0]), self.device.upload(self._rope[1]))
        most = next((b for b in BUCKETS if b >= limits.max_batch), limits.max_batch)
        self._buckets = (*(b for b in BUCKETS if b < most), most)
        self._inputs = StepInputs(self.device, most, pages_for(limits.max_length + self._offset))
        self._results = [self.device.pinned((most + 1,), np.int32) for _ in range(COPIES)]
        self._output = self.device.allocate((most + 1,), np.int32)  # tokens, then the flag of numbers gone wrong
        self._captured: dict[
            tuple[int, int, bool], Graph
        ] = {}  # by batch bucket, bound on the context, whether sampled
        self._graphs = os.environ.get("QUANTBENCH_CUDA_GRAPHS", "1") != "0"
        self._queued: Queued | None = None
        self._turn = 0
        self._last = (1, PAGE, False)

    def choose(self, work: list[Chunk], crowded: bool = False) -> list[tuple[Running, int]]:
        """Computes `work`; the sequences whose newest token was in it, and the token that each chooses next."""
        if all(decodes(chunk) and (chunk.start or not self._offset) for chunk in work):
            return self._decode(work, crowded)
        self._queued = None
        last = [i for i, chunk in enumerate(work) if chunk.last]
        if not all(chosen_here(work[i]) for i in last):
            return super().choose(work, crowded)
        rows = [Rows(c.ids, c.start + self._offset, c.sequence.pages) for c in work]
        logits = self._queue(rows, last)
        chosen = self._pick(logits, [row_of(work[i].sequence, 0, 0, 0) for i in last])
        self._check(rows)
        return [(work[i].sequence, int(token)) for i, token in zip(last, chosen, strict=True)]

    def _pick(self, logits: DeviceArray, rows: list[Row]) -> npt.NDArray[np.int32]:
        """The tokens that `rows` choose from logits f32[R, V]."""
        if not rows:
            return np.empty(0, np.int32)
        if all(row.temperature == 0 for row in rows):
            return self.device.fetch(sample.argmax(self.device, logits))
        floats = [np.array([getattr(r, n) for r in rows], np.float32) for n in ("temperature", "top_p", "uniform")]
        temperature, top_p, uniform = map(self._lend, floats)
        top_k = self._lend(np.array([row.top_k for row in rows], np.int32))
        return self.device.fetch(sample.sample(self.device, logits, temperature, top_k, top_p, uniform))

    def copy_page(self, source: int, target: int) -> None:
        self.pages.copy(source, target)

    def compute(self, rows: list[Rows], wanted: list[int]) -> F32:
        return self._host(self._queue(rows, wanted), rows)

    def _queue(self, rows: list[Rows], wanted: list[int]) -> DeviceArray:
        """Computes `rows`; the logits after the last token of each wanted one, on the device."""
        for begun in (r for r in rows if self._offset and r.start == self._offset):
            self._begin(begun.pages)
        return self._run(rows, self._tables, [sum(len(r.ids) for r in rows[: i + 1]) - 1 for i in wanted])

    def score(self, ids: Sequence[int]) -> Iterator[tuple[int, F32]]:
        for rows, rope in self._window(ids):
            yield rows.start - self._offset, self._host(self._run([rows], self._place(rope), None), [rows])

    def likelihood(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        parts = []
        for rows, rope in self._window(ids):
            logits = self._run([rows], self._place(rope), None)
            start = rows.start - self._offset
            targets = np.array([*ids[start + 1 : start + 1 + len(rows.ids)], 0][: len(rows.ids)], np.int32)
            lent = self.device.empty(targets.shape, np.int32)
            self.device.write(lent, targets)
            parts.append(self.device.fetch(sample.logprobs(self.device, logits, lent)))
            self._check([rows])
        found: npt.NDArray[np.float64] = np.concatenate(parts)[: len(ids) - 1].astype(np.float64)
        return found

    def _begin(self, pages: list[int]) -> None:
        super()._begin(pages)
        if self._offset:
            self.pages.begin(pages)

    def _place(self, rope: tuple[F32, F32]) -> Rope:
        return self._tables if rope is self._rope else (self.device.upload(rope[0]), self.device.upload(rope[1]))

    def _run(self, rows: list[Rows], rope: Rope, wanted: list[int] | None) -> DeviceArray:
        """Logits of the wanted rows of a batch (None: all), on the device."""
        batch = self._batch(rows)
        x, delta = run_layers(self.device, self.weights, batch, rope, self.pages.layers)
        if wanted is None:
            return logits_of(self.device, self.weights, x, delta)
        if not wanted:
            return self.device.empty((0, self.model.config.vocab_size), np.float32)
        return logits_of(self.device, self.weights, x, delta, self._lend(np.array(wanted, np.int32)))

    def _lend(self, array: npt.NDArray[Any]) -> DeviceArray:
        out = self.device.empty(array.shape, array.dtype)
        self.device.write(out, array)
        return out

    def _batch(self, rows: list[Rows]) -> DeviceBatch:
        host = batch_of(rows)
        lengths = np.diff(host.starts)
        return DeviceBatch(
            self._lend(host.ids), self._lend(host.positions), self._lend(host.slots), self._lend(host.starts),
            self._lend(host.context), self._lend(host.tables),
            decode=bool((lengths == 1).all()), max_context=int(host.context.max()), max_rows=int(lengths.max()),
            lengths=lengths, contexts=host.context,
        )  # fmt: skip

    def _host(self, logits: DeviceArray, rows: list[Rows]) -> F32:
        found = self.device.fetch(logits)
        with np.errstate(invalid="ignore"):  # a NaN or an infinity anywhere survives the sum
            if not np.isfinite(found.sum()):
                self.device.fill(self.device.bad, LOGITS)
        self._check(rows)
        return found

    def _check(self, rows: list[Rows]) -> None:
        """Raises CheckpointError naming the layer where numbers stopped being finite."""
        if self.device.fetch(self.device.bad)[0]:
            raise CheckpointError(self._where(rows))

    def _where(self, rows: list[Rows]) -> str:
        """Runs a batch again, watching, to say where its numbers stop being finite."""
        broken: list[tuple[int, str]] = []
        self.device.fill(self.device.bad, 0)

        def watch(layer: int, x: DeviceArray, delta: DeviceArray) -> None:
            hidden = self.device.fetch(x) + self.device.fetch(delta).astype(np.float32)
            if self.device.fetch(self.device.bad)[0]:
                broken.append((layer, "activation: what was to be quantized"))
            elif not np.isfinite(hidden).all():
                broken.append((layer, "its output"))

        run_layers(self.device, self.weights, self._batch(rows), self._tables, self.pages.layers, watch)
        self.device.fill(self.device.bad, 0)
        name = f"{block_prefix(broken[0][0])}: {broken[0][1]}" if broken else "the final norm or lm_head: its output"
        return f"{name} has a NaN or an infinity: a weight is damaged, run `quantbench lint` on the model"

    def _decode(self, work: list[Chunk], crowded: bool) -> list[tuple[Running, int]]:
        queued = self._queued
        if queued is None or any(queued.place.get(c.sequence.number) != (_row(queued, c), c.start) for c in work):
            queued = self._launch([c.sequence for c in work], [self._input(c, 0) for c in work], ahead=False)
        self._queued = None
        if len(queued.sequences) == len(work) and not crowded:
            self._queued = self._launch_ahead(queued)
        self.device.wait(queued.event)
        if queued.tokens[-1]:
            self.device.fill(self.device.bad, LOGITS)
            self._check([Rows(c.ids, c.start + self._offset, c.sequence.pages) for c in work])
        return [(c.sequence, int(queued.tokens[queued.place[c.sequence.number][0]])) for c in work]

    def _input(self, chunk: Chunk, further: int) -> Row:
        sequence = chunk.sequence
        return row_of(sequence, chunk.ids[0], chunk.start + self._offset, further)

    def _launch_ahead(self, queued: Queued) -> Queued | None:
        """The step after `queued`, where it can be known: nobody ends by length, and every page is there."""
        rows = []
        for sequence, row in zip(queued.sequences, queued.rows, strict=True):
            position = row.position + 1
            if position + 1 - self._offset >= sequence.limit or not self._reserve(sequence, position + 1):
                return None
            rows.append(row_of(sequence, 0, position, 1))
        return self._launch(queued.sequences, rows, ahead=True)

    def _reserve(self, sequence: Running, tokens: int) -> bool:
        """Whether the sequence has, or now got, pages for `tokens`: the scheduler would give it the same."""
        missing = pages_for(tokens) - len(sequence.pages)
        if missing > 0:
            pages = self.cache.pool.allocate(missing)
            if pages is None:
                return False
            sequence.pages.extend(pages)
        return True

    def _launch(self, sequences: list[Running], rows: list[Row], ahead: bool) -> Queued:
        """Queues a decode step and the way back of its tokens."""
        bucket = next(b for b in self._buckets if b >= len(rows))
        bound = bound_of(max(row.position for row in rows) + 1, self._inputs.pages * PAGE)
        sampled = any(row.temperature > 0 for row in rows)
        self._inputs.send(rows, bucket, ahead)
        self._replay(bucket, bound, sampled)
        tokens = self._results[self._turn]
        self._turn = (self._turn + 1) % COPIES
        event = self.device.fetch_later(tokens, self._output)
        place = {
            s.number: (i, row.position - self._offset) for i, (s, row) in enumerate(zip(sequences, rows, strict=True))
        }
        return Queued(rows, sequences, place, tokens, event)

    def _replay(self, bucket: int, bound: int, sampled: bool) -> None:
        key = self._last = (bucket, bound, sampled)
        graph = self._captured.get(key)
        if graph is None:
            self._step(*key)
            if not self._graphs:
                return
            with self.device.capture([self._inputs, self._output]) as found:
                self._step(*key)
            self._captured[key] = found[0]
            return
        self.device.replay(graph)

    def repeat(self) -> None:
        """Runs the last decode step once more, operation by operation: for profiles."""
        self._step(*self._last)

    def graph_seconds(self, count: int) -> float:
        """GPU seconds of the last decode step as a graph, back to back: the mean of `count`."""
        graph = self._captured[self._last]

        def replays() -> None:
            for _ in range(count):
                self.device.replay(graph)

        self._inputs.hold()
        return self.device.seconds(replays) / count

    def _step(self, bucket: int, bound: int, sampled: bool) -> None:
        """One decode step of `bucket` sequences: from the inputs' buffers to tokens."""
        device, inputs = self.device, self._inputs
        batch = inputs.batch(bucket, bound)
        advance = device.kernel("step.cu", "advance")
        device.launch(
            advance, -(-bucket // 128), 128, inputs["flag"], self._output, batch.ids, batch.positions, batch.context,
            batch.slots, batch.tables, bucket, inputs.pages,
        )  # fmt: skip
        x, delta = run_layers(device, self.weights, batch, self._tables, self.pages.layers)
        logits = logits_of(device, self.weights, x, delta)
        tokens = self._output.view((bucket,))
        if sampled:
            choice = [inputs[name].rows(0, bucket) for name in ("temperature", "top_k", "top_p", "uniform")]
            sample.sample(device, logits, choice[0], choice[1], choice[2], choice[3], out=tokens)
        else:
            sample.argmax(device, logits, out=tokens)
        device.copy(self._output.rows(len(self._output) - 1, len(self._output)), device.bad)


def _row(queued: Queued, chunk: Chunk) -> int:
    return queued.place.get(chunk.sequence.number, (-1, 0))[0]
