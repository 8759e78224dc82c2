"""docs/results.md, and the figures that `quantbench recipes` tells, from benchmarks/results/methods.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
REACHED = ROOT / "recipes" / "presets" / "reached.json"
Record = dict[str, Any]
COLUMNS = (
    "mode and method", "preset", "perplexity", "increase (95 %)", "of RTN's loss recovered", "KL", "top-1", "MB",
    "linears, MB", "calibration, s", "peak, GB",
)  # fmt: skip
INTRO = """\
# Results: every method, mode and model

Made by `python benchmarks/served.py page` from `benchmarks/results/methods.json`, which `python benchmarks/served.py
run` writes: edit neither. A preset runs with `quantbench calibrate NAME`, on another model with `--set model=PATH`.

Every line is one recipe: calibrated in a process of its own, exported, and the exported bytes served by the runtime.
{text} KL is against the float32 model in nats per token.
The interval of the increase is a paired bootstrap over windows; it also says how far two lines must be apart to differ.
The first line of a mode rounds to nearest with absmax ranges and no transforms; *recovered* is the share of its
perplexity increase that a method takes back. MB (10^6 bytes) are of the checkpoint's tensors, and of the linears of its
blocks with their scales. Calibration is the time of the whole process on the clock, from its start to the finished
checkpoint, imports, reading and writing included, and the most memory it held;
{calibration} unless the line says otherwise.
"""


def write_page(results: Path, page: Path = PAGE, reached: Path = REACHED) -> None:
    found = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(page_of(found), encoding="utf-8")
    reached.write_text(json.dumps(reached_of(found), indent=1) + "\n", encoding="utf-8")


def page_of(found: Record) -> str:
    text, asked = found["text"], found["calibration"]
    lines = [
        INTRO.format(
            text=f"Text: the first {text['tokens']:,} predictions of `{text['data']}` at context {text['context']}.",
            calibration=f"{asked['samples']} x {asked['length']} tokens of `{asked['data']}`",
        )
    ]
    for records in models(found):
        first = records[0]
        lines += [f"## {first['title']}", "", f"float32: perplexity {first['baseline_perplexity']:.2f}.", ""]
        lines += [row(COLUMNS), row(["---", "---", *["---:"] * (len(COLUMNS) - 2)])]
        lines += [row(cells(r, found["entries"].get(r["rtn"]))) for r in records]
        lines += ["", *conditions(records), ""]
    if peers := found.get("peers"):
        lines += ["## Another tool, measured apart", "", row(list(peers[0])), row(["---"] * len(peers[0]))]
        lines += [row([str(v) for v in peer.values()]) for peer in peers] + [""]
    return "\n".join(lines)


def models(found: Record) -> Iterator[list[Record]]:
    """The records of every model, rounding to nearest first in its mode, then the best last."""
    names = dict.fromkeys(r["model"] for r in found["entries"].values())
    for name in names:
        records = [r for r in found["entries"].values() if r["model"] == name]
        yield sorted(records, key=lambda r: (r["rtn"], not plain(r), -r["increase"]))


def plain(record: Record) -> bool:
    return bool(f"{record['model']}/{record['name']}" == record["rtn"])


def cells(r: Record, rtn: Record | None) -> list[str]:
    low, high = r["increase_interval"] or (r["increase"], r["increase"])
    share = recovered(r, rtn)
    return [
        f"**{r['mode']}**: {r['method']}" if plain(r) else r["method"] + calibration_words(r),
        "" if plain(r) else f"`{r['name']}`",
        f"{r['perplexity']:.2f}",
        f"{r['increase']:+.2%} ({low:+.1%} to {high:+.1%})",
        "" if share is None else f"{share:.0%}",
        f"{r['kl']:.4f}",
        f"{r['top1']:.1%}",
        f"{r['bytes'] / 1e6:.1f}",
        f"{r['linear_bytes'] / 1e6:.1f}",
        f"{r['calibration_s']:.0f}",
        f"{r['calibration_peak_rss_bytes'] / 1e9:.2f}",
    ]


def recovered(r: Record, rtn: Record | None) -> float | None:
    """Share of the perplexity increase of rounding to nearest that is gone; None where there is nothing to compare."""
    if rtn is None or plain(r) or rtn["increase"] <= 0:
        return None
    return 1 - float(r["increase"]) / float(rtn["increase"])


def calibration_words(r: Record) -> str:
    asked = {"samples": 64, "length": 256} | r["words"].get("calibration", {})
    return (
        "" if (asked["samples"], asked["length"]) == (32, 256) else f"; {asked['samples']} x {asked['length']} tokens"
    )


def conditions(records: Sequence[Record]) -> list[str]:
    """One line per machine and set of versions that the records were measured with."""
    told: dict[str, list[str]] = {}
    for r in records:
        m, versions = r["machine"], ", ".join(f"{k} {v}" for k, v in r["versions"].items())
        where = f"{m['cpu']}, {m['threads']} threads, {m['isa']}, {m['memory_bytes'] / 2**30:.0f} GiB, "
        told.setdefault(f"{where}Python {m['python']}, {versions}", []).append(r["date"])
    return [f"Measured {' to '.join(sorted({min(days), max(days)}))} on {where}." for where, days in told.items()]


def reached_of(found: Record) -> dict[str, list[Record]]:
    """Preset -> what it reached, model by model, as recipes/bundled.py reads it."""
    reached: dict[str, list[Record]] = {}
    for r in found["entries"].values():
        if not plain(r):
            rtn = found["entries"].get(r["rtn"])
            kept = ("mode", "title", "family", "increase", "increase_interval", "kl", "top1", "bytes", "date")
            about = {k: r[k] for k in kept} | {"rtn_increase": rtn["increase"] if rtn else None}
            reached.setdefault(r["name"], []).append(about)
    return dict(sorted(reached.items()))


def row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
