"""Documents from a file, a directory, a hub data set that is already here, or text that ships with a package.

file.txt                    one document
file.jsonl .json .parquet   one document a row: a text column, chat `messages`, `prompt`/`completion` or `src`/`tgt`
directory                   PaddleNLP's layout: quant.json, else train.json
org/name                    a hub data set in the local cache; nothing is downloaded
demo:wikipedia  demo:wikipedia-heldout      articles of the gensim package, never the same on both sides
python:topics               Python's own help topics, no download
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantbench.errors import DataError

_BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_FIELDS = ("text", "content")
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Document:
    """One piece of text: plain, or the turns of a chat (`{"role", "content"}`)."""

    text: str
    messages: Messages = ()


def documents(data: str, split: str = "train", text_field: str = "text") -> Iterator[Document]:
    """The documents of `data` in stored order, empty ones left out. Raises DataError."""
    if data == "python:topics":
        return (d for d in _topics() if d.text.strip())
    if data.startswith("demo:"):
        return map(Document, _demo(data))
    return (d for row in _rows(data, split) for d in [_document(row, data, text_field)] if d.text.strip())


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    return (Document(topics[name]) for name in sorted(topics))


def _demo(data: str) -> list[str]:
    from quantbench.infer.checkpoint.demo import demo_text

    return demo_text(data)


def _rows(data: str, split: str) -> Iterator[Mapping[str, Any]]:
    path = Path(data)
    if path.is_dir():
        path = _paddlenlp_file(path)
    if path.is_file():
        return _file_rows(path)
    if path.suffix in _BUILDERS or data.count("/") > 1 or data.startswith((".", "/", "~")):
        raise DataError(f"{data}: no such file or directory")
    return _hub_rows(data, split)


def _paddlenlp_file(directory: Path) -> Path:
    for name in ("quant.json", "train.json"):
        if (directory / name).is_file():
            return directory / name
    raise DataError(f"{directory}: has neither quant.json nor train.json. Name the file itself, or add one of them")


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix not in _BUILDERS:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}. Known: {', '.join(_BUILDERS)}"
        )
    builder = _BUILDERS[path.suffix]
    options = {"sample_by": "document"} if builder == "text" else {}
    datasets = import_datasets()
    try:
        # Streaming reads the file where it lies: no copy in a cache, and no stale copy of an edited file.
        yield from datasets.load_dataset(
            builder, data_files={"train": str(path)}, split="train", streaming=True, **options
        )
    except (ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: cannot be read as {builder} ({_first_line(error)})") from error


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    datasets = import_datasets()
    try:
        rows = datasets.load_dataset(name, split=split)
    except (ConnectionError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: not a file here, and no hub data set of that name with split {split!r} is in the local cache "
            f"({_first_line(error)}). Nothing is downloaded unasked: fetch it once with "
            f"python -c \"import datasets; datasets.load_dataset('{name}', split='{split}')\", or name a file"
        ) from error
    yield from rows


def import_datasets() -> Any:
    """The `datasets` module, offline and without bars: it must never reach for the network by itself."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    import datasets

    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, DataError says
    return datasets


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _document(row: Mapping[str, Any], data: str, text_field: str) -> Document:
    if text_field != "text":
        if text_field not in row:
            raise DataError(f"{data}: no field {text_field!r}. It has: {', '.join(sorted(row))}")
        return Document(str(row[text_field] or ""))
    if "messages" in row:
        turns: Messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"])
        return _chat(turns)
    for asked, answered in (("src", "tgt"), ("prompt", "completion")):
        if asked in row and answered in row:
            return _chat(_turns(row[asked], row[answered]))
    for name in _TEXT_FIELDS:
        if name in row:
            return Document(str(row[name] or ""))
    raise DataError(
        f"{data}: no field to read text from (it has: {', '.join(sorted(row))}). Known: text, content, messages, "
        "src with tgt, prompt with completion. Or set text_field"
    )


def _turns(asked: Any, answered: Any) -> Messages:
    """PaddleNLP's {"src", "tgt"}: strings, or lists of the turns of each side."""
    questions = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    answers = list(answered) if isinstance(answered, (list, tuple)) else [answered]
    turns = []
    for i, question in enumerate(questions):
        turns.append({"role": "user", "content": str(question or "")})
        if i < len(answers):
            turns.append({"role": "assistant", "content": str(answers[i] or "")})
    return tuple(turns)


def _chat(turns: Messages) -> Document:
    return Document("\n".join(turn["content"] for turn in turns), turns)
