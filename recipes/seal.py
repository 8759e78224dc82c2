"""The `lock:` section of a recipe.lock.yaml: what the run used, and a hash that shows whether the words were edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quantbench.recipes.source import Document, Seal

KEY = "lock"
_TYPES = {"recipe_sha256": str, "model_sha256": str, "data_sha256": str, "versions": dict}


def section_of(seal: Seal, words: Mapping[str, Any]) -> dict[str, Any]:
    """What is written under `lock:` beside `words`."""
    return {"recipe_sha256": _digest(words), **asdict(seal)}


def take_seal(document: Document) -> None:
    """Move the `lock:` section of a document, if it has one, to its source.

    A section that is not one of ours, or that no longer fits the words beside it, joins `document.problems`.
    """
    if KEY not in document.tree:
        return
    section = document.tree.pop(KEY)
    if not isinstance(section, dict) or {k: type(v) for k, v in section.items()} != _TYPES:
        why = f"not a lock of quantbench, which holds {', '.join(_TYPES)}"
        document.problems.append(document.source.problem((KEY,), why))
        return
    if section.pop("recipe_sha256") != _digest(document.tree):
        why = "the recipe was edited after it was locked. Remove the `lock:` section to use it as a recipe of its own"
        document.problems.append(document.source.problem((KEY, "recipe_sha256"), why))
    document.source.seal = Seal(**section)


def _digest(words: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
