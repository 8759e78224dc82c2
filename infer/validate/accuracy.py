"""What a variant costs in accuracy against the float baseline, scored on the runtime that serves it.

One engine is in memory at a time: the baseline goes first and leaves its log-probabilities of the divergence windows
in a temporary file, which every variant reads back row by row. A window that belongs to several sets is scored once.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from quantbench.errors import CheckpointError, DataError, unknown
from quantbench.infer.validate.choices import Answers, ChoiceSet, Scorer, answer_questions
from quantbench.infer.validate.likelihood import (
    F32,
    F64,
    Normaliser,
    bootstrap_mean,
    divergence,
    log_softmax,
    row_chunks,
    token_nll,
)

Ids = npt.NDArray[np.int32]
Loader = Callable[[], Scorer]
Progress = Callable[[str, int, int], None]  # variant, steps done, steps in all
_CHUNK = 1 << 21  # log-probabilities held at a time: 8 MB of the baseline's and of the variant's


@dataclass(frozen=True)
class TokenSet:
    """Windows of token ids i32[L]. Each is scored from its second token, with nothing of the window before it."""

    name: str
    windows: tuple[Ids, ...]

    @property
    def context(self) -> int:
        return max(len(w) for w in self.windows)

    @property
    def tokens(self) -> int:
        """Tokens that are scored, not counting the first of each window."""
        return sum(len(w) - 1 for w in self.windows)


def cut_windows(name: str, ids: Sequence[int] | Ids, context: int, tokens: int | None = None) -> TokenSet:
    """Consecutive windows of `context` tokens in which `tokens` tokens are scored (None: all there are).

    A window scores one token fewer than it has, so 4088 tokens at context 512 are 8 windows; the last one may be
    shorter. Raises DataError where the text is too short.
    """
    if context < 2:
        raise DataError(f"{name}: context {context} scores nothing; it must be at least 2")
    full, rest = divmod(len(ids), context)
    most = full * (context - 1) + max(rest - 1, 0)
    wanted = most if tokens is None else tokens
    if most < 1 or not 1 <= wanted <= most:
        raise DataError(
            f"{name}: {wanted} tokens to score asked for, its {len(ids)} tokens hold {most} at context {context}; "
            "give a longer text or fewer tokens"
        )
    full, rest = divmod(wanted, context - 1)
    used = np.asarray(ids, dtype=np.int32)[: full * context + (rest + 1 if rest else 0)]
    return TokenSet(name, tuple(used[i : i + context] for i in range(0, len(used), context)))


@dataclass(frozen=True)
class AccuracyTasks:
    """What to score. `divergence` needs log-probabilities on disk: 4 bytes × tokens × vocabulary."""

    perplexity: Sequence[TokenSet] = ()
    divergence: TokenSet | None = None
    choices: Sequence[ChoiceSet] = ()

    def sets(self) -> list[TokenSet]:
        return [*self.perplexity, *([self.divergence] if self.divergence else [])]

    def windows(self) -> dict[bytes, Ids]:
        """Every distinct window once, keyed by its bytes."""
        return {w.tobytes(): w for s in self.sets() for w in s.windows}

    def divergent(self) -> set[bytes]:
        return {w.tobytes() for w in self.divergence.windows} if self.divergence else set()

    def steps(self) -> int:
        return len(self.windows()) + sum(len(s.questions) for s in self.choices)


@dataclass
class Scores:
    """What one variant answered, by window bytes and by choice set; nll and kl in nats per token."""

    nll: dict[bytes, F64] = field(default_factory=dict)
    kl: dict[bytes, F64] = field(default_factory=dict)
    top1: dict[bytes, npt.NDArray[np.bool_]] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)


class BaselineFile:
    """The baseline's log-probabilities, float32, in the order of the divergence windows; gone when closed."""

    def __init__(self, work_dir: Path) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        self._directory = work_dir
        self._file: IO[bytes] = tempfile.NamedTemporaryFile(dir=work_dir, prefix="baseline-", suffix=".f32")  # noqa: SIM115
        self.vocab = 0

    def __enter__(self) -> BaselineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rewind(self) -> None:
        self._file.seek(0)

    def reserve(self, tokens: int, vocab: int) -> None:
        """Called once with what will be written. Raises DataError where the disk has no room for it."""
        self.vocab = vocab
        free, need = shutil.disk_usage(self._directory).free, 4 * tokens * vocab
        if need > free:
            raise DataError(
                f"{self._directory}: the divergence of {tokens} tokens over {vocab} words needs {need} bytes, "
                f"{free} are free; evaluate fewer tokens or free some room"
            )

    def write(self, logp: F32) -> None:
        self._file.write(logp.tobytes())

    def read(self, rows: int) -> F32:
        flat = np.frombuffer(self._file.read(4 * rows * self.vocab), dtype=np.float32)
        return flat.reshape(rows, self.vocab)


def evaluate_accuracy(
    variants: Mapping[str, Loader],
    baseline: str,
    tasks: AccuracyTasks,
    work_dir: str | Path,
    progress: Progress = lambda variant, done, total: None,
) -> dict[str, Any]:
    """Score every variant and compare it with `baseline`: the content of accuracy.json.

    `variants` maps a name to a function that loads its engine. Intervals are 95 %, paired, over windows or questions;
    null where there is only one. Raises DataError (unknown baseline, different vocabularies, no room for the
    temporary file) and CheckpointError (a variant whose logits are not finite).
    """
    if baseline not in variants:
        raise DataError(unknown("baseline", baseline, variants))
    scores: dict[str, Scores] = {}
    with BaselineFile(Path(work_dir)) as file:
        for name in sorted(variants, key=lambda n: n != baseline):
            run = _Run(name, tasks, file, name == baseline, progress)
            scores[name] = run.score(variants[name]())
            gc.collect()  # an engine with reference cycles would stay beside the next one
    return {
        "baseline": baseline,
        "perplexity": [_perplexity(s, scores, baseline) for s in tasks.perplexity],
        "divergence": [_divergence(tasks.divergence, scores, baseline)] if tasks.divergence else [],
        "choices": [_choices(s, scores, baseline) for s in tasks.choices],
    }


