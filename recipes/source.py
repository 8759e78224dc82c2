"""Where each word of a recipe was written, and how a recipe is read from YAML.

The YAML is composed into nodes (which know their lines) and turned into plain values by us, so that every later
complaint can say `recipe.yaml:12`. Words follow YAML 1.2: `on`, `off`, `yes`, `no` and dates are text, and `1e-4` is
a number (YAML 1.1, PyYAML's default, has it the other way round in both cases).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from quantbench.recipes.seal import Seal

Path = tuple[str | int, ...]  # ("rules", 0, "match")


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalar words of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own interface)


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


def _number(loader: Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 012 is twelve
Loader.add_constructor("tag:yaml.org,2002:float", _number)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly the texts which `Loader` would take for something else."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


@dataclass
class Source:
    """Lines of a recipe's words. Never takes part in comparing recipes: where it stands is not what it asks."""

    name: str = field(default="recipe", compare=False)
    lines: dict[Path, int] = field(default_factory=dict, compare=False)
    overrides: dict[Path, str] = field(default_factory=dict, compare=False)  # path -> the `--set` that wrote it
    seal: Seal | None = field(default=None, compare=False)  # of a recipe that was read from a lock

    def where(self, path: Path) -> str:
        """`recipe.yaml:12`, or the `--set` option, of the nearest word at or above `path`."""
        below = next((label for p, label in self.overrides.items() if p[: len(path)] == path), None)
        if below and path not in self.lines:  # a section that only an override has made
            return below
        for n in range(len(path), -1, -1):
            if path[:n] in self.overrides:
                return self.overrides[path[:n]]
            if path[:n] in self.lines:
                return f"{self.name}:{self.lines[path[:n]]}"
        return self.name

    def listed(self, problems: Iterable[tuple[Path, str]]) -> list[str]:
        """One line each, from the top of the file to its end."""
        ordered = sorted(problems, key=lambda p: self._line(self.written(p[0])))
        return [self.problem(path, text) for path, text in ordered]

    def _line(self, path: Path) -> int:
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 0)

    def problem(self, path: Path, text: str) -> str:
        """One line: where, which word, what is wrong."""
        path = self.written(path)
        return f"{self.where(path)}: {dotted(path)}: {text}" if path else f"{self.where(path)}: {text}"

    def written(self, path: Path) -> Path:
        """`gates.variants.a8w8.kl` as the user wrote it: `variants` may be left out there."""
        short = (*path[:1], *path[2:])
        known = self.lines.keys() | self.overrides.keys()
        nested = path[:2] == ("gates", "variants") and len(path) > 2 and path[:2] not in known
        return short if nested else path


@dataclass
class Document:
    """A recipe as plain values, with the source of every word and what was wrong with the YAML itself."""

    tree: dict[str, Any]
    source: Source
    problems: list[str] = field(default_factory=list)


def dotted(path: Path) -> str:
    """("rules", 0, "match") -> "rules[0].match"."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def parse(text: str, name: str) -> Document:
    """Read YAML text. Syntax errors, duplicate keys and a non-mapping end up in `problems`, never as exceptions."""
    try:
        node = yaml.compose(text, Loader)
    except yaml.YAMLError as e:
        return Document({}, Source(name), [_syntax(e, name)])
    if not isinstance(node, yaml.MappingNode):
        return Document({}, Source(name), [f"{name}:1: a recipe is a mapping of keys such as `model: demo:smollm2`"])
    builder = _Builder(name)
    return Document(builder.build(node, ()), builder.source, builder.problems)


def _syntax(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"{name}{line}: not valid YAML: {what}"


class _Builder:
    """Nodes -> values, noting lines and duplicate keys on the way."""

    def __init__(self, name: str) -> None:
        self.source = Source(name)
        self.problems: list[str] = []
        self._open: set[int] = set()  # nodes being built: an alias to one of them would never end
        self._scalars = Loader("")

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.source.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            self.problems.append(self.source.problem(path, "the alias refers to itself"))
            return None
        self._open.add(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.discard(id(node))
        return value

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as e:
            self.problems.append(self.source.problem(path, f"cannot read {node.value!r}: {getattr(e, 'problem', e)}"))
            return None

    def _sequence(self, node: yaml.Node, path: Path) -> list[Any]:
        return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self._scalars.flatten_mapping(node)  # `<<: *anchor`
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in values:
                first = self.source.lines[(*path, key)]
                at = dotted((*path, key))
                self.problems.append(f"{self.source.name}:{line}: {at}: written twice; the first is on line {first}")
                continue
            self.source.lines[(*path, key)] = line
            values[key] = self.build(value_node, (*path, key))
        return values
