"""A model with its op table and its cache: runs what a scheduler chose, and whole windows for scoring and tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from quantbench.errors import CheckpointError, RequestError
from quantbench.infer.engine.cache import KVCache, pages_for
from quantbench.infer.engine.forward import Model, Rows, batch_of, logits_of, rope_tables, run_layers
from quantbench.infer.engine.limits import Limits, check_ids
from quantbench.infer.engine.native import NativeModel
from quantbench.infer.engine.scheduler import Chunk, Running
from quantbench.infer.engine.trace import Recorder, Trace
from quantbench.infer.models import block_prefix
from quantbench.infer.ops import Batch, Ops
from quantbench.infer.ops.cpu import CpuOps

F32 = npt.NDArray[np.float32]


class Runner:
    """Everything that touches weights and pages."""

    def __init__(self, ops: Ops, model: Model, cache: KVCache, limits: Limits) -> None:
        self.ops, self.model, self.cache, self.limits = ops, model, cache, limits
        self._offset = cache.prefix_length  # of every position: the prefix stands in front of each sequence
        self._rope = rope_tables(model.config, limits.max_length + self._offset)
        self._native: tuple[CpuOps, Model, NativeModel] | None = None

    def step(self, work: list[Chunk]) -> tuple[list[Running], F32]:
        """Computes `work`. Returns the sequences whose newest token was in it, and the logits f32[S, V] after it."""
        last = [i for i, chunk in enumerate(work) if chunk.last]
        logits = self.compute([Rows(c.ids, c.start + self._offset, c.sequence.pages) for c in work], last)
        return [work[i].sequence for i in last], logits

    def choose(self, work: list[Chunk], crowded: bool = False) -> list[tuple[Running, int]]:
        """Computes `work`; the sequences whose newest token was in it, and the token that each chooses next.
        `crowded`: others wait to be admitted, so the next step will not be this one's continuation."""
        ready, logits = self.step(work)
        return [(s, s.sampler.choose(row, s.tokens, s.generated)) for s, row in zip(ready, logits, strict=True)]

    def copy_page(self, source: int, target: int) -> None:
        """Page `target` of every layer becomes a copy of page `source`."""
        self.cache.copy(source, target)

    def compute(self, rows: list[Rows], wanted: list[int]) -> F32:
        """Computes `rows` into the cache. Returns the logits f32[W, V] after the last token of each wanted one."""
        for begun in (r for r in rows if self._offset and r.start == self._offset):
            self._begin(begun.pages)
        ends = list(accumulate(len(r.ids) for r in rows))
        return self._logits(batch_of(rows), self._rope, np.array([ends[i] - 1 for i in wanted], np.int64))

    def score(self, ids: Sequence[int]) -> Iterator[tuple[int, F32]]:
        """Logits of every position of one window, as (start, f32[chunk, V])."""
        for rows, rope in self._window(ids):
            yield rows.start - self._offset, self._logits(batch_of([rows]), rope)

    def likelihood(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log-probabilities f64[T - 1] of the tokens of one window after its first, each given those before it."""
        parts = []
        for start, logits in self.score(ids):
            targets = np.asarray(ids[start + 1 : start + 1 + len(logits)], np.int64)
            wide = logits[: len(targets)].astype(np.float64)
            wide -= wide.max(axis=1, keepdims=True)
            chosen = np.take_along_axis(wide, targets[:, None], axis=1)[:, 0]
            parts.append(chosen - np.log(np.exp(wide).sum(axis=1)))
        return np.concatenate(parts)

    def _begin(self, pages: list[int]) -> None:
        """Puts the checkpoint's prefix in front of a sequence."""
        self.cache.begin(pages)

    def _logits(self, batch: Batch, rope: tuple[F32, F32], rows: npt.NDArray[np.int64] | None = None) -> F32:
        """Logits of `rows` of a batch. Raises CheckpointError naming the first layer that is not finite."""
        if isinstance(self.ops, CpuOps):
            wanted = np.arange(len(batch.ids), dtype=np.int64) if rows is None else rows
            found = self._native_model(self.ops).logits(batch, rope, wanted)
            if found is not None:
                return found
        x, delta = run_layers(self.ops, self.model, batch, rope, self.cache.layers)
        if rows is not None and not len(rows):
            return np.empty((0, self.model.config.vocab_size), np.float32)
        logits = logits_of(self.ops, self.model, x, delta, rows)
        with np.errstate(invalid="ignore"):  # a NaN or an infinity anywhere survives the sum
            finite = np.isfinite(logits.sum())
        if not finite:
            raise CheckpointError(self._culprit(batch, rope))
        return logits

    def profile(self, on: bool) -> dict[str, tuple[float, float, float]]:
        """Seconds, bytes read and operations of each native operation since the last call, counted from here if `on`.
        Empty where steps are not native."""
        return self._native_model(self.ops).profile(on) if isinstance(self.ops, CpuOps) else {}

    def _native_model(self, ops: CpuOps) -> NativeModel:
        """The native object of this model and cache, made on first use."""
        if self._native is None or self._native[0] is not ops or self._native[1] is not self.model:
            self._native = (ops, self.model, NativeModel(ops, self.model, self.cache.layers))
        return self._native[2]

    def _culprit(self, batch: Batch, rope: tuple[F32, F32]) -> str:
        """Runs a batch again, watching, to say where its numbers stop being finite."""
        recorder = Recorder(self.ops, len(self.model.layers))
        x, delta = run_layers(recorder, self.model, batch, rope, self.cache.layers)
        logits_of(recorder, self.model, x, delta)
        broken = (i for i, hidden in enumerate(recorder.trace.hidden) if not np.isfinite(hidden).all())
        layer = next(broken, None)
        name = "the final norm or lm_head" if layer is None else block_prefix(layer)
        return f"{name}: its output has a NaN or an infinity: a weight is damaged, run `quantbench lint` on the model"

    def trace(self, ids: Sequence[int]) -> Trace:
        """Everything one window does in every layer."""
        parts = []
        for rows, rope in self._window(ids):
            recorder = Recorder(self.ops, len(self.model.layers))
            x, delta = run_layers(recorder, self.model, batch_of([rows]), rope, self.cache.layers)
            recorder.trace.logits = logits_of(recorder, self.model, x, delta)
            parts.append(recorder.trace)
        return Trace.join(parts)

    def _window(self, ids: Sequence[int]) -> Iterator[tuple[Rows, tuple[F32, F32]]]:
        """The chunks of one window and its RoPE tables; its pages are its own and given back at the end."""
        check_ids(ids, self.model.config, self.limits.max_window, self.limits.window_reason)
        length = len(ids) + self._offset
        rope = self._rope if len(ids) <= self.limits.max_length else rope_tables(self.model.config, length)
        with self._pages(length) as pages:
            self._begin(pages)
            for start in range(0, len(ids), self.limits.chunk):
                chunk = [int(i) for i in ids[start : start + self.limits.chunk]]
                yield Rows(chunk, start + self._offset, pages), rope

    @contextmanager
    def _pages(self, tokens: int) -> Iterator[list[int]]:
        needed = pages_for(tokens)
        pages = self.cache.pool.allocate(needed)
        if pages is None:
            raise RequestError(
                f"a window of {tokens} tokens needs {needed} cache pages and running requests leave "
                f"{self.cache.pool.available}; finish them first, or load with a larger cache_tokens"
            )
        try:
            yield pages
        finally:
            self.cache.pool.release(pages)


def open_runner(ops: Ops, model: Model, cache: KVCache, limits: Limits) -> Runner:
    """The runner of an op table: the GPU has one of its own."""
    if ops.name != "cuda":
        return Runner(ops, model, cache, limits)
    from quantbench.infer.cuda.ops import CudaOps
    from quantbench.infer.cuda.runner import CudaRunner

    assert isinstance(ops, CudaOps)
    return CudaRunner(ops, model, cache, limits)


def cache_room(ops: Ops, model: Model, limits: Limits) -> int | None:
    """Bytes that a device has left for the cache, now that the weights are there; None where the host's memory is
    used, which untouched pages do not take."""
    if ops.name != "cuda":
        return None
    from quantbench.infer.cuda.room import room_for_cache

    return room_for_cache(ops, model, limits)
