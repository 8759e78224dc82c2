"""The `lock:` section of a recipe.lock.yaml: what the run used, and a hash that shows whether the words were edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantbench.recipes.source import Document

KEY = "lock"


@dataclass(frozen=True)
class Seal:
    """sha256 of the model's files and of every text (by its name in the recipe), and versions of the libraries."""

    model_sha256: str
    data_sha256: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def section(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """What is written under `lock:` beside `words`."""
        return {"recipe_sha256": _digest(words), **asdict(self)}


def take_seal(document: Document) -> Seal | None:
    """Remove the `lock:` section of a document and return it; None where there is none.

    A section that is not one of ours, or that no longer fits the words beside it, joins `document.problems`.
    """
    if KEY not in document.tree:
        return None
    section = document.tree.pop(KEY)
    fields = ("model_sha256", "data_sha256", "versions")
    if not isinstance(section, dict) or set(section) != {"recipe_sha256", *fields}:
        keys = ", ".join(("recipe_sha256", *fields))
        document.problems.append(document.source.problem((KEY,), f"not a lock of quantbench, which has {keys}"))
        return None
    if section["recipe_sha256"] != _digest(document.tree):
        why = "the recipe was edited after it was locked. Remove the `lock:` section to use it as a recipe of its own"
        document.problems.append(document.source.problem((KEY, "recipe_sha256"), why))
    return Seal(*(section[name] for name in fields))


def _digest(words: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
