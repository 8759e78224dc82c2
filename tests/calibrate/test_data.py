from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.calibrate.data import DataSpec, eval_windows, load_tokens
from quantbench.errors import DataError


class Bytes:
    """A tokenizer whose ids are the bytes of the text; 256 ends a text, 257 opens a turn."""

    eos_ids = (256,)

    def __init__(self, template: bool = True) -> None:
        self.has_chat_template = template
        self.encoded = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += len(text)
        return list(text.encode())

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        return [t for m in messages for t in (257, *m["content"].encode())] + [258] * add_generation_prompt


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """90 documents of 11 to 100 bytes, each of one character of its own."""
    path = tmp_path / "rows.jsonl"
    texts = [chr(33 + i) * (11 + i) for i in range(90)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return str(path)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"src": f"question {i}", "tgt": "yes"}) for i in range(9)))
    return str(path)


def test_packed_samples_are_full_and_drawn_without_repeating(rows: str) -> None:
    tokens = load_tokens(DataSpec(rows, samples=20, length=50), Bytes())
    assert tokens.ids.shape == (20, 50)
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32
    assert (tokens.lengths == 50).all()
    assert tokens.tokens == 1000
    assert tokens.source == rows
    assert len({row.tobytes() for row in tokens.ids}) == 20
    assert set(np.unique(tokens.ids)) <= {256, *range(33, 123)}
    assert (tokens.ids == 256).any()  # documents are kept apart


def test_padded_samples_are_documents(rows: str) -> None:
    tokens = load_tokens(DataSpec(rows, samples=30, length=60, packing=False), Bytes())
    assert tokens.ids.shape == (30, 60)
    assert tokens.lengths.min() < 60 <= tokens.lengths.max()
    for row, length in zip(tokens.ids, tokens.lengths, strict=True):
        assert len(set(row[:length])) == 1  # one document, one letter
        assert not row[length:].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), packing=st.booleans())
def test_the_seed_decides_and_nothing_else(seed: int, packing: bool) -> None:
    spec = DataSpec("python:topics", 3, 16, seed, packing)
    first, again = load_tokens(spec, Bytes()), load_tokens(spec, Bytes())
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.sha256 == again.sha256
    other = load_tokens(replace(spec, seed=seed + 1), Bytes())
    assert other.sha256 != first.sha256


def test_the_hash_covers_lengths(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x\0")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    spec = DataSpec("", 1, 4, packing=False)
    a, b = (load_tokens(replace(spec, data=str(tmp_path / f"{n}.jsonl")), Bytes()) for n in "ab")
    np.testing.assert_array_equal(a.ids, b.ids)
    assert a.sha256 != b.sha256


@pytest.mark.parametrize(("word", "opened"), [("auto", True), ("on", True), ("off", False)])
def test_chat_template(chats: str, word: str, opened: bool) -> None:
    tokens = load_tokens(DataSpec(chats, 4, 32, packing=False, chat_template=word), Bytes())
    assert (tokens.ids[:, 0] == 257).all() == opened
    assert not (tokens.ids == 258).any()  # no opened answer at the end
    if not opened:
        assert bytes(tokens.ids[0, :9].astype(np.uint8)) == b"question "


def test_auto_does_without_a_template(chats: str) -> None:
    assert not (load_tokens(DataSpec(chats, 4, 32, packing=False), Bytes(template=False)).ids == 257).any()


def test_a_template_asked_for_must_be_there(chats: str, rows: str) -> None:
    with pytest.raises(DataError, match=r"tokenizer has no chat template\. Set it to off"):
        load_tokens(DataSpec(chats, 2, 8, chat_template="on"), Bytes(template=False))
    with pytest.raises(DataError, match="the data are plain text, not chats"):
        load_tokens(DataSpec(rows, 2, 8, chat_template="on"), Bytes())


def test_too_little_text_says_how_many_samples_there_were(rows: str) -> None:
    with pytest.raises(DataError, match=r"5084 tokens make 101 samples of 50, but 102 are asked\. Lower calibration"):
        load_tokens(DataSpec(rows, 102, 50), Bytes())
    with pytest.raises(DataError, match="90 documents make 90 samples, but 91 are asked"):
        load_tokens(DataSpec(rows, 91, 50, packing=False), Bytes())


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.txt: holds no text"):
        load_tokens(DataSpec(str(tmp_path / "a.txt")), Bytes())


def test_a_long_book_is_not_encoded_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 200_000)
    tokenizer = Bytes()
    load_tokens(DataSpec(str(tmp_path / "a.txt"), 4, 64), tokenizer)
    eval_windows(str(tmp_path / "a.txt"), 256, 65, tokenizer)
    assert tokenizer.encoded < 50_000


def test_windows_count_predictions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(33 + i % 90) for i in range(5000)))
    windows = eval_windows(str(tmp_path / "a.txt"), 40 * 15, 16, Bytes())
    assert len(windows) == 40
    assert sum(len(w) - 1 for w in windows) == 600
    assert bytes(np.concatenate(windows).astype(np.uint8)).decode() == (tmp_path / "a.txt").read_text()[:640]
    assert len(eval_windows(str(tmp_path / "a.txt"), 4096, 512, Bytes())) == 8  # whole windows only
    assert len(eval_windows(str(tmp_path / "a.txt"), 3, 512, Bytes())) == 1


def test_windows_join_documents_like_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": c * 9}) for c in "abc"))
    window = eval_windows(str(tmp_path / "a.jsonl"), 24, 25, Bytes())[0]
    assert bytes(window.astype(np.uint8)) == b"aaaaaaaaa\n\nbbbbbbbbb\n\nccc"


class Words(Bytes):
    """One token a word, however long."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += len(text)
        return [len(word) for word in text.split()]


def test_text_of_very_long_tokens_is_read_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(("x" * 99 + "\n") * 1000)
    assert len(eval_windows(str(tmp_path / "a.txt"), 900, 10, Words())) == 100


def test_windows_of_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(DataError, match=r"150 predictions at context 16 take 10 windows, 160 tokens; the text has 100, "
                                        r"enough for 6 windows"):  # fmt: skip
        eval_windows(str(tmp_path / "a.txt"), 150, 16, Bytes())
    with pytest.raises(DataError, match="context 1 leaves nothing to predict"):
        eval_windows(str(tmp_path / "a.txt"), 10, 1, Bytes())
