"""Plain paragraphs out of a MediaWiki XML dump: running text only, no tables, lists, templates or references.

The rules are fixed, because published perplexities were measured on exactly this text: a paragraph is a line of at
least 120 characters that starts no list, heading or table and in which no markup is left; an article needs three.
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Callable
from pathlib import Path

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_DROPPED = (  # in this order, once each
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<ref[^>/]*/>"),
    re.compile(r"<ref.*?</ref>", re.DOTALL),
    re.compile(r"<(math|gallery|timeline|source|pre|code)[^>]*>.*?</\1>", re.DOTALL),
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_MEDIA_LINK = re.compile(r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*\]\]")
_LINK = re.compile(r"\[\[(?![^\]]*(?:File|Image):)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_URL = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_QUOTES = re.compile(r"'{2,}")
_TAG = re.compile(r"<[^>]+>")
_EMPTY_BRACKETS = re.compile(r"\(\s*[;,]?\s*\)")  # what a dropped pronunciation leaves behind
_SPACE_BEFORE = re.compile(r"\s+([,.;])")
_LEFT_OVER = re.compile(r"[{}\[\]|]|\w+=")
_SHORTEST, _FEWEST = 120, 3


def articles(dump: Path) -> list[str]:
    """Every article of a .bz2 dump that has enough text: its title as ` = Title =`, then paragraphs, blank lines
    between. Redirects are left out.
    """
    with bz2.open(dump, "rt", encoding="utf-8") as file:
        pages = _PAGE.findall(file.read())
    found = []
    for title, text in pages:
        if text.lstrip().upper().startswith("#REDIRECT"):
            continue
        lines = paragraphs(text)
        if len(lines) >= _FEWEST:
            found.append("\n\n".join([f" = {html.unescape(title)} =", *lines]))
    return found


def paragraphs(markup: str) -> list[str]:
    """The paragraphs of one article's wiki markup (XML-escaped, as a dump holds it)."""
    lines = (_tidy(line) for line in _plain(html.unescape(markup)).split("\n"))
    return [
        line for line in lines if len(line) >= _SHORTEST and line[0] not in "*#:;|!{}=" and not _LEFT_OVER.search(line)
    ]


def _plain(text: str) -> str:
    for pattern in _DROPPED:
        text = pattern.sub("", text)
    text = _until_stable(text, 8, lambda t: _TABLE.sub("", _TEMPLATE.sub("", t)))  # innermost first
    text = _until_stable(text, 4, lambda t: _LINK.sub(r"\1", _MEDIA_LINK.sub("", t)))
    return _TAG.sub("", _QUOTES.sub("", _URL.sub(r"\1", text)))


def _until_stable(text: str, rounds: int, step: Callable[[str], str]) -> str:
    for _ in range(rounds):
        stripped = step(text)
        if stripped == text:
            break
        text = stripped
    return text


def _tidy(line: str) -> str:
    line = re.sub(r"\s+", " ", line).strip()
    return _SPACE_BEFORE.sub(r"\1", _EMPTY_BRACKETS.sub("", line))
