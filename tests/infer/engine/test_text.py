from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.engine.text import TextStream


class Letters:
    """A token stream whose ids are characters."""

    def push(self, index: int) -> str:
        return chr(index)

    def finish(self) -> str:
        return ""


def feed(text: str, stop: tuple[str, ...]) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(), stop)  # type: ignore[arg-type]
    pieces = []
    for letter in text:
        pieces.append(stream.push(ord(letter)))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


def test_text_ends_before_a_stop_string() -> None:
    pieces, stream = feed("one two END three", ("END",))
    assert "".join(pieces) == stream.text == "one two "
    assert stream.stopped


def test_the_beginning_of_a_stop_string_is_held_until_it_is_certain() -> None:
    pieces, stream = feed("aENb", ("END",))
    assert pieces == ["a", "", "", "ENb", ""]
    assert not stream.stopped


def test_what_is_held_comes_out_at_the_end() -> None:
    assert feed("aEN", ("END",))[0] == ["a", "", "", "EN"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    pieces, stream = feed(text, tuple(stop))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    seen = text[: ends[0]] if ends else text
    expected = seen[: min((seen.find(s) for s in stop if s in seen), default=len(seen))]
    assert "".join(pieces) == expected
    assert stream.stopped == bool(ends)


def test_no_piece_ever_shows_a_part_of_the_stop_string_that_follows() -> None:
    stream = TextStream(Letters(), ("stop",))  # type: ignore[arg-type]
    assert "".join(stream.push(ord(c)) for c in "go stop") == "go "


@pytest.mark.parametrize("stop", [(), ("%",)])
def test_with_a_real_tokenizer(stop: tuple[str, ...], model_path: Callable[[str], Path]) -> None:
    stream = TextStream(Tokenizer.from_directory(model_path("llama_text")).stream(), stop)
    assert "".join(stream.push(i) for i in (2, 3, 4)) == "#$" + ("" if stop else "%")
