"""Reads a run folder: every file that a finished stage left there, and the names of those that are not there.

A stage that was switched off leaves no file, and the report says so; a file that is there but damaged is an error
that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from quantbench.errors import CheckpointError
from quantbench.reports import files
from quantbench.reports.arrays import ScaleEntry, Taps, bytes_by_kind, read_stream, read_table

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Everything the report is made of. None = that stage left no file."""

    path: Path
    recipe: dict[str, Any] | None = None
    plan: files.Plan | None = None
    accuracy: files.Accuracy | None = None
    throughput: files.Throughput | None = None
    parity: files.Parity | None = None
    gates: list[files.Gate] = field(default_factory=list)
    scales: dict[str, dict[str, ScaleEntry]] = field(default_factory=dict)
    statistics: dict[str, Taps] = field(default_factory=dict)  # "" = the float stream, else a variant's own
    stages: dict[str, dict[str, list[files.Stage]]] = field(default_factory=dict)  # variant -> linear -> its stages
    weights_by_kind: dict[str, dict[str, int]] = field(default_factory=dict)  # variant -> kind -> bytes on disk
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def variants(self) -> list[str]:
        """Baseline first, then the recipe's order."""
        names: dict[str, None] = {}
        if self.accuracy is not None:
            names[self.accuracy.baseline] = None
        for source in (self.plan, self.throughput, self.parity):
            names.update(dict.fromkeys(source.variants if source is not None else ()))
        for measure in self._measures():
            names.update(dict.fromkeys(measure))
        names.update(dict.fromkeys(self.scales))
        return list(names)

    def _measures(self) -> Iterator[Any]:
        if self.accuracy is not None:
            for group in (self.accuracy.perplexity, self.accuracy.divergence, self.accuracy.choices):
                yield from (measure.variants for measure in group)

    def taps(self, variant: str) -> Taps:
        """The ranges this variant saw: its own stream where one was recorded, else the float stream."""
        return self.statistics.get(variant) or self.statistics.get("", {})


_STAGES = {  # file -> (type, stage that writes it)
    "plan.json": (files.Plan, "plan"),
    "accuracy.json": (files.Accuracy, "validate"),
    "throughput.json": (files.Throughput, "validate"),
    "parity.json": (files.Parity, "validate"),
    "gates.json": (files.Gates, "validate"),
}


def read_run(path: Path | str) -> Run:
    """The run folder at `path`. Raises CheckpointError naming every file that is damaged, all at once."""
    root = Path(path)
    _check_folder(root)
    problems: list[str] = []
    found: dict[str, Any] = {}
    missing: list[str] = []
    for name, (model, stage) in _STAGES.items():
        if not (root / name).is_file():
            missing += [name] if name != "gates.json" else []  # a recipe without gates is complete
            continue
        found[name] = _collect(problems, files.read_json, root / name, model, stage)
    recipe = _collect(problems, _read_recipe, root / "recipe.lock.yaml")
    scales = _read_folders(root / "scales", problems, read_table)
    stages = _read_folders(root / "scales", problems, _read_stages)
    statistics = _read_statistics(root / "statistics", problems)
    kinds = _read_folders(root / "checkpoint", problems, bytes_by_kind)
    if problems:
        raise CheckpointError(*problems)
    missing += [name for name, value in (("scales/", scales), ("statistics/", statistics)) if not value]
    return Run(
        path=root,
        recipe=recipe,
        plan=found.get("plan.json"),
        accuracy=found.get("accuracy.json"),
        throughput=found.get("throughput.json"),
        parity=found.get("parity.json"),
        gates=found["gates.json"].gates if "gates.json" in found else [],
        scales=scales,
        stages=stages,
        statistics=statistics,
        weights_by_kind=kinds,
        missing=tuple(missing),
    )


def _collect(problems: list[str], read: Callable[..., T], *arguments: Any) -> T | None:
    try:
        return read(*arguments)
    except CheckpointError as error:
        problems.extend(error.problems)
        return None


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give a run folder, as written by `quantbench calibrate RECIPE`")
    known = ("recipe.lock.yaml", *_STAGES)
    if not any((root / name).is_file() for name in known):
        raise CheckpointError(
            f"{root}: not a run folder: it holds none of {', '.join(known)}; "
            "give the folder named by `output:` in the recipe"
        )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a YAML file ({' '.join(str(error).split())}); run the recipe again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a mapping; run the recipe again")
    return content


def _read_stages(folder: Path) -> dict[str, list[files.Stage]]:
    """Of a variant's folder of scales; nothing where an earlier version of quantbench wrote it."""
    path = folder / "diagnosis.json"
    return files.read_json(path, files.Diagnosis, "choose").layers if path.is_file() else {}


def _read_folders(root: Path, problems: list[str], read: Callable[[Path], T | None]) -> dict[str, T]:
    """{variant: read(folder)} of the folders of `root`, without those that hold nothing to read."""
    found: dict[str, T] = {}
    for folder in sorted(root.glob("[!.]*/")) if root.is_dir() else ():
        value = _collect(problems, read, folder)
        if value:
            found[folder.name] = value
    return found


def _read_statistics(root: Path, problems: list[str]) -> dict[str, Taps]:
    streams = {"": _collect(problems, read_stream, root)} if root.is_dir() else {}
    streams |= _read_folders(root, problems, read_stream)
    return {name: taps for name, taps in streams.items() if taps}
