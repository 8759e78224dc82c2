"""The recipes that come with quantbench. Name = file name under presets/ = what `quantbench calibrate NAME` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantbench.errors import RecipeError, unknown

_FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """One bundled recipe. `summary` is the first comment of its file."""

    name: str
    path: Path
    summary: str


def list_presets() -> list[Preset]:
    """Every bundled recipe, by name."""
    return [Preset(p.stem, p, _summary(p)) for p in sorted(_FOLDER.glob("*.yaml"))]


def preset_path(name: str) -> Path:
    """Where the bundled recipe `name` lies. Raises RecipeError naming the known ones."""
    known = {p.name: p.path for p in list_presets()}
    if name not in known:
        raise RecipeError(unknown("bundled recipe", name, known))
    return known[name]


def _summary(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()
