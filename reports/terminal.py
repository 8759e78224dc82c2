"""The report on a screen: verdict, one line per variant, then what is worth a look, and where the files are.

Written for 80 columns. Without a terminal it is plain text: no colours, no box characters, nothing but ASCII of ours.
What is in order is said in one line; every number is in report.json and report.html.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from quantbench.reports.formatting import NONE, decibel, join, percent, plain, times
from quantbench.reports.stages import name_of

_STYLES = {"ok": "bold green", "bad": "bold red", "warn": "yellow"}
_MARKS = {"ok": "OK  ", "bad": "BAD ", "warn": "NOTE"}
_PLAIN = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
SLOW = 1.1  # up to this speedup the engine's reason is printed; below 1 it is a finding

Cell = str | Text


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints every section of `report` (see `build_report`) to `console`, default standard output."""
    console = Console() if console is None else console
    for section in (_verdict, _summary, _speed, _stages, _layers, _findings, _parity, _files):
        section(report, console)


def render_text(report: dict[str, Any], width: int = 80) -> str:
    """The same as plain text of `width` columns."""
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, no_color=True, force_terminal=False))
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A table whose first column is text and the others numbers, under its title. Columns that do not fit are left out
    from the right end of `columns`: put the most important first."""
    console.print(Text(title, style="bold"))
    kept = [list(row) for row in rows]
    count = len(columns)
    made = _table(console, columns[:count], kept)
    while count > 2 and Measurement.get(console, console.options.update(max_width=1000), made).maximum > console.width:
        count -= 1
        made = _table(console, columns[:count], [row[:count] for row in kept])
    console.print(made)


def _table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    lines = box.SIMPLE_HEAD if console.is_terminal and not console.options.ascii_only else _PLAIN
    made = Table(box=lines, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def say(console: Console, level: str, text: str) -> None:
    """One marked sentence, wrapped under itself."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(_MARKS[level], style=_STYLES[level]), Text(text))
    console.print(grid)


def _verdict(report: dict[str, Any], console: Console) -> None:
    for sentence in report["verdict"]["sentences"]:
        say(console, sentence["level"], sentence["text"])
    if report["missing"]:
        say(console, "warn", f"not in this run: {join(report['missing'])}")
    console.print()


def _summary(report: dict[str, Any], console: Console) -> None:
    batch = first_batch(report)
    rows = [
        [Text(cell, style=variant_style(report, name)) for cell in summary_row(name, record, batch)]
        for name, record in report["variants"].items()
    ]
    print_table(console, _title(report, batch), SUMMARY, rows)
    console.print()


SUMMARY = ("variant", "ppl", "increase", "decode", "speedup", "MB", "prefill", "top-1", "KL")


def summary_row(name: str, record: dict[str, Any], batch: str | None) -> list[str]:
    """The cells under SUMMARY: what a variant costs and gains. Decode is at `batch`."""
    perplexity: dict[str, Any] = next(iter(record["accuracy"]["perplexity"]), {})
    divergence: dict[str, Any] = next(iter(record["accuracy"]["divergence"]), {})
    prefill, decode = record["speed"]["prefill"] or {}, record["speed"]["decode"].get(batch) or {}
    checkpoint = record["size"]["checkpoint_bytes"]
    return [
        name,
        plain(perplexity.get("perplexity"), 4),
        "baseline" if record["baseline"] else percent(perplexity.get("increase"), sign=True),
        plain(decode.get("tokens_per_s", {}).get("median")),
        times(decode.get("speedup")),
        plain(checkpoint / 1e6) if checkpoint else NONE,
        plain(prefill.get("tokens_per_s", {}).get("median")),
        percent(divergence.get("top1")),
        plain(divergence.get("kl"), 2),
    ]


def variant_style(report: dict[str, Any], name: str) -> str:
    alarms = (f["severity"] == "bad" for f in report["findings"] if f["variant"] == name)
    failed = (not gate["passed"] for gate in report["variants"][name]["gates"])
    if any(alarms) or any(failed):
        return "red"
    return "bold green" if name == report["verdict"]["best"] else ""


def first_batch(report: dict[str, Any]) -> str | None:
    """The smallest batch that any variant was timed at."""
    batches = {batch for record in report["variants"].values() for batch in record["speed"]["decode"]}
    return min(batches, key=int, default=None)


def _title(report: dict[str, Any], batch: str | None) -> str:
    conditions = report["conditions"]
    told = [str(report["run"]["model"] or report["run"]["name"])]
    told += [f"{m['tokens']:,} tokens of {m['data']}" for m in conditions["perplexity"][:1]]
    if conditions["machine"]:
        machine = conditions["machine"]
        told.append(f"tokens/s on {machine.get('threads', '?')} threads, decode at batch {batch}")
    return "; ".join(told)


