"""How one request chooses its next token: a pure function of its own logits, its own tokens and its own seed.

Nothing here knows what else is in the batch, so a request gives the same tokens alone, batched, or preempted.
Order of the steps, as in HF: minimum length, repetition penalty, temperature, top-k, top-p, draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantbench.errors import RequestError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SamplingParams:
    """What one request wants. The defaults are greedy. Raises RequestError naming every bad value at once.

    `seed` None draws a fresh one; any number makes the request repeatable. `stop` strings end the text before their
    first occurrence; `stop_token_ids` (and the model's end-of-sequence ids unless `ignore_eos`) end it after theirs,
    and are never chosen before `min_tokens`. `detokenize` False leaves text out, where only ids are wanted.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        problems = tuple(self._problems())
        if problems:
            raise RequestError(*problems)

    def _problems(self) -> Iterator[str]:
        if self.max_tokens < 1:
            yield f"max_tokens: {self.max_tokens} is below 1; ask for at least one token"
        if not 0 <= self.min_tokens <= max(self.max_tokens, 0):
            yield f"min_tokens: {self.min_tokens} is not between 0 and max_tokens ({self.max_tokens})"
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            yield f"temperature: {self.temperature} is not a finite number >= 0 (0 is greedy)"
        if self.top_k < 0:
            yield f"top_k: {self.top_k} is negative; 0 keeps every token"
        if not 0 < self.top_p <= 1:
            yield f"top_p: {self.top_p} is not in (0, 1]; 1 keeps every token"
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            yield f"repetition_penalty: {self.repetition_penalty} is not a finite number > 0 (1 is none)"
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield f"seed: {self.seed} is not between 0 and 2**63 - 1; None draws a fresh one"
        if any(not text for text in self.stop):
            yield "stop: an empty string would end every text at once; remove it"
        if self.stop and not self.detokenize:
            yield "stop: stop strings need the text; leave detokenize on, or use stop_token_ids"


class Sampler:
    """The sampling state of one request: its parameters, its stop ids and its random stream."""

    def __init__(self, params: SamplingParams, stop_ids: frozenset[int]) -> None:
        self.params = params
        self.stop_ids = stop_ids
        self._stop_index = np.array(sorted(stop_ids), np.int64)
        self._random = np.random.Generator(np.random.Philox(params.seed))
        self._drawn: list[float] = []

    def choose(self, logits: F32, tokens: list[int], generated: int) -> int:
        """Next token id. `logits` f32[V] is not changed; `tokens` is prompt and generated ids so far, the last
        `generated` of which were generated."""
        p = self.params
        if generated < p.min_tokens or p.repetition_penalty != 1.0:
            logits = logits.copy()
            if generated < p.min_tokens:
                logits[self._stop_index] = -np.inf
            penalize(logits, tokens, p.repetition_penalty)
        if p.temperature == 0.0:
            return int(logits.argmax())
        ids, probabilities = distribution(logits, p)
        return int(ids[draw(probabilities, self.uniform(generated))])

    def uniform(self, index: int) -> float:
        """The number in [0, 1) that token `index` of those generated is drawn with, however often it is asked for."""
        while len(self._drawn) <= index:
            self._drawn.append(self._random.random())
        return self._drawn[index]


def penalize(logits: F32, tokens: list[int], penalty: float) -> None:
    """Repetition penalty in place (Keskar et al. 2019, CTRL, section 4.1): seen tokens' positive logits are divided
    by `penalty`, negative ones multiplied."""
    if penalty == 1.0:
        return
    seen = np.unique(np.asarray(tokens, np.int64))
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def distribution(logits: F32, p: SamplingParams) -> tuple[I64, F64]:
    """Candidate ids and their probabilities f64 (sum 1) after temperature, top-k and top-p (Holtzman et al. 2020,
    section 3.1: the smallest set whose mass reaches `top_p`). Candidates stand in order of falling probability
    where top-k or top-p asks for an order, else in order of id. Raises RequestError where no logit is finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # judged below, in one place
        scaled = logits / np.float32(p.temperature)
    top = scaled.max()
    if not np.isfinite(top):
        raise RequestError(
            f"the model's logits have no finite maximum ({top}); lint the checkpoint, or raise the temperature"
        )
    weights = np.exp(scaled - top)
    count = min(p.top_k or weights.size, weights.size)
    if p.top_p < 1.0:
        ids = _nucleus(weights, count, p.top_p)
    elif count < weights.size:
        ids = _largest(weights, count)
    else:
        ids = np.arange(weights.size)
    chosen = weights[ids].astype(np.float64)
    return ids, chosen / chosen.sum()


def _largest(weights: F32, count: int) -> I64:
    """Indices of the `count` largest weights, falling, equal ones in order of id."""
    ids = np.sort(np.argpartition(weights, weights.size - count)[-count:]) if count < weights.size else None
    if ids is None:
        return np.argsort(-weights, kind="stable")
    return ids[np.argsort(-weights[ids], kind="stable")]


def _nucleus(weights: F32, count: int, top_p: float) -> I64:
    """The fewest of the `count` largest weights whose sum reaches `top_p` of their total. Sorts a short head first:
    a whole vocabulary takes milliseconds to sort and the nucleus is nearly always small."""
    total = (weights if count == weights.size else weights[_largest(weights, count)]).sum(dtype=np.float64)
    head = 256
    while True:
        ids = _largest(weights, min(head, count))
        mass = np.cumsum(weights[ids], dtype=np.float64)
        if mass[-1] >= top_p * total or head >= count:
            return ids[: int(np.searchsorted(mass, top_p * total)) + 1]
        head *= 8


def draw(probabilities: F64, uniform: float) -> int:
    """Index by inverse transform of one uniform number in [0, 1)."""
    cumulative = np.cumsum(probabilities)
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), cumulative.size - 1)
