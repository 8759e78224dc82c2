"""Calibration and evaluation text as token ids.

Packing concatenates documents (an end-of-text token between two) and cuts the stream into samples without padding;
padding makes one sample of each document, cut at `length` and filled on the right, `lengths` saying what is real.
Both draw with one seed: the same arguments give the same ids on every machine.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from quantbench.calibrate.forward import Int
from quantbench.calibrate.text import Document, documents
from quantbench.errors import DataError

# Packing reads this many times the tokens it needs before it draws (at least), so that a seed is a real choice ...
SPARE = 4
CHARS_PER_TOKEN = 8  # ... and of a long document no more than so many characters per token needed
SEPARATOR = "\n\n"  # between documents of an evaluation text
SHUFFLE_ROWS = 100_000  # rows looked at before drawing; a larger file is judged by its beginning


class TokenizerLike(Protocol):
    """What this module needs of infer.checkpoint.tokenizer.Tokenizer."""

    eos_ids: tuple[int, ...]

    @property
    def has_chat_template(self) -> bool: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]: ...


class CalibrationSpec(Protocol):
    """The recipe's `calibration:` section; `DataSpec` is one, and so is the recipe's own model.

    chat_template: "on" applies the tokenizer's, "off" joins the turns with newlines, "auto" applies it where the data
    are chats and the tokenizer has one.
    """

    @property
    def data(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def packing(self) -> bool: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def text_field(self) -> str: ...
    @property
    def split(self) -> str: ...


@dataclass(frozen=True)
class DataSpec:
    """A CalibrationSpec with the defaults of the recipe."""

    data: str = "python:topics"
    samples: int = 32
    length: int = 256
    seed: int = 0
    packing: bool = True
    chat_template: str = "auto"
    text_field: str = "text"
    split: str = "train"


@dataclass(frozen=True)
class TokenBatches:
    """ids i32[S, L], right-padded with 0; lengths i32[S] real tokens of each; sha256 of both; source for people."""

    ids: Int
    lengths: Int
    sha256: str
    source: str

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.lengths.sum())


def load_tokens(spec: CalibrationSpec, tokenizer: TokenizerLike) -> TokenBatches:
    """`spec.samples` samples of `spec.length` tokens. Raises DataError, also where the text gives fewer samples."""
    found = list(islice(documents(spec.data, spec.split, spec.text_field), SHUFFLE_ROWS))
    if not found:
        raise DataError(f"{spec.data}: holds no text")
    generator = np.random.default_rng(spec.seed)
    order = [found[i] for i in generator.permutation(len(found))]
    rows = (_packed if spec.packing else _padded)(order, spec, tokenizer, generator)
    ids = np.zeros((spec.samples, spec.length), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(row) for row in rows], np.int32)
    digest = hashlib.sha256(ids.tobytes() + lengths.tobytes()).hexdigest()
    return TokenBatches(ids, lengths, digest, spec.data)


def eval_windows(data: str, tokens: int, context: int, tokenizer: TokenizerLike) -> list[Int]:
    """The first windows of `context` ids each (i32[context]) of a text, not overlapping.

    `tokens` counts predictions: a window predicts all its tokens but the first, so 20,440 at context 512 are 40
    windows of 511. Whole windows only, at least one. Raises DataError where the text is too short.
    """
    if context < 2:
        raise DataError(f"{data}: context {context} leaves nothing to predict; at least 2 tokens are needed")
    windows = max(1, tokens // (context - 1))
    needed = windows * context
    stream = tokenizer.encode(_opening(documents(data), needed * SPARE * CHARS_PER_TOKEN))
    if len(stream) < needed:
        stream = tokenizer.encode(_opening(documents(data), sys.maxsize))
    if len(stream) < needed:
        raise DataError(
            f"{data}: {tokens} predictions at context {context} take {windows} windows, {needed} tokens; the text has "
            f"{len(stream)}, enough for {len(stream) // context} windows. Lower tokens or context, or add text"
        )
    return list(np.array(stream[:needed], np.int32).reshape(windows, context))


def _opening(found: Iterable[Document], size: int) -> str:
    """The first `size` characters of the documents in order: encoding a whole book to use a page of it is slow, and
    where the text is cut changes only tokens near the cut, far behind those that are used.
    """
    parts: list[str] = []
    for document in found:
        parts.append(document.text)
        size -= len(document.text) + len(SEPARATOR)
        if size < 0:
            break
    text = SEPARATOR.join(parts)
    return text[: len(text) + size] if size < 0 else text


def _packed(
    order: list[Document], spec: CalibrationSpec, tokenizer: TokenizerLike, generator: np.random.Generator
) -> list[list[int]]:
    """Samples drawn without replacement from the stream of concatenated documents."""
    needed = spec.samples * spec.length
    stream: list[int] = []
    for document in order:
        if stream:
            stream += tokenizer.eos_ids[-1:]
        stream += _encode(_excerpt(document, SPARE * needed * CHARS_PER_TOKEN, generator), spec, tokenizer)
        if len(stream) >= SPARE * needed:
            break
    windows = len(stream) // spec.length
    if windows < spec.samples:
        raise DataError(
            f"{spec.data}: {len(stream)} tokens make {windows} samples of {spec.length}, but {spec.samples} are asked. "
            "Lower calibration.samples or calibration.length, or add text"
        )
    starts = generator.permutation(windows)[: spec.samples] * spec.length
    return [stream[start : start + spec.length] for start in starts]


def _padded(
    order: list[Document], spec: CalibrationSpec, tokenizer: TokenizerLike, generator: np.random.Generator
) -> list[list[int]]:
    """One sample per document."""
    rows: list[list[int]] = []
    for document in order:
        excerpt = _excerpt(document, spec.length * 4 * CHARS_PER_TOKEN, generator)
        tokens = _encode(excerpt, spec, tokenizer)[: spec.length]
        if tokens:
            rows.append(tokens)
        if len(rows) == spec.samples:
            return rows
    raise DataError(
        f"{spec.data}: {len(rows)} documents make {len(rows)} samples, but {spec.samples} are asked. Lower "
        "calibration.samples, add documents, or set calibration.packing to true"
    )


def _excerpt(document: Document, size: int, generator: np.random.Generator) -> Document:
    """A document of plain text no longer than `size` characters, from a drawn place. Chats stay whole."""
    if document.messages or len(document.text) <= size:
        return document
    start = int(generator.integers(len(document.text) - size + 1))
    return Document(document.text[start : start + size])


def _encode(document: Document, spec: CalibrationSpec, tokenizer: TokenizerLike) -> list[int]:
    if spec.chat_template == "on":
        _require_chat(document, spec, tokenizer)
    if document.messages and spec.chat_template != "off" and tokenizer.has_chat_template:
        return tokenizer.chat(document.messages, add_generation_prompt=False)
    return tokenizer.encode(document.text)


def _require_chat(document: Document, spec: CalibrationSpec, tokenizer: TokenizerLike) -> None:
    if not tokenizer.has_chat_template:
        raise DataError(
            "calibration.chat_template is on, but this model's tokenizer has no chat template. Set it to off"
        )
    if not document.messages:
        raise DataError(
            f"{spec.data}: calibration.chat_template is on, but the data are plain text, not chats (messages, src with "
            "tgt, or prompt with completion). Set it to off"
        )
