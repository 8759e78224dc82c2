"""The kinds of value a recipe holds: words from a list, percentages, sizes, observers, and `off`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, GetCoreSchemaHandler, SerializerFunctionWrapHandler, WrapSerializer
from pydantic.types import Strict
from pydantic_core import CoreSchema, core_schema

from quantbench.errors import unknown
from quantbench.vocabulary import OBSERVERS

T = TypeVar("T")

_SIZES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Words:
    """A text that must be one of `words`; the complaint names the nearest one."""

    kind: str
    words: tuple[str, ...]

    def check(self, value: str) -> str:
        if value not in self.words:
            raise ValueError(unknown(self.kind, value, self.words))
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


@dataclass(frozen=True)
class Shown:
    """What the reference prints in the column of allowed values."""

    text: str


def fraction(value: Any) -> Any:
    """ "5%" -> 0.05; numbers pass."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%?)\s*", value)
    if match is None:
        raise ValueError(f"expected a number or a percentage such as 5%, got {value!r}")
    return float(match[1]) / (100 if match[2] else 1)


def byte_count(value: Any) -> Any:
    """ "1GiB" -> 1073741824; whole numbers are bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2] not in _SIZES:
        raise ValueError(f"expected a size such as 512MiB or 1GiB, got {value!r}. Units: B, KiB, MiB, GiB, KB, MB, GB")
    return int(float(match[1]) * _SIZES[match[2]])


def observer(value: Any) -> Any:
    """A word of OBSERVERS, `{percentile: 99.9}` (kept as "percentile=99.9"), or "paddleslim:<name>"."""
    if isinstance(value, dict):
        if len(value) != 1 or "percentile" not in value:
            raise ValueError("only `{percentile: 99.99}` takes a number; the others are plain words")
        value = f"percentile={value['percentile']}"
    if not isinstance(value, str):
        return value
    if value.startswith("percentile="):
        return f"percentile={_percentile(value.removeprefix('percentile='))}"
    if value.startswith("paddleslim:"):
        if not re.fullmatch(r"paddleslim:[A-Za-z0-9_]+", value):
            raise ValueError(f"{value!r} lacks PaddleSlim's observer. Write for example paddleslim:hist")
        return value
    if value not in OBSERVERS:
        raise ValueError(unknown("observer", value, [*OBSERVERS, "paddleslim:<name>"]))
    return value


def _percentile(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 50 <= number <= 100:
        raise ValueError(f"a percentile lies between 50 and 100, got {text}")
    return number


def prefix(value: Any) -> Any:
    """ "auto", "off" (or false), or a list of token ids as a tuple."""
    if value is False or value in ("auto", "off"):
        return value or "off"
    ids = value if isinstance(value, (list, tuple)) else ()
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"expected auto, off, or a list of token ids such as [1, 198], got {value!r}")
    return tuple(ids)


def _none_for(word: str) -> Callable[[Any], Any]:
    return lambda value: None if value is False or value == word else value


def _word_for_none(word: str) -> Callable[[Any, SerializerFunctionWrapHandler], Any]:
    return lambda value, handler: word if value is None else handler(value)


def listed(words: Iterable[str]) -> str:
    return ", ".join(words)


Rows = Annotated[tuple[T, ...], Strict(False)]  # a YAML list, kept as a tuple
Off = Annotated[T | None, BeforeValidator(_none_for("off")), WrapSerializer(_word_for_none("off"))]
Auto = Annotated[T | None, BeforeValidator(_none_for("auto")), WrapSerializer(_word_for_none("auto"))]
Fraction = Annotated[float, BeforeValidator(fraction), Shown("a number or a percentage")]
Bytes = Annotated[int, BeforeValidator(byte_count), Shown("bytes, or 512MiB, 1GiB …")]
Prefix = Annotated[str | tuple[int, ...], BeforeValidator(prefix), Shown("auto, off, or a list of token ids")]
Observer = Annotated[
    str, BeforeValidator(observer), Shown(f"{listed(OBSERVERS)}, {{percentile: 99.99}}, paddleslim:<name>")
]
