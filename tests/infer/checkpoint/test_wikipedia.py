"""Wiki markup to running text."""

from __future__ import annotations

import bz2
import html

import pytest

from quantbench.infer.checkpoint.wikipedia import articles, paragraphs

LONG = (
    "This sentence is long enough to be kept, because it says the same thing a second time, then a third time, "
    "and then goes on for a while. "
)
assert len(LONG.strip()) > 120


def page(title: str, text: str | None = None) -> str:
    body = "\n".join([LONG * 2] * 3) if text is None else text
    return f"<page><title>{title}</title><text xml:space='preserve'>{html.escape(body)}</text></page>\n"


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''bold''' and ''it''", "bold and it"),
        ("[[Target|shown]] and [[plain]]", "shown and plain"),
        ("[[File:x.png|thumb|a [[nested]] caption]]", ""),
        ("[[de:Deutsch]][[Category:Things]]", ""),
        ("a {{template|with {{another}} inside}} b", "a b"),
        ("a<ref name=x/> b<ref>gone</ref> c<!-- gone -->", "a b c"),
        ("a <math>x^2</math> b", "a b"),
        ("[http://example.org the site]", "the site"),
        ("a ({{IPA|x}}; ) b", "a b"),
        ("a <b>tag</b> , b", "a tag, b"),
        ("A & B", "A & B"),
    ],
)
def test_markup_is_removed(markup, plain):
    found = paragraphs(html.escape(LONG + markup))
    assert [" ".join(p.split()) for p in found] == [" ".join((LONG + plain).split())]


@pytest.mark.parametrize("start", ["*", "#", ":", ";", "|", "!", "="])
def test_lists_and_headings_are_dropped(start):
    assert paragraphs(start + LONG * 2) == []


def test_what_is_short_or_still_marked_up_is_dropped():
    assert paragraphs("Too short.") == []
    assert paragraphs(LONG * 2 + "align=left") == []
    assert paragraphs(LONG * 2 + "{{open") == []
    assert paragraphs("{|\n|" + LONG * 2 + "\n|}") == []


def test_articles_need_three_paragraphs_and_redirects_have_none(tmp_path):
    dump = (
        page("Kept &amp; good") + page("Two", "\n".join([LONG * 2] * 2)) + page("R", "#redirect [[Kept]]\n" + LONG * 9)
    )
    (tmp_path / "dump.bz2").write_bytes(bz2.compress(dump.encode()))
    found = articles(tmp_path / "dump.bz2")
    assert found == ["\n\n".join([" = Kept & good =", *[(LONG * 2).strip()] * 3])]
