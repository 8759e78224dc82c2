"""Every error a user can meet, as a tree.

    QuantbenchError            exit code 2: the input or the machine is at fault, and the message says what to do
    ├── RecipeError            a recipe cannot be understood or does not fit the model
    ├── ModelError             a model directory, GGUF file or hub name cannot be read
    ├── DataError              calibration or evaluation text cannot be read or is too short
    ├── CalibrationError       the numbers seen while calibrating cannot be used (NaN, Inf, a mismatch on resume)
    ├── CheckpointError        a checkpoint or scale table is damaged or inconsistent
    ├── RequestError           a generation request the engine cannot serve
    └── DependencyError        a library, device or instruction set is missing; says the exact line that adds it

An error carries all its problems at once: fixing a file one message at a time wastes the user's hours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantbenchError(Exception):
    """Base of every expected error. `problems` holds one line each: what, where, what is allowed, what to do."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))


class RecipeError(QuantbenchError):
    pass


class ModelError(QuantbenchError):
    pass


class DataError(QuantbenchError):
    pass


class CalibrationError(QuantbenchError):
    pass


class CheckpointError(QuantbenchError):
    pass


class RequestError(QuantbenchError):
    pass


class DependencyError(QuantbenchError):
    pass


def unknown(kind: str, value: str, known: Iterable[str]) -> str:
    """One sentence for a word that is not in a vocabulary, with the nearest known word and the whole list."""
    words = sorted(known)
    near = difflib.get_close_matches(value, words, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown {kind} {value!r}.{hint} Known: {', '.join(words)}"
