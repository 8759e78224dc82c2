from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib
import pytest

from quantbench.reports.figures import FLOAT_GREYS, MARKERS, PALETTE, STYLE, canvas, series_of, svg


def drawn(name: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = canvas(4, 3)
        axes.plot([1, 2, 3], marker="o")
        axes.set_title("<title> & more")
        return svg(figure, name, "three points")


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert drawn("a") == drawn("a")


def test_it_is_well_formed_and_scales() -> None:
    root = ElementTree.fromstring(drawn("a").replace('xlink:href="', 'href="'))
    assert root.tag == "svg"
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.find("title") is not None


def test_ids_are_its_own_and_references_reach_them() -> None:
    text = drawn("fig-one")
    root = ElementTree.fromstring(text.replace('xlink:href="', 'href="'))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(name).startswith("fig-one-") for name in ids)
    for element in root.iter():
        for value in element.attrib.values():
            if value.startswith(("#", "url(#")):
                assert value.removeprefix("url(").lstrip("#").rstrip(")") in ids


def test_ink_follows_the_page() -> None:
    text = drawn("a")
    assert "var(--ink)" in text
    assert "var(--line)" in text
    assert "#1a1b1c" not in text
    assert "var(--sans)" in text
    assert "DejaVu" not in text


@pytest.mark.parametrize("count", [1, len(PALETTE), 2 * len(PALETTE) + 1])
def test_variants_are_told_apart_by_colour_and_marker(count: int) -> None:
    variants: dict[str, Any] = {"fp32": {"quantized": False}, "bf16": {"quantized": False}}
    variants |= {f"v{i}": {"quantized": True} for i in range(count)}
    chosen = series_of({"variants": variants})
    assert list(chosen) == list(variants)
    assert chosen["fp32"].color in FLOAT_GREYS
    assert chosen["v0"].color == PALETTE[0]
    if count + 2 <= len(MARKERS):
        assert len({style.marker for style in chosen.values()}) == count + 2
    looks = [(s.color, s.marker, s.dashes) for s in chosen.values()]
    assert count > len(PALETTE) or len(set(looks)) == len(looks)
