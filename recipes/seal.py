"""The `lock:` section of a recipe.lock.yaml: what the run used, and a hash that shows whether the words were edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "lock"
_TYPES = {"recipe_sha256": str, "model_sha256": str, "data_sha256": dict, "versions": dict}


@dataclass(frozen=True)
class Seal:
    """sha256 of the model and of the tokens of every text (by its name in the recipe), and versions of libraries."""

    model_sha256: str
    data_sha256: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def changed_inputs(self, now: Seal) -> list[str]:
        """How the model and the texts differ, one line each."""
        return _changed("sha256 of", {"the model": self.model_sha256}, {"the model": now.model_sha256}) + _changed(
            "sha256 of the tokens of", self.data_sha256, now.data_sha256
        )

    def changed_versions(self, now: Seal) -> list[str]:
        """How the libraries differ, one line each."""
        return _changed("version of", self.versions, now.versions)


def _changed(what: str, then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = sorted(then.keys() | now.keys())
    return [
        f"{what} {name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def section_of(seal: Seal, words: Mapping[str, Any]) -> dict[str, Any]:
    """What is written under `lock:` beside `words`."""
    return {"recipe_sha256": _digest(words), **asdict(seal)}


def take_seal(tree: dict[str, Any]) -> tuple[Seal | None, str | None]:
    """Remove the `lock:` section of a parsed recipe and return it, with what is wrong about it.

    Wrong is a section that is not one of ours, or that no longer fits the words beside it.
    """
    if KEY not in tree:
        return None, None
    section = tree.pop(KEY)
    if not isinstance(section, dict) or {k: type(v) for k, v in section.items()} != _TYPES:
        return None, f"not a lock of quantbench, which holds {', '.join(_TYPES)}"
    problem = None
    if section.pop("recipe_sha256") != _digest(tree):
        problem = (
            "the recipe was edited after it was locked. Remove the `lock:` section to use it as a recipe of its own"
        )
    return Seal(**section), problem


def _digest(words: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
