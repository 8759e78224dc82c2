"""What a float model must contain, compared with what is there: every difference in one list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantbench.infer.checkpoint.shard import DTYPES, TensorStore

FLOATS = frozenset(DTYPES[code] for code in ("F32", "BF16", "F16"))
# Buffers that older exporters stored beside the weights; they carry nothing.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|self_attn\.(masked_)?bias$|^model\.rotary_emb\.")
_SHOWN = 20


def harmless(name: str, tied: bool) -> bool:
    """Extra tensors that are tolerated by name: rotary buffers, and a copy of the head where it is tied."""
    return bool(_HARMLESS.search(name)) or (tied and name == "lm_head.weight")


def tensor_problems(
    store: TensorStore,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, frozenset[np.dtype[Any]]],
    tied: bool,
) -> list[str]:
    """One line per missing, extra, misshapen or mistyped tensor. `dtypes` defaults to the float ones where silent."""
    stored = set(store.names())
    problems = [
        f"tensor {name} is missing; expected shape {list(shapes[name])}" for name in sorted(set(shapes) - stored)
    ]
    extra = sorted(name for name in stored - set(shapes) if not harmless(name, tied))
    problems += [f"tensor {name} is not part of this architecture" for name in extra]
    for name in sorted(stored & set(shapes)):
        if not _same_shape(store.shape(name), tuple(shapes[name])):
            problems.append(f"tensor {name} has shape {list(store.shape(name))}, expected {list(shapes[name])}")
        allowed = dtypes.get(name, FLOATS)
        if store.dtype(name) not in allowed:
            known = ", ".join(sorted(d.name for d in allowed))
            problems.append(f"tensor {name} is {store.dtype(name).name}; allowed: {known}")
    return problems


def _same_shape(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal; a single number may be stored as [1] or as a scalar."""
    return stored == expected or {stored, expected} <= {(), (1,)}


def shown(where: object, problems: list[str]) -> list[str]:
    """The problems with their place, cut after the first twenty with a count of the others."""
    lines = [f"{where}: {problem}" for problem in problems[:_SHOWN]]
    rest = len(problems) - _SHOWN
    return [*lines, f"{where}: and {rest} more problems of this kind"] if rest > 0 else lines
