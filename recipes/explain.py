"""Turn pydantic's findings into the one-line complaints of a recipe."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from quantbench.errors import unknown
from quantbench.recipes.sections import Section
from quantbench.recipes.source import Path

_EXPECTED = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "bool_type": "true or false",
    "bool_parsing": "true or false", "string_type": "text", "tuple_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "model_attributes_type": "a mapping",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "more than"), "less_than": ("lt", "less than"),
}  # fmt: skip


def explain(error: ValidationError, root: type[BaseModel]) -> list[tuple[Path, str]]:
    """Path and sentence of every finding."""
    found = error.errors(include_url=False)
    paths = [tuple(e["loc"]) for e in found]
    return [(at, _sentence(e, root)) for e, at in zip(found, paths, strict=True) if not _echo(e["type"], at, paths)]


def _echo(kind: str, at: Path, paths: list[Path]) -> bool:
    """A list whose items are all wrong is also reported as too short."""
    return kind == "too_short" and any(len(p) > len(at) and p[: len(at)] == at for p in paths)


def _sentence(e: Any, root: type[BaseModel]) -> str:
    kind, ctx, value = e["type"], e.get("ctx", {}), e.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(tuple(e["loc"]), root)
    if kind == "missing":
        return f"required: {_description(tuple(e['loc']), root)}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {ctx[name]:g}, got {value!r}"
    if kind == "finite_number":
        return f"must be a finite number, got {value!r}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_shown(value)}{_keys(kind, tuple(e['loc']), root)}"
    return str(e["msg"])


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, (list, tuple)):
        return "a list"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _keys(kind: str, loc: Path, root: type[BaseModel]) -> str:
    model = model_at(root, loc) if kind.startswith("model") else None
    return f". Keys: {', '.join(model.model_fields)}" if model else ""


def _unknown_key(loc: Path, root: type[BaseModel]) -> str:
    model = model_at(root, loc[:-1])
    if model is None or not issubclass(model, Section):
        return f"unknown key {loc[-1]!r}"
    return unknown(model.key_kind, str(loc[-1]), model.model_fields)


def _description(loc: Path, root: type[BaseModel]) -> str:
    model = model_at(root, loc[:-1])
    text = model.model_fields[str(loc[-1])].description if model else None
    return (text or "it has no default").removesuffix(" Required.")


def model_at(root: type[BaseModel], loc: Path) -> type[BaseModel] | None:
    """The section that stands at a path of the recipe, or None where a plain value does."""
    found: Any = root
    for part in loc:
        if _is_model(found):
            field = found.model_fields.get(part)
            found = plain(field.annotation) if field else None
        else:  # an item of a list, a value of a mapping
            items = [a for a in typing.get_args(found) if a is not Ellipsis]
            found = plain(items[-1]) if items else None
    return found if _is_model(found) else None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def plain(kind: Any) -> Any:
    """Without Annotated and `| None`."""
    while typing.get_origin(kind) in (typing.Annotated, typing.Union, types.UnionType):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    return kind
