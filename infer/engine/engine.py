"""The engine: one model, one cache, any number of requests. Scoring and tracing for validation, generation for use.

engine = Engine.load("runs/demo/checkpoint/a8w8")
engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16))
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantbench.errors import ModelError, RequestError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.engine import cost
from quantbench.infer.engine.beam import Beam, BeamParams, BeamSearch
from quantbench.infer.engine.cache import KVCache, pages_for
from quantbench.infer.engine.limits import check_ids, limits_of
from quantbench.infer.engine.mode import resolve_mode
from quantbench.infer.engine.request import Completion, Output, Request, Token
from quantbench.infer.engine.runner import Runner, cache_room, open_runner
from quantbench.infer.engine.sampling import Sampler, SamplingParams
from quantbench.infer.engine.scheduler import Running, Scheduler
from quantbench.infer.engine.text import TextStream
from quantbench.infer.engine.trace import Trace
from quantbench.infer.engine.weights import load_model
from quantbench.infer.ops import Ops, load_ops
from quantbench.vocabulary import Mode

F32 = npt.NDArray[np.float32]


class Engine:
    """Runs a model. Build one with `Engine.load`. Not safe for use from several threads at once."""

    def __init__(self, source: ModelSource, mode: Mode, runner: Runner, scheduler: Scheduler) -> None:
        self.source, self.mode, self.runner, self.scheduler = source, mode, runner, scheduler
        self.config, self.limits = source.config, runner.limits
        self.load_seconds = 0.0
        self._next = 0
        self._inboxes: dict[int, list[Output]] = {}  # of requests that generate or stream waits for
        self._outputs: list[Output] = []  # of all other requests

    @classmethod
    def load(
        cls,
        model: str | Path | ModelSource,
        mode: str | None = None,
        *,
        ops: str | Ops = "cpu",
        threads: int | None = None,
        cache_tokens: int | None = None,
        max_batch: int = 32,
        chunk: int = 512,
        prefix_reuse: bool = True,
        prefix: Prefix | None = None,
    ) -> Engine:
        """Loads `model` (what `open_model` takes) with weights packed for `ops`.

        `mode` None: as stored. A float source also loads as fp32, bf16, fp16 (cast) or weight_only_int8,
        weight_only_int4, a8w8, a8w8_fp8 (round-to-nearest, activations dynamic per token). `cache_tokens` bounds all
        sequences together, `max_batch` how many run at once, `chunk` the prompt tokens of one step. `threads` sets
        the pool that all native engines of the process share. `prefix` None: the checkpoint's own, if it has one; its
        tokens are in front of every sequence, and never counted or returned.
        Raises ModelError, CheckpointError (see `open_model`), RequestError (mode, sizes), DependencyError (ops).
        """
        begin = time.perf_counter()
        source = model if isinstance(model, ModelSource) else open_model(model)
        own, converts = resolve_mode(source, mode)
        prefix = prefix or source.prefix
        length = len(prefix) if prefix else 0
        limits = limits_of(source.config, own.cache, cache_tokens, max_batch, chunk, length)
        table = load_ops(ops) if isinstance(ops, str) else ops
        if threads is not None:
            table.set_threads(threads)
        weights = load_model(source, table, own if converts else None)
        room = cache_room(table, weights, limits)
        limits = limits_of(source.config, own.cache, cache_tokens, max_batch, chunk, length, room)
        scales = [source.cache_scales(layer) for layer in range(source.config.num_layers)]
        spare = limits.max_batch * pages_for(length)
        cache = KVCache(source.config, own.cache, limits.cache_tokens, scales, prefix, spare)
        scheduler = Scheduler(cache.pool, limits.max_batch, limits.chunk, prefix_reuse, length)
        engine = cls(source, own, open_runner(table, weights, cache, limits), scheduler)
        engine.load_seconds = time.perf_counter() - begin
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read on first use. Raises ModelError where there is none that can be read."""
        if self._tokenizer is None:
            self._tokenizer = self.source.tokenizer()
        return self._tokenizer

    _tokenizer: Tokenizer | None = None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held: `weights_bytes`, and `cache_bytes` (its full size; pages never used take no memory)."""
        return {"weights_bytes": cost.weight_bytes(self.runner.model), "cache_bytes": self.runner.cache.nbytes}

    def bytes_per_token(self, batch: int, context: int) -> float:
        """Bytes read from memory per decoded token; see `cost.bytes_per_token`."""
        return cost.bytes_per_token(self.runner.model, self.mode.cache, batch, context + self.prefix_length)

    def operations_per_token(self, context: int) -> float:
        """Multiplications and additions per token; see `cost.operations_per_token`."""
        return cost.operations_per_token(self.runner.model, context + self.prefix_length)

    @property
    def prefix_length(self) -> int:
        """Tokens of the checkpoint's prefix; 0 for most."""
        return self.runner.cache.prefix_length

    def score(self, ids: Sequence[int]) -> F32:
        """Logits f32[T, V] of every position of one window, computed in chunks on pages of its own.

        Raises RequestError for bad ids, and where running requests hold the pages it needs.
        """
        logits = np.empty((len(ids), self.config.vocab_size), np.float32)
        for start, part in self.runner.score(ids):
            logits[start : start + len(part)] = part
        return logits

    def likelihood(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log-probabilities f64[T - 1] of the tokens of one window after its first, each given those before it. On a
        GPU they are taken there, and T numbers leave it instead of T·V.

        Raises RequestError as `score` does.
        """
        return self.runner.likelihood(ids)

    def score_chunks(self, ids: Sequence[int]) -> Iterator[tuple[int, F32]]:
        """`score`, one (start, logits f32[chunk, V]) at a time, where T·V floats are too many to hold."""
        return self.runner.score(ids)

    def trace(self, ids: Sequence[int]) -> Trace:
        """What one window does in every layer: hidden states, tap inputs with their codes and scales, and logits.

        Raises RequestError as `score` does.
        """
        return self.runner.trace(ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completions in the order of `prompts`, batched continuously. One `params` for all, or one per prompt.

        Raises RequestError as `add` does, before anything runs.
        """
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one per prompt"
            )
        requests = [self._sequence(Request(list(p), q)) for p, q in zip(prompts, each, strict=True)]
        with self._inbox(requests) as inboxes:
            while not all(inbox and inbox[-1].finish_reason for inbox in inboxes):
                self._advance()
            return [_completion(r, inbox) for r, inbox in zip(requests, inboxes, strict=True)]

    def stream(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Iterator[Token]:
        """Tokens of one request as they are made. Closing the iterator ends the request. Raises as `add` does."""
        return self._stream(self._sequence(Request(list(prompt), params or SamplingParams())))

    def _stream(self, request: Running) -> Iterator[Token]:
        with self._inbox([request]) as (inbox,):
            reason = None
            while reason is None:
                while not inbox:
                    self._advance()
                output = inbox.pop(0)
                reason = output.finish_reason
                yield Token(output.token, output.text, reason)

    def beam_search(self, prompt: Sequence[int], params: BeamParams | None = None) -> list[Beam]:
        """The best continuations by length-normalized log-probability, best first.

        Raises RequestError as `add` does, and where running requests leave too few cache pages.
        """
        wanted = params or BeamParams()
        check_ids(prompt, self.config, self.limits.max_length - 1, self.limits.reason)
        ends = self._stop_ids(wanted.stop_token_ids, wanted.ignore_eos)
        return BeamSearch(self.runner, [int(i) for i in prompt], wanted, ends).run()

    def add(self, request: Request) -> int:
        """Queues a request and returns its number. Raises RequestError for an empty prompt, one too long for the
        model's positions or the cache, ids outside the vocabulary, and stop strings without a tokenizer."""
        sequence = self._sequence(request)
        self.scheduler.add(sequence)
        return sequence.number

    def step(self) -> list[Output]:
        """Runs one batch and returns the new tokens of requests queued with `add`; empty when idle."""
        self._advance()
        outputs, self._outputs = self._outputs, []
        return outputs

    def abort(self, number: int) -> None:
        """Ends a request at once; nothing happens where it has already ended."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.number == number:
                self.scheduler.finish(sequence)

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self.scheduler.running and not self.scheduler.waiting

    @contextmanager
    def _inbox(self, requests: list[Running]) -> Iterator[list[list[Output]]]:
        """Queues `requests` and collects their outputs apart; whatever happens, none of them stays behind."""
        inboxes = [self._inboxes.setdefault(r.number, []) for r in requests]
        try:
            for request in requests:
                self.scheduler.add(request)
            yield inboxes
        finally:
            for request in requests:
                self.abort(request.number)
                del self._inboxes[request.number]

    def _advance(self) -> None:
        """One step: choose the work, run it, choose tokens, hand them out."""
        work = self.scheduler.schedule()
        if not work:
            return
        chosen = self.runner.choose(work, crowded=bool(self.scheduler.waiting))
        self.scheduler.commit(work)
        for sequence, token in chosen:
            output = _extend(sequence, token)
            self._inboxes.get(sequence.number, self._outputs).append(output)
            if output.finish_reason is not None:
                self.scheduler.finish(sequence)

    def _sequence(self, request: Request) -> Running:
        """A request checked and made ready to queue."""
        p, prompt = request.params, request.prompt
        check_ids(prompt, self.config, self.limits.max_length - 1, self.limits.reason)
        stop_ids = self._stop_ids(p.stop_token_ids, p.ignore_eos)
        tokenizer = self._optional_tokenizer() if p.detokenize else None
        if p.stop and tokenizer is None:
            raise RequestError(
                f"stop: {self.source.name} has no tokenizer to find stop strings with; use stop_token_ids"
            )
        self._next += 1
        return Running(
            number=self._next,
            tokens=[int(i) for i in prompt],
            prompt_length=len(prompt),
            limit=min(len(prompt) + p.max_tokens, self.limits.max_length),
            sampler=Sampler(p, stop_ids),
            text=TextStream(tokenizer.stream(), p.stop) if tokenizer else None,
        )

    def _stop_ids(self, asked: tuple[int, ...], ignore_eos: bool) -> frozenset[int]:
        """The ids after which a request ends. Raises RequestError for asked ones outside the vocabulary."""
        if bad := [i for i in asked if not 0 <= i < self.config.vocab_size]:
            raise RequestError(f"stop_token_ids: {bad} are outside the vocabulary of {self.config.vocab_size}")
        if ignore_eos:
            return frozenset(asked)
        tokenizer = self._optional_tokenizer()
        ends = self.config.eos_token_ids + (tokenizer.eos_ids if tokenizer else ())
        return frozenset(asked) | {i for i in ends if i < self.config.vocab_size}

    def _optional_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None for a model without one, whose completions are ids only."""
        try:
            return self.tokenizer
        except ModelError:
            return None


def _extend(sequence: Running, token: int) -> Output:
    """Appends the next token of a sequence."""
    sequence.tokens.append(token)
    reason = "stop" if token in sequence.sampler.stop_ids else None
    stream, text = sequence.text, ""
    if stream is not None and reason is None:
        text = stream.push(token)
        reason = "stop" if stream.stopped else None
    if reason is None and len(sequence.tokens) >= sequence.limit:
        reason = "length"
    if stream is not None and reason is not None:
        text += stream.finish()
        reason = "stop" if stream.stopped else reason
    return Output(sequence.number, token, text, reason)


def _completion(request: Running, outputs: list[Output]) -> Completion:
    return Completion(
        ids=[o.token for o in outputs],
        text="".join(o.text for o in outputs),
        finish_reason=outputs[-1].finish_reason or "stop",
        prompt_tokens=request.prompt_length,
        reused_tokens=request.reused,
    )
