"""`--set a.b=c` on the command line: one word of the recipe, written over the file's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quantbench.recipes.source import Document, Path, parse

_LONG = 60  # characters of an option that a message repeats
_EXAMPLE = "write --set weights.group_size=32 or --set modes='[bf16, a8w8]'"


def apply_overrides(document: Document, options: Sequence[str]) -> None:
    """Write each `path=value` into the document, in order; the value is YAML. Mistakes join `document.problems`."""
    for option in options:
        name, sign, text = option.partition("=")
        label = f"--set {option}" if len(option) <= _LONG else f"--set {name}=…"
        path = _path(name.strip())
        if not sign or not path:
            document.problems.append(f"{label}: not of the form key=value; {_EXAMPLE}")
            continue
        value = parse(f"value: {text}", label)
        if value.problems:
            document.problems.append(f"{label}: {value.problems[0].split(': ', 1)[1]}")
            continue
        problem = _write(document.tree, path, value.tree["value"])
        if problem:
            document.problems.append(f"{label}: {problem}")
            continue
        _forget(document, path)
        document.source.overrides[path] = label


def _path(name: str) -> Path:
    """`rules[0].mode` or `rules.0.mode` -> ("rules", 0, "mode")."""
    parts = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    return () if "" in parts else tuple(int(p) if p.isdigit() else p for p in parts)


def _write(tree: dict[str, Any], path: Path, value: Any) -> str | None:
    """Put `value` at `path`, making the mappings on the way. Returns what is wrong, or None."""
    at: Any = tree
    for i, part in enumerate(path):
        here = ".".join(map(str, path[:i]))
        if isinstance(part, int) != isinstance(at, list):
            found = "a list, so a number must follow" if isinstance(at, list) else "not a list"
            return f"{here} is {found}; {_EXAMPLE}" if here else f"a recipe has no key {part!r}; {_EXAMPLE}"
        if isinstance(part, int) and part >= len(at):
            return f"{here} has {len(at)} items, counted from 0"
        if i == len(path) - 1:
            at[part] = value
            return None
        at = _step(at, part)
        if at is None:
            return f"{'.'.join(map(str, path[: i + 1]))} is a plain word, not a mapping; set it as a whole"
    return None


def _step(at: Any, part: str | int) -> Any:
    """The container below `part`; an absent, empty or `off` section becomes a mapping. None: a plain word."""
    below = at[part] if isinstance(part, int) else at.get(part)
    if below is None or below == "off" or below is False:
        below = at[part] = {}
    return below if isinstance(below, (dict, list)) else None


def _forget(document: Document, path: Path) -> None:
    """Lines below an overridden path are no longer where its words come from."""
    lines = document.source.lines
    for old in [p for p in lines if p[: len(path)] == path]:
        del lines[old]
    for old in [p for p in document.source.overrides if p[: len(path)] == path]:
        del document.source.overrides[old]
