from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantbench.scales.diff import diff_tables
from quantbench.scales.table import Entry, ScaleTable

F32 = np.float32
BASE = Entry(
    "a.weight",
    "weight",
    "int8",
    "channel",
    np.array([[1], [2]], F32),
    None,
    np.ones((2, 1), F32),
    None,
    "absmax",
    "",
    0.1,
)


def of(*entries: Entry) -> ScaleTable:
    table = ScaleTable()
    for entry in entries:
        table.add(entry)
    return table


def test_equal_tables_do_not_differ() -> None:
    assert diff_tables(of(BASE), of(replace(BASE, scale=BASE.scale.copy()))) == []


def test_entries_of_one_table_only() -> None:
    other = replace(BASE, name="b.weight")
    assert [str(d) for d in diff_tables(of(BASE), of(other))] == [
        "a.weight: entry: present -> absent",
        "b.weight: entry: absent -> present",
    ]


def test_the_worst_scale_is_shown() -> None:
    (found,) = diff_tables(of(BASE), of(replace(BASE, scale=np.array([[1.001], [1.5]], F32))))
    assert str(found) == "a.weight: scale: 2 -> 1.5 (up to -25.000%)"


def test_a_nan_or_a_zero_is_the_worst() -> None:
    (found,) = diff_tables(of(BASE), of(replace(BASE, scale=np.array([[np.nan], [4]], F32))))
    assert (found.before, found.after) == ("1", "nan")
    (found,) = diff_tables(of(replace(BASE, scale=np.array([[0], [2]], F32))), of(BASE))
    assert (found.before, found.after) == ("0", "1")


def test_words_shape_and_zero_points() -> None:
    changed = replace(BASE, format="int4", group_size=32, scale=np.ones((2, 2), F32))
    assert [d.field for d in diff_tables(of(BASE), of(changed))] == ["format", "group_size", "shape"]
    zeros = replace(BASE, zero=np.zeros((2, 1), np.int32))
    assert [str(d) for d in diff_tables(of(BASE), of(zeros))] == ["a.weight: zero: none -> 2 zero points"]
    assert diff_tables(of(zeros), of(replace(zeros, zero=np.zeros((2, 1), np.int32)))) == []
    assert [d.field for d in diff_tables(of(zeros), of(replace(zeros, zero=np.ones((2, 1), np.int32))))] == ["zero"]