def _speed(report: dict[str, Any], console: Console) -> None:
    batches = sorted({b for r in report["variants"].values() for b in r["speed"]["decode"]}, key=int)
    if not batches:
        return
    rows = [
        [name, *(_pace(record["speed"]["decode"].get(batch)) for batch in batches)]
        for name, record in report["variants"].items()
    ]
    print_table(console, "Decode: tokens/s, speedup, share of the ceiling", ["variant", *map(_batch, batches)], rows)
    for name, record in report["variants"].items():
        slow = [d for d in record["speed"]["decode"].values() if d["speedup"] is not None and 1 <= d["speedup"] < SLOW]
        if slow and slow[0]["why"] and not record["baseline"]:
            say(console, "warn", f"{name} at {times(slow[0]['speedup'])}: {slow[0]['why']}")
    console.print()


def _batch(batch: str) -> str:
    return f"batch {batch}"


def _pace(decode: dict[str, Any] | None) -> str:
    if decode is None:
        return NONE
    median, share = plain(decode["tokens_per_s"]["median"]), percent(decode["share_of_ceiling"])
    return f"{median} {times(decode['speedup']):>6} {share:>6}"


def _layers(report: dict[str, Any], console: Console) -> None:
    """Five layers where a layer is suspect, the lowest one elsewhere; of outputs, before the transforms and behind."""
    rows = []
    for name, record in report["variants"].items():
        suspect = any(worst["severity"] != "ok" for worst in record["worst"])
        for worst in record["worst"] if suspect else record["worst"][:1]:
            style = {"bad": "red", "warn": "yellow"}.get(worst["severity"], "")
            cells = (f"{name}  {worst['layer']}", decibel(worst["worst_db"]), worst["because"], _outputs(worst))
            rows.append([Text(cell, style=style) for cell in cells])
    if rows:
        columns = ["variant and layer", "SQNR", "of", "its output"]
        print_table(console, "Lowest signal to quantization noise", columns, rows)
        console.print()


def _outputs(worst: dict[str, Any]) -> str:
    before, now = worst["output_sqnr_db_before"], worst["output_sqnr_db"]
    return decibel(now) if before == now else f"{decibel(before)} to {decibel(now)}"


def _stages(report: dict[str, Any], console: Console) -> None:
    """What every transform did, where there is one."""
    rows = []
    for name, record in report["variants"].items():
        for stage in record["stages"] if len(record["stages"]) > 1 else ():
            numbers = [decibel(stage[f"{kind}_sqnr_db"]) for kind in ("output", "weight", "input", "worst_output")]
            rows.append([f"{name}  {name_of(stage['after'])}", *numbers])
    if rows:
        columns = ["variant and stage", "outputs", "weights", "inputs", "worst output"]
        print_table(console, "Signal to quantization noise, median of the linears", columns, rows)
        console.print()


def _findings(report: dict[str, Any], console: Console) -> None:
    """What each rule found, and once what to try."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        groups.setdefault((finding["variant"], finding["rule"]), []).append(finding)
    for (variant, _), findings in groups.items():
        for finding in findings[:SHOWN]:
            say(console, finding["severity"], f"{variant}: {finding['what']}")
        if len(findings) > SHOWN:
            say(console, findings[-1]["severity"], f"{variant}: and {len(findings) - SHOWN} more like these")
        for line in findings[0]["advice"]:
            _advise(console, line)
        console.print()


def _advise(console: Console, line: str) -> None:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("    ", Text(line, style="dim"))
    console.print(grid)


SHOWN = 3  # findings of one rule and variant; the page has all of them


def _parity(report: dict[str, Any], console: Console) -> None:
    """One line if the served checkpoint computes what was simulated; the findings name what does not."""
    checked = [record["parity"] for record in report["variants"].values() if record["parity"]]
    if not checked:
        return
    different = sum(parity["codes_different"] for parity in checked)
    compared = sum(parity["codes_compared"] for parity in checked)
    lowest = min((p["top1_served_simulated"] for p in checked if p["top1_served_simulated"] is not None), default=None)
    highest = max((p["kl_served_simulated"] for p in checked if p["kl_served_simulated"] is not None), default=None)
    text = f"served against simulated: {different:,} of {compared:,} codes differ"
    text += f", top-1 at least {percent(lowest)}, KL at most {plain(highest, 2)}"
    say(console, "ok" if not _departs(report) else "warn", text)


def _departs(report: dict[str, Any]) -> bool:
    return any(finding["rule"].startswith("parity") for finding in report["findings"])


def _files(report: dict[str, Any], console: Console) -> None:
    folders: dict[str, list[str]] = {}
    for file in report["files"]:
        folder, _, name = file["path"].partition("/")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        listed = f": {', '.join(names)}" if any(names) else ""
        console.print(Text(f"{report['run']['path']}/{folder}{listed}", style="dim"))
