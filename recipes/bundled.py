"""The recipes that come with quantbench. Name = file name under presets/ = what `quantbench calibrate NAME` takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from quantbench.errors import RecipeError, unknown

_FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Reached:
    """What a preset reached on one model, served. Increases are of the perplexity over float32: 0.03 = +3 %."""

    mode: str  # "a8w8, static"
    title: str  # of the model
    family: str
    increase: float
    increase_interval: tuple[float, float] | None
    rtn_increase: float | None  # of rounding to nearest in the same mode
    kl: float  # nats per token
    top1: float
    bytes: int  # of the checkpoint's tensors
    date: str

    def __str__(self) -> str:
        beside = "" if self.rtn_increase is None else f" (round to nearest {self.rtn_increase:+.1%})"
        return (
            f"{self.mode}, {self.title} ({self.family}): perplexity {self.increase:+.2%}{beside}, KL {self.kl:.4f}, "
            f"top-1 {self.top1:.1%}, {self.bytes / 1e6:.0f} MB, {self.date}"
        )


@dataclass(frozen=True)
class Preset:
    """One bundled recipe. `summary` is the first comment of its file; `families` are those that a comment
    "# families: llama, qwen2" at the beginning of a line names, none where it is for all; `reached` is what it was
    measured to reach, model by model: presets/reached.json, which benchmarks/served.py writes."""

    name: str
    path: Path
    summary: str
    families: tuple[str, ...] = ()
    reached: tuple[Reached, ...] = ()


def list_presets() -> list[Preset]:
    """Every bundled recipe, by name."""
    reached = _reached(_FOLDER / "reached.json")
    found = sorted(_FOLDER.glob("*.yaml"))
    return [Preset(p.stem, p, _summary(p), _families(p), reached.get(p.stem, ())) for p in found]


def preset_path(name: str) -> Path:
    """Where the bundled recipe `name` lies. Raises RecipeError naming the known ones."""
    known = {p.name: p.path for p in list_presets()}
    if name not in known:
        raise RecipeError(unknown("bundled recipe", name, known))
    return known[name]


def _summary(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()


def _families(path: Path) -> tuple[str, ...]:
    found = re.search(r"^# families: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(word.strip() for word in found[1].split(",")) if found else ()


def _reached(path: Path) -> dict[str, tuple[Reached, ...]]:
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: tuple(Reached(**row) for row in found) for name, found in rows.items()}
