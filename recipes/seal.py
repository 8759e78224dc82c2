"""The `lock:` section of a recipe.lock.yaml: what the run used, and a hash that shows whether the words were edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "lock"
_TYPES = {"recipe_sha256": str, "model_sha256": str, "data_sha256": str, "versions": dict}


@dataclass(frozen=True)
class Seal:
    """sha256 of the model and of the calibration tokens, and versions of the libraries."""

    model_sha256: str
    data_sha256: str
    versions: dict[str, str] = field(default_factory=dict)

    def changed_inputs(self, now: Seal) -> list[str]:
        """How the model and the calibration tokens differ, one line each."""
        pairs = [("model", self.model_sha256, now.model_sha256)]
        pairs += [("calibration tokens", self.data_sha256, now.data_sha256)]
        return [f"sha256 of the {name} was {then}, is {now_}" for name, then, now_ in pairs if then != now_]

    def changed_versions(self, now: Seal) -> list[str]:
        """How the libraries differ, one line each."""
        names = sorted(self.versions.keys() | now.versions.keys())
        pairs = [(name, self.versions.get(name, "absent"), now.versions.get(name, "absent")) for name in names]
        return [f"version of {name} was {old}, is {new}" for name, old, new in pairs if old != new]


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
