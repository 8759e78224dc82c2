from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quantbench.errors import CheckpointError
from quantbench.scales.table import Entry, ScaleTable

F32 = np.float32


def entry(name: str = "model.layers.0.mlp.up_proj.weight", scale: float = 2.0, zero: bool = False) -> Entry:
    values = np.array([[scale], [1.0]], F32)
    return Entry(
        name, "weight", "int8", "channel", values, np.array([[1], [-2]], np.int32) if zero else None,
        values * F32(127), None, "absmax", "absmax of 2 channels", 0.25,
    )  # fmt: skip


def dynamic(name: str) -> Entry:
    none = np.empty(0, F32)
    return Entry(name, "input", "int8", "token", none, None, none, None, "dynamic", "one scale per token", None)


def table() -> ScaleTable:
    result = ScaleTable()
    for item in (entry("b.weight"), entry("a.weight", zero=True), dynamic("b.input")):
        result.add(item)
    return result


def test_a_saved_table_comes_back_in_order_and_the_bytes_repeat(tmp_path: Path) -> None:
    table().save(tmp_path / "one")
    again = ScaleTable.load(tmp_path / "one")
    assert list(again.entries) == ["b.weight", "a.weight", "b.input"]
    for old, new in zip(table(), again, strict=True):
        assert (old.reason, old.loss, old.group_size) == (new.reason, new.loss, new.group_size)
        assert np.array_equal(old.scale, new.scale)
        assert np.array_equal(old.absmax, new.absmax)
        assert (old.zero is None) == (new.zero is None)
    again.save(tmp_path / "two")
    for name in ("scales.json", "scales.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["scales.json", "scales.safetensors"]


def test_scales_json_says_what_people_read(tmp_path: Path) -> None:
    table().save(tmp_path)
    fields = json.loads((tmp_path / "scales.json").read_text())["entries"]["b.weight"]
    assert fields == {
        "kind": "weight", "format": "int8", "granularity": "channel", "observer": "absmax",
        "reason": "absmax of 2 channels", "loss": 0.25, "group_size": None, "shape": [2, 1],
    }  # fmt: skip


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    ScaleTable().save(tmp_path)
    assert not ScaleTable.load(tmp_path).entries


def test_merge_joins_blocks_and_refuses_two_owners() -> None:
    one, two = ScaleTable(), ScaleTable()
    one.add(entry("a.weight"))
    two.add(entry("b.weight"))
    assert list(ScaleTable.merge(one, two).entries) == ["a.weight", "b.weight"]
    with pytest.raises(CheckpointError, match=r"a\.weight: decided twice"):
        ScaleTable.merge(one, one)


def test_an_absent_entry_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"no entry 'c.weight' \(3 others\)"):
        table()["c.weight"]


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    table().save(tmp_path)
    path = tmp_path / "scales.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"is not the file that scales.json describes"):
        ScaleTable.load(tmp_path)


@pytest.mark.parametrize("missing", ["scales.json", "scales.safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, missing: str) -> None:
    table().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match="the scale table cannot be read"):
        ScaleTable.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": 1}'])
def test_damaged_json_is_refused(tmp_path: Path, text: str) -> None:
    table().save(tmp_path)
    (tmp_path / "scales.json").write_text(text)
    with pytest.raises(CheckpointError, match="the scale table cannot be read"):
        ScaleTable.load(tmp_path)


def test_every_inconsistency_is_listed_at_once(tmp_path: Path) -> None:
    table().save(tmp_path)
    path = tmp_path / "scales.json"
    document = json.loads(path.read_text())
    entries = document["entries"]
    del entries["b.weight"]["reason"]
    entries["b.input"]["kind"] = "bias"
    entries["c.weight"] = dict(entries["a.weight"])
    entries["a.weight"]["shape"] = [3, 1]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as error:
        ScaleTable.load(tmp_path)
    said = [problem.split("scales.json: ", 1)[1] for problem in error.value.problems]
    assert said == [
        "b.weight: without reason",
        "a.weight: scale has shape [2, 1], scales.json says [3, 1]",
        "b.input: kind 'bias' is not one of weight, input, cache, transform, offset",
        "c.weight: scales.safetensors has no c.weight.scale, c.weight.absmax",
    ]


def test_arrays_without_an_entry_are_refused(tmp_path: Path) -> None:
    table().save(tmp_path)
    path = tmp_path / "scales.json"
    document = json.loads(path.read_text())
    del document["entries"]["a.weight"]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"a\.weight\.absmax: no entry in scales.json"):
        ScaleTable.load(tmp_path)
