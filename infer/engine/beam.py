"""Beam search: the continuations with the best length-normalized log-probability, on shared pages.

Beams are prefixes of one tree. A full page is shared by all beams that pass through it; only the page that is being
filled is copied, and only where a beam splits.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantbench.errors import RequestError
from quantbench.infer.engine.cache import pages_for
from quantbench.infer.engine.forward import Rows
from quantbench.infer.engine.runner import Runner
from quantbench.infer.ops import PAGE

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BeamParams:
    """`beams` hypotheses of at most `max_tokens`; a score is sum(log p) / tokens ** length_penalty (Wu et al. 2016,
    section 7, in HF's form). Raises RequestError naming every bad value at once."""

    beams: int = 4
    max_tokens: int = 64
    length_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        problems = [f"{name}: {value} is below 1" for name, value in self._counts() if value < 1]
        if not math.isfinite(self.length_penalty):
            problems.append(f"length_penalty: {self.length_penalty} is not finite; 1 is the mean log-probability")
        if problems:
            raise RequestError(*problems)

    def _counts(self) -> list[tuple[str, int]]:
        return [("beams", self.beams), ("max_tokens", self.max_tokens)]


@dataclass(frozen=True)
class Beam:
    """A hypothesis: generated ids (a stop token included), its score, and why it ended: "stop" | "length"."""

    ids: list[int]
    score: float
    finish_reason: str


@dataclass
class _Live:
    """A hypothesis that goes on. All tokens but the last have their K and V in `pages`."""

    ids: list[int]  # generated
    log_probability: float
    pages: list[int] = field(default_factory=list)


class BeamSearch:
    """One search. `run` gives every page back, however it ends."""

    def __init__(self, runner: Runner, prompt: list[int], params: BeamParams, stop_ids: frozenset[int]) -> None:
        self._runner, self._prompt, self._params, self._stop_ids = runner, prompt, params, stop_ids
        self._pool, self._offset = runner.cache.pool, runner.cache.prefix_length
        self._live: list[_Live] = []
        self._finished: list[Beam] = []

    def run(self) -> list[Beam]:
        """The best `beams` hypotheses, best first. Raises RequestError where the cache has too few pages."""
        longest = min(self._params.max_tokens, self._runner.limits.max_length - len(self._prompt))
        self._live = [_Live([], 0.0)]
        try:
            logits = self._prefill()
            for _ in range(longest - 1):
                self._choose(logits)
                if self._done():
                    break
                logits = self._decode()
            else:
                self._choose(logits)
            self._finished += [self._finish(live.ids, live.log_probability, "length") for live in self._live]
        finally:
            for live in self._live:
                self._pool.release(live.pages)
        return sorted(self._finished, key=lambda b: -b.score)[: self._params.beams]

    def _prefill(self) -> F64:
        only, chunk = self._live[0], self._runner.limits.chunk
        for start in range(0, len(self._prompt), chunk):
            ids = self._prompt[start : start + chunk]
            self._reserve(only, start + len(ids))
            logits = self._runner.compute([Rows(ids, self._offset + start, only.pages)], [0])
        return _log_softmax(logits)

    def _decode(self) -> F64:
        """Log-probabilities f64[beams, V] of the next token of every live beam."""
        rows = []
        for live in self._live:
            position = len(self._prompt) + len(live.ids) - 1
            self._reserve(live, position + 1)
            rows.append(Rows(live.ids[-1:], self._offset + position, live.pages))
        return _log_softmax(self._runner.compute(rows, list(range(len(rows)))))

    def _choose(self, log_probabilities: F64) -> None:
        """Replaces the live beams by their best continuations, setting those aside that end with a stop token."""
        sums = log_probabilities + np.array([live.log_probability for live in self._live])[:, None]
        vocabulary, beams = sums.shape[1], self._params.beams
        count = min(beams * (1 + len(self._stop_ids)), sums.size)
        best = np.argpartition(-sums.ravel(), count - 1)[:count]
        ranked = best[np.lexsort((best, -sums.ravel()[best]))]
        chosen: list[tuple[int, int]] = []
        for rank, candidate in enumerate(ranked.tolist()):
            parent, token = divmod(candidate, vocabulary)
            if token in self._stop_ids:
                if rank < beams:  # a worse ending is no hypothesis: better continuations exist
                    ids = [*self._live[parent].ids, token]
                    self._finished.append(self._finish(ids, float(sums[parent, token]), "stop"))
            elif len(chosen) < beams:
                chosen.append((parent, token))
        self._split(chosen, sums)

    def _split(self, chosen: list[tuple[int, int]], sums: F64) -> None:
        """Makes the chosen continuations the live beams. A parent's first child takes over its pages."""
        parents = self._live
        children = Counter(parent for parent, _ in chosen)
        self._live = [parent for number, parent in enumerate(parents) if number in children]
        for number, parent in enumerate(parents):
            if number not in children:
                self._pool.release(parent.pages)
        held = self._offset + len(self._prompt) + len(parents[0].ids)  # all tokens of the parents are in the cache
        copies = self._allocate(len(chosen) - len(children) if held % PAGE else 0)
        self._live = []
        first: set[int] = set()
        for number, token in chosen:
            parent = parents[number]
            pages = parent.pages if number not in first else self._fork(parent.pages, copies)
            first.add(number)
            self._live.append(_Live([*parent.ids, token], float(sums[number, token]), pages))

    def _fork(self, pages: list[int], copies: list[int]) -> list[int]:
        """Pages with the same contents: the full ones shared, the last one copied where `copies` has room for it."""
        if not copies:
            return [self._pool.share(page) for page in pages]
        copy = copies.pop()
        self._runner.copy_page(pages[-1], copy)
        return [self._pool.share(page) for page in pages[:-1]] + [copy]

    def _reserve(self, live: _Live, tokens: int) -> None:
        live.pages += self._allocate(max(0, pages_for(self._offset + tokens) - len(live.pages)))

    def _allocate(self, count: int) -> list[int]:
        pages = self._pool.allocate(count)
        if pages is None:
            raise RequestError(
                f"{self._params.beams} beams find no free cache page; use fewer beams or max_tokens, finish running "
                f"requests, or load with a larger cache_tokens"
            )
        return pages

    def _finish(self, ids: list[int], log_probability: float, reason: str) -> Beam:
        return Beam(ids, log_probability / len(ids) ** self._params.length_penalty, reason)

    def _done(self) -> bool:
        """Whether no live beam, ended now, would be among the best finished ones."""
        beams = self._params.beams
        if not self._live:
            return True
        if len(self._finished) < beams:
            return False
        worst = sorted(b.score for b in self._finished)[-beams]
        return all(self._finish(live.ids, live.log_probability, "length").score <= worst for live in self._live)


def _log_softmax(logits: npt.NDArray[np.float32]) -> F64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: F64 = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result
