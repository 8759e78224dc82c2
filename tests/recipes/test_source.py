"""YAML with line numbers: what is read, what is refused, and where it was."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantbench.recipes.source import Dumper, Source, dotted, parse


def test_lines_are_those_of_the_keys_and_items() -> None:
    document = parse("model: m\nrules:\n  - match: a\n    weights:\n      observer: mse\n  - {match: b}\n", "r.yaml")
    where = document.source.where
    assert where(("model",)) == "r.yaml:1"
    assert where(("rules", 0, "weights", "observer")) == "r.yaml:5"
    assert where(("rules", 1, "match")) == "r.yaml:6"
    assert where(("rules", 1, "absent", "deep")) == "r.yaml:6"
    assert where(("absent",)) == "r.yaml:1"


def test_words_are_those_of_yaml_1_2() -> None:
    tree = parse("a: [on, off, yes, No, 1e-4, 012, 1:30, 2024-01-01, ~, true, 1_000, .inf, '1']", "r").tree
    assert tree["a"] == ["on", "off", "yes", "No", 1e-4, 12, "1:30", "2024-01-01", None, True, "1_000", math.inf, "1"]


def test_anchors_and_merge_keys_work() -> None:
    document = parse("a: &x {k: 1, l: 2}\nb: *x\nc:\n  <<: *x\n  m: 3\n", "r")
    assert document.tree == {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 2}, "c": {"k": 1, "l": 2, "m": 3}}
    assert document.problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: [a\nmodes: b\n", "r:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("model: a\n\tmodes: b\n", "r:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("model: \x00\n", "r: not valid YAML: special characters are not allowed"),
        ("- model\n", "r:1: a recipe is a mapping of keys such as `model: demo:smollm2`"),
        ("", "r:1: a recipe is a mapping of keys such as `model: demo:smollm2`"),
        ("a: 1\nb: {c: 1, c: 2}\n", "r:2: b.c: written twice; the first is on line 2"),
        ("a: 1\nb: 2\na: 3\n", "r:3: a: written twice; the first is on line 1"),
        ("a: &x [*x]\n", "r:1: a[0]: the alias refers to itself"),
        ("a: !!python/name:os.system\n", "r:1: a: cannot read '': could not determine a constructor for the tag"),
        ("a: !!int x\n", "r:1: a: cannot read 'x': invalid literal for int"),
    ],
)
def test_bad_yaml_is_a_problem_with_its_line(text: str, problem: str) -> None:
    (found,) = parse(text, "r").problems
    assert found.startswith(problem)


def test_paths_are_written_as_people_write_them() -> None:
    assert dotted(("rules", 0, "match")) == "rules[0].match"
    assert dotted(("modes", 1)) == "modes[1]"


def test_where_a_recipe_was_written_takes_no_part_in_comparing() -> None:
    assert Source("a", {("x",): 1}) == Source("b")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_TREES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(st.text(), _TREES, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back(tree: dict[str, object]) -> None:
    document = parse(yaml.dump(tree, Dumper=Dumper, sort_keys=False), "r")
    assert document.problems == []
    assert document.tree == tree
