"""Multiple choice by log-likelihood: which continuation of the question does the model find most likely?

A question file is JSONL, one object a line: {"question": "…", "choices": ["…", "…"], "answer": 0 or "…"}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantbench.errors import DataError, RequestError
from quantbench.infer.validate.likelihood import F64


class Encoder(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...


class Scorer(Protocol):
    """What accuracy needs of an Engine."""

    def score(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]: ...

    def likelihood(self, ids: Sequence[int]) -> F64: ...


@dataclass(frozen=True)
class Question:
    """One question in token ids. `lengths`: UTF-8 bytes of each choice, the unit of length normalisation; `where`:
    file and line, for messages."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    answer: int
    where: str = "question"

    @property
    def tokens(self) -> int:
        """With its longest choice."""
        return len(self.context) + max(map(len, self.choices))


@dataclass(frozen=True)
class ChoiceSet:
    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answers:
    """Right or wrong per question, f64[Q] of 0 and 1: by the sum of log-likelihoods, and by their mean per byte."""

    by_sum: F64
    by_length: F64


def load_choices(path: str | Path, tokenizer: Encoder) -> ChoiceSet:
    """The questions of a JSONL file. Raises DataError listing every bad line as `file:line: what is wrong`."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; --choices needs a JSONL file of {{question, choices, answer}} objects")
    problems: list[str] = []
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                questions.append(replace(_question(_parse(line), tokenizer), where=f"{path}:{number}"))
            except DataError as error:
                problems += [f"{path}:{number}: {problem}" for problem in error.problems]
    if not questions and not problems:
        problems.append(f"{path}: no question in it; write one JSON object a line")
    if problems:
        raise DataError(*problems)
    return ChoiceSet(path.name, tuple(questions))


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object; write {question, choices, answer}")
    problems = [f"{key} is missing" for key in ("question", "choices", "answer") if key not in row]
    problems += [
        f"unknown key {key!r}; allowed: question, choices, answer"
        for key in row
        if key not in ("question", "choices", "answer")
    ]
    if problems:
        raise DataError(*problems)
    return row


def _check(question: Any, choices: Any) -> None:
    problems = []
    if not isinstance(question, str) or not question.strip():
        problems.append("question must be a text that is not empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        problems.append("choices must be a list of at least 2 texts that are not empty")
    elif len(set(choices)) < len(choices):
        problems.append("choices must differ from each other")
    if problems:
        raise DataError(*problems)


def _answer(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise DataError(f"answer {answer!r} is neither an index 0 to {len(choices) - 1} nor one of the choices")


def _question(row: dict[str, Any], tokenizer: Encoder) -> Question:
    """Context and choice are encoded together, as the model would read them, and split at the context's length."""
    _check(row["question"], row["choices"])
    stem, choices = row["question"].rstrip(), [c.strip() for c in row["choices"]]
    answer = _answer(row["answer"], row["choices"])
    context = tuple(tokenizer.encode(stem))
    tails = tuple(tuple(tokenizer.encode(f"{stem} {choice}"))[len(context) :] for choice in choices)
    problems = [
        f"choice {choice!r} adds no token to the question" for choice, t in zip(choices, tails, strict=True) if not t
    ]
    if not context:
        problems.append("question must be a text that is not empty")
    if problems:
        raise DataError(*problems)
    return Question(context, tails, tuple(len(c.encode()) for c in choices), answer)


def answer_questions(
    engine: Scorer, questions: Sequence[Question], advance: Callable[[], None] = lambda: None
) -> Answers:
    """Score every choice of every question, calling `advance` after each question. Ties go to the first choice.

    Raises DataError with the line of every question that is as long as one which the engine refuses.
    """
    by_sum, by_length = np.zeros(len(questions)), np.zeros(len(questions))
    for i, q in enumerate(questions):
        try:
            likelihoods = np.array([_log_likelihood(engine, q.context, tail) for tail in q.choices])
        except RequestError as error:
            long = [other for other in questions if other.tokens >= q.tokens]
            raise DataError(
                *(f"{other.where}: {other.tokens} tokens with its longest choice: {error}" for other in long)
            ) from None
        by_sum[i] = likelihoods.argmax() == q.answer
        by_length[i] = (likelihoods / np.array(q.lengths)).argmax() == q.answer
        advance()
    return Answers(by_sum, by_length)


def _log_likelihood(engine: Scorer, context: tuple[int, ...], tail: tuple[int, ...]) -> float:
    return float(engine.likelihood(context + tail)[len(context) - 1 :].sum())
