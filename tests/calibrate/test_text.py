from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from quantbench.calibrate.text import Document, documents
from quantbench.errors import DataError

TURNS = ({"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."})


def write_lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def read(data: str, **options: Any) -> list[Document]:
    return list(documents(data, **options))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    assert read(str(tmp_path / "a.txt")) == [Document("one\n\ntwo\nthree\n")]


def test_rows_of_text_and_empty_ones(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": " "}, {"text": None}, {"text": "two"})
    assert read(path) == [Document("one"), Document("two")]


def test_another_text_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "one", "text": "not this"})
    assert read(path, text_field="body") == [Document("one")]
    with pytest.raises(DataError, match=r"a\.jsonl: no field 'title'\. It has: body, text"):
        read(path, text_field="title")


@pytest.mark.parametrize(
    "row",
    [
        {"src": "a?", "tgt": "b."},
        {"src": ["a?"], "tgt": ["b."]},
        {"prompt": "a?", "completion": "b."},
        {"messages": list(TURNS)},
    ],
)
def test_every_form_of_chat(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(write_lines(tmp_path / "a.json", row)) == [Document("a?\nb.", TURNS)]


def test_turns_of_a_longer_conversation_alternate(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.json", {"src": ["a?", "c?"], "tgt": ["b.", "d."]})
    assert [turn["content"] for turn in read(path)[0].messages] == ["a?", "b.", "c?", "d."]
    assert [turn["role"] for turn in read(path)[0].messages] == ["user", "assistant"] * 2


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(str(tmp_path / "a.parquet"))
    assert read(str(tmp_path / "a.parquet")) == [Document("one"), Document("two")]


def test_a_directory_in_paddlenlp_style(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.json", {"src": "train", "tgt": ""})
    assert read(str(tmp_path))[0].messages[0]["content"] == "train"
    write_lines(tmp_path / "quant.json", {"src": "quant", "tgt": ""})
    assert read(str(tmp_path))[0].messages[0]["content"] == "quant"


def test_a_directory_without_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither quant\.json nor train\.json"):
        read(str(tmp_path))


def test_python_topics_need_no_file() -> None:
    found = read("python:topics")
    assert len(found) > 50
    assert sum(len(d.text) for d in found) > 300_000


def test_demo_text_that_was_not_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="demo:wikipedia is not on this machine yet"):
        read("demo:wikipedia")
    with pytest.raises(DataError, match="demo:wiki"):
        read("demo:wiki")


@pytest.mark.parametrize("name", ["absent.txt", "./absent", "/absent/dir", "a/b/c"])
def test_a_file_that_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        read(name)


def test_an_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: cannot read \.csv\. Known: \.txt, \.md, \.jsonl, \.json, \.parquet"):
        read(str(tmp_path / "a.csv"))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read as json"):
        read(str(tmp_path / "a.jsonl"))


def test_rows_without_any_text_list_their_fields(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no field to read text from \(it has: id, title\)\. Known: text, .* text_field"
    ):
        read(write_lines(tmp_path / "a.jsonl", {"id": 1, "title": "x"}))


def test_a_hub_name_that_is_not_cached_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        DataError, match=r"someone/something: not a file here, .* Nothing is downloaded unasked: fetch it"
    ):
        read("someone/something")
