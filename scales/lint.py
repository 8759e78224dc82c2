"""What is wrong with a scale table, or looks so. An error makes the served model wrong; a warning costs accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantbench.scales.statistics import BINS, Statistics
from quantbench.scales.table import DIVISORS, Entry, ScaleTable
from quantbench.vocabulary import VariantPlan

# Which linears read a tap; the runtime fuses them, so their static scales are one number.
FUSED: dict[str, tuple[str, ...]] = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_in": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "down_in": ("mlp.down_proj",),
}
SATURATION_LIMIT = 1e-3  # share of values beyond the range
ROUNDED_AWAY_LIMIT = 0.9  # share of values that become code 0


@dataclass(frozen=True)
class Finding:
    severity: str  # "error" | "warning"
    name: str  # entry of the table, or layer
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.message}"


def lint_table(
    table: ScaleTable, variant: VariantPlan | None = None, statistics: Mapping[str, Statistics] | None = None
) -> list[Finding]:
    """All findings, errors first. With `variant`, entries that its plan needs must be there. With `statistics`
    ("model.layers.0.attn_in" -> Statistics behind the transforms), ranges are compared with what was seen.
    """
    found = [f for entry in table for f in (*_numbers(entry), *_dead(entry), *_range(entry))]
    found += _untied(table)
    if variant is not None:
        found += _absent(table, variant)
    for entry in table:
        seen = (statistics or {}).get(_tap_of(entry))
        if seen is not None and entry.kind in ("input", "cache") and entry.scale.size:
            found += _against_histogram(entry, seen)
    return sorted(found, key=lambda f: f.severity)


def _numbers(entry: Entry) -> Iterator[Finding]:
    for label, values in (("scale", entry.scale), ("absmax", entry.absmax)):
        bad = {"NaN": np.isnan(values), "infinite": np.isinf(values)}
        if entry.kind != "offset":
            bad["negative"] = values < 0
            bad |= {"zero": values == 0} if label == "scale" else {}
        for word, where in bad.items():
            if where.any():
                first = tuple(int(i) for i in np.argwhere(where)[0])
                yield Finding(
                    "error",
                    entry.name,
                    f"{label} is {word} at {int(where.sum())} of {values.size} places, first {first}",
                )


def _range(entry: Entry) -> Iterator[Finding]:
    """The scale must follow from its range: that is how one flipped number is found."""
    if entry.format not in DIVISORS or entry.zero is not None or not entry.scale.size:
        return
    if entry.scale.shape != entry.absmax.shape:
        yield Finding("error", entry.name, f"scale {entry.scale.shape} and absmax {entry.absmax.shape} differ in shape")
        return
    expected = entry.absmax / np.float32(DIVISORS[entry.format])
    wrong = (np.abs(entry.scale - expected) > 1e-5 * np.abs(expected)) & (entry.scale != 1)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        rule = f"absmax {entry.absmax[at]:.6g} / {DIVISORS[entry.format]:g}"
        yield Finding("error", entry.name, f"scale {entry.scale[at]:.6g} at {at} is not {rule} ({wrong.sum()} such)")


def _dead(entry: Entry) -> Iterator[Finding]:
    zeros = int(np.count_nonzero(entry.absmax == 0))
    if not zeros:
        return
    what = {"input": "only zeros were seen", "cache": "heads saw only zeros", "weight": "units are all zero"}
    word = what.get(entry.kind, "channels saw only zeros")
    yield Finding("warning", entry.name, f"dead: {zeros} of {entry.absmax.size} {word}")


def _untied(table: ScaleTable) -> Iterator[Finding]:
    for block in dict.fromkeys(_block_of(e) for e in table if e.kind in ("input", "weight")):
        for members in FUSED.values():
            inputs = [table.entries[n] for m in members if (n := f"{block}.{m}.input") in table]
            weights = [table.entries[n] for m in members if (n := f"{block}.{m}.weight") in table]
            shared = [e for e in weights if e.format == "fp8_e4m3" and e.granularity == "tensor"]
            for group, what in ((inputs, "input scales"), (shared, "per-tensor FP8 weight scales")):
                if len({(e.granularity, e.scale.tobytes()) for e in group}) > 1:
                    names = ", ".join(e.name.split(".")[-2] for e in group)
                    yield Finding(
                        "error", block, f"{what} of {names} differ, but the fused runtime shares one: tie them"
                    )


def _absent(table: ScaleTable, variant: VariantPlan) -> Iterator[Finding]:
    blocks = dict.fromkeys(n.split(".self_attn.")[0] for n in variant.layers if ".self_attn." in n)
    needed = [f"{p.name}.weight" for p in variant.layers.values() if p.quantized]
    needed += [f"{p.name}.input" for p in variant.layers.values() if p.quantized and p.activations]
    if variant.cache.quantized:
        needed += [f"{block}.self_attn.{part}" for block in blocks for part in ("k_cache", "v_cache")]
    for name in needed:
        if name not in table:
            yield Finding("error", name, "the plan needs this entry and the table has none")


def _against_histogram(entry: Entry, seen: Statistics) -> Iterator[Finding]:
    if seen.histogram is None:
        return
    edges = np.arange(BINS) / BINS * seen.limit[:, None]  # lower edge of every bin, per row
    total = seen.histogram.sum()
    saturated = float(seen.histogram[edges >= entry.absmax[:, None]].sum() / total) if entry.absmax.all() else 0.0
    if saturated > SATURATION_LIMIT:
        yield Finding("warning", entry.name, f"{saturated:.2%} of the values seen are beyond the range and saturate")
    upper = edges + seen.limit[:, None] / BINS
    lost = float(seen.histogram[(upper <= entry.scale[:, None] / 2) & (seen.limit[:, None] > 0)].sum() / total)
    if lost > ROUNDED_AWAY_LIMIT and entry.format != "fp8_e4m3":
        yield Finding(
            "warning",
            entry.name,
            f"{lost:.1%} of the values seen round to 0: few outliers (up to {seen.absmax.max():.4g}) decide the scale; "
            "smooth this input, quantize it dynamically, or leave the layer wide",
        )


def _block_of(entry: Entry) -> str:
    return entry.name.split(".self_attn.")[0].split(".mlp.")[0]


def _tap_of(entry: Entry) -> str:
    if entry.kind == "cache":
        return f"{_block_of(entry)}.{entry.name[-len('k_cache')]}"
    linear = entry.name.removeprefix(_block_of(entry) + ".").rsplit(".", 1)[0]
    return next((f"{_block_of(entry)}.{tap}" for tap, members in FUSED.items() if linear in members), "")


def errors(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.severity == "error"]