@dataclass
class _Run:
    """One variant going through all tasks."""

    name: str
    tasks: AccuracyTasks
    file: BaselineFile
    is_baseline: bool
    progress: Progress
    done: int = 0

    def score(self, engine: Scorer) -> Scores:
        scores, divergent, total = Scores(), self.tasks.divergent(), self.tasks.steps()
        self.file.rewind()
        for key, window in self.tasks.windows().items():
            if key in divergent:
                logits = engine.score(window.tolist())
                normaliser = Normaliser.of(logits)
                scores.nll[key] = token_nll(logits, window, normaliser)
            else:
                scores.nll[key] = -engine.likelihood(window.tolist())  # a GPU sends one number per token, not V
            if not np.isfinite(scores.nll[key]).all():
                raise CheckpointError(
                    f"{self.name}: NaN or Inf among its logits; `quantbench lint` on the checkpoint names the tensor"
                )
            if key in divergent:
                self._diverge(scores, key, logits[:-1], normaliser[:-1])
            self._advance(total)
        for choice_set in self.tasks.choices:
            scores.answers[choice_set.name] = answer_questions(
                engine, choice_set.questions, lambda: self._advance(total)
            )
        return scores

    def _advance(self, total: int) -> None:
        self.done += 1
        self.progress(self.name, self.done, total)

    def _diverge(self, scores: Scores, key: bytes, logits: F32, normaliser: Normaliser) -> None:
        if self.tasks.divergence and not self.file.vocab:
            self.file.reserve(self.tasks.divergence.tokens, logits.shape[1])
        if logits.shape[1] != self.file.vocab:
            raise DataError(
                f"{self.name} has a vocabulary of {logits.shape[1]}, the baseline of {self.file.vocab}: their "
                "divergence is not defined; compare models of one tokenizer, or leave the divergence out"
            )
        kl, top1 = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
        for rows in row_chunks(logits, _CHUNK):
            logp = log_softmax(logits[rows], normaliser[rows])
            if self.is_baseline:
                self.file.write(logp)
            else:
                k, t = divergence(self.file.read(len(logp)), logp)
                kl, top1 = [*kl, k], [*top1, t]
        scores.kl[key], scores.top1[key] = np.concatenate(kl), np.concatenate(top1)


def _sums(values: Mapping[bytes, npt.NDArray[Any]], token_set: TokenSet) -> F64:
    """Per window of the set, the sum over its tokens: the units of the bootstrap."""
    return np.array([values[w.tobytes()].sum(dtype=np.float64) for w in token_set.windows])


def _perplexity(token_set: TokenSet, scores: Mapping[str, Scores], baseline: str) -> dict[str, Any]:
    counts = np.array([len(w) - 1 for w in token_set.windows], dtype=np.float64)
    base = _sums(scores[baseline].nll, token_set)
    variants: dict[str, Any] = {}
    for name, score in scores.items():
        sums = _sums(score.nll, token_set)
        nll = float(sums.sum() / counts.sum())
        variants[name] = {"perplexity": float(np.exp(nll)), "nll": nll}
        if name != baseline:
            value, interval = bootstrap_mean(sums - base, counts, np.expm1)
            variants[name] |= {"increase": value, "increase_interval": interval}
    return {"data": token_set.name, "tokens": token_set.tokens, "context": token_set.context, "variants": variants}


def _divergence(token_set: TokenSet, scores: Mapping[str, Scores], baseline: str) -> dict[str, Any]:
    counts = np.array([len(w) - 1 for w in token_set.windows], dtype=np.float64)
    variants: dict[str, Any] = {}
    for name, score in scores.items():
        if name != baseline:
            kl, kl_interval = bootstrap_mean(_sums(score.kl, token_set), counts)
            top1, top1_interval = bootstrap_mean(_sums(score.top1, token_set), counts)
            variants[name] = {"kl": kl, "kl_interval": kl_interval, "top1": top1, "top1_interval": top1_interval}
    return {"data": token_set.name, "tokens": token_set.tokens, "context": token_set.context, "variants": variants}


def _choices(choice_set: ChoiceSet, scores: Mapping[str, Scores], baseline: str) -> dict[str, Any]:
    base = scores[baseline].answers[choice_set.name]
    ones = np.ones(len(choice_set.questions))
    variants: dict[str, Any] = {}
    for name, score in scores.items():
        answers = score.answers[choice_set.name]
        variants[name] = {
            "accuracy": float(answers.by_sum.mean()),
            "accuracy_normalized": float(answers.by_length.mean()),
        }
        if name != baseline:
            delta, interval = bootstrap_mean(answers.by_sum - base.by_sum, ones)
            normalized, normalized_interval = bootstrap_mean(answers.by_length - base.by_length, ones)
            variants[name] |= {"delta": delta, "delta_interval": interval}
            variants[name] |= {"delta_normalized": normalized, "delta_normalized_interval": normalized_interval}
    return {"data": choice_set.name, "questions": len(choice_set.questions), "variants": variants}
