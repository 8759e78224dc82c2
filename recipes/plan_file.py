"""plan.json, and the plan as rows for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from quantbench.errors import RecipeError
from quantbench.recipes.forecast import Forecast
from quantbench.recipes.plan import Plan
from quantbench.recipes.rules import HEAD
from quantbench.vocabulary import CachePlan, LayerPlan, VariantPlan, parse_mode


@dataclass(frozen=True)
class PlanRow:
    """Layers of one variant that are treated alike: "blocks 0-10,12-29: gate_proj up_proj"."""

    variant: str
    layers: str
    count: int
    weights: str
    activations: str
    method: str
    rule: str


def plan_json(plan: Plan) -> dict[str, Any]:
    """What plan.json holds."""
    return {
        "model": plan.model,
        "variants": {
            name: {
                "mode": v.mode.name,
                "dtype": v.dtype,
                "cache": asdict(v.cache),
                "transforms": [dict(t) for t in v.transforms],
                "prefix": v.prefix,
                "layers": {layer: asdict(p) for layer, p in v.layers.items()},
            }
            for name, v in plan.variants.items()
        },
        "forecast": asdict(plan.forecast),
    }


def load_plan(path: Path) -> Plan:
    """The plan in a plan.json. Raises RecipeError where the file is absent or is no plan."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        variants = {name: _variant(name, v) for name, v in content["variants"].items()}
        known = {f.name for f in fields(Forecast)}
        return Plan(
            content["model"], variants, Forecast(**{k: v for k, v in content["forecast"].items() if k in known})
        )
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file. `quantbench calibrate` writes it") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not a plan of quantbench: {type(e).__name__}: {e}") from None


def _variant(name: str, v: dict[str, Any]) -> VariantPlan:
    layers = {layer: _layer(p) for layer, p in v["layers"].items()}
    prefix = v.get("prefix", "off")  # plans before it was a word have none
    return VariantPlan(
        name, parse_mode(v["mode"]), v["dtype"], CachePlan(**v["cache"]), layers, tuple(v["transforms"]),
        prefix if isinstance(prefix, str) else tuple(prefix),
    )  # fmt: skip


def _layer(fields: dict[str, Any]) -> LayerPlan:
    """JSON has no tuples: the options' lists become what they were."""
    options = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in fields.get("options", ()))
    return LayerPlan(**fields | {"options": options})


def plan_rows(plan: Plan) -> list[PlanRow]:
    """Every variant's layers, those that are treated alike in one row."""
    return [row for v in plan.variants.values() for row in _variant_rows(v)]


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Every decision and the forecast, for people."""
    console = console or Console()
    for v in plan.variants.values():
        transforms = ", ".join(_transform(t) for t in v.transforms) or "none"
        mode = v.name if v.name == v.mode.name else f"{v.name} ({v.mode.name})"
        prefix = "" if v.prefix == "off" else f", prefix {v.prefix if isinstance(v.prefix, str) else list(v.prefix)}"
        title = f"{mode}: floats {v.dtype}, KV cache {v.cache.format}, transforms {transforms}{prefix}"
        lines = box.SIMPLE_HEAD if console.is_terminal else None  # no line drawing where a program or a log reads
        columns = ("layers", "count", "weights", "inputs", "method", "decided by")
        table = Table(*columns, title=title, title_justify="left", title_style="bold", box=lines, pad_edge=False)
        for row in _variant_rows(v):
            table.add_row(row.layers, str(row.count), row.weights, row.activations, row.method, row.rule)
        console.print(table)
        console.print(f"checkpoint {_size(plan.forecast.checkpoint_bytes[v.name])}\n")
    f = plan.forecast
    where = "on disk" if f.spilled else "in memory"
    console.print(f"memory about {_size(f.memory_bytes)}, hidden states {where}; disk {_size(f.disk_bytes)}")
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in f.seconds_of.items())
    console.print(f"time about {f.seconds:.0f} s ({stages}), on two cores of a recent CPU")


def _transform(transform: dict[str, Any]) -> str:
    return " ".join(f"{name} {' '.join(f'{k} {v}' for k, v in words.items())}" for name, words in transform.items())


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _variant_rows(variant: VariantPlan) -> Iterator[PlanRow]:
    """First the blocks of each kind of layer that are treated alike, then the kinds with the same blocks."""
    blocks: dict[tuple[str, ...], list[int]] = {}  # kind and treatment -> numbers of the blocks
    for p in variant.layers.values():
        block, kind = _split(p.name)
        key = (kind, _weights(p), _activations(p), p.method if p.quantized else "", p.rule)
        blocks.setdefault(key, []).extend([] if block is None else [block])
    kinds: dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]] = {}
    for (kind, *treatment), numbers in blocks.items():
        kinds.setdefault((tuple(numbers), tuple(treatment)), []).append(kind)
    for (where, (weights, inputs, method, rule)), names in kinds.items():
        every = len(names) == len({_split(name)[1] for name in variant.layers} - {HEAD})
        layers = f"blocks {_ranges(where)}: {'all linears' if every else ' '.join(names)}" if where else " ".join(names)
        yield PlanRow(variant.name, layers, max(len(where), 1) * len(names), weights, inputs, method, rule)


def _split(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.mlp.up_proj" -> 3, "up_proj"; "lm_head" -> None, "lm_head"."""
    match = re.search(r"\.(\d+)\.", name)
    return (int(match[1]), name.rpartition(".")[2]) if match else (None, name)


def _weights(p: LayerPlan) -> str:
    if not p.quantized:
        return p.weights
    size = f" {p.group_size}" if p.group_size else ""
    return f"{p.weights} per {p.granularity}{size}{'' if p.symmetric else ', asymmetric'}"


def _activations(p: LayerPlan) -> str:
    if p.activations is None:
        return "float"
    return f"{p.activations} dynamic" if p.dynamic else f"{p.activations} static, {p.activation_observer}"


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, p)) for p in parts)
