"""Chat templates: Jinja2 in a sandbox, with the functions and settings that published templates expect."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantbench.errors import RequestError


def render_chat(template: str, values: dict[str, Any]) -> str:
    """`template` rendered with `values`. Raises RequestError with the template's own complaint (e.g. role order)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _complain, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template).render(**values)
    except jinja2.TemplateError as reason:
        raise RequestError(f"the model's chat template refuses these messages: {reason}") from None


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which the models have never seen.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _complain(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
