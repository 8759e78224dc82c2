"""From the files of a run to one dictionary, report.json. docs/report.md describes every key."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantbench.reports import advice, ranges
from quantbench.reports.gather import Run
from quantbench.reports.layers import LayerFacts, layer_facts
from quantbench.reports.stages import sqnr_db, variant_stages
from quantbench.reports.summary import variant_record
from quantbench.reports.verdict import verdict

SCHEMA = 1


def build_report(run: Run) -> dict[str, Any]:
    """The report of `run`: JSON values only, the same dictionary for the same files."""
    baseline = _baseline(run)
    variants: dict[str, Any] = {}
    findings: list[advice.Finding] = []
    for name in run.variants:
        record = variant_record(run, name, baseline)
        layers = layer_facts(run, name)
        found = _findings(run, name, record, layers)
        findings += found
        record["gates"] = [gate.model_dump() for gate in run.gates if gate.variant == name]
        record["layers"] = {layer.name: asdict(layer) | {"worst_db": layer.worst_db} for layer in layers}
        record["worst"] = _worst(layers, found)
        record["stages"] = variant_stages({layer.name: layer.stages for layer in layers if layer.stages})
        variants[name] = record
    findings.sort(key=lambda f: advice.SEVERITIES.index(f.severity))
    report = {
        "schema": SCHEMA,
        "passed": all(gate.passed for gate in run.gates),
        "run": {"name": run.name, "path": run.path.as_posix(), "model": _model(run), "baseline": baseline},
        "conditions": _conditions(run),
        "verdict": {},
        "gates": [gate.model_dump() for gate in run.gates],
        "variants": variants,
        "findings": [finding.as_dict() for finding in findings],
        "ranges": ranges.tap_ranges(run),
        "cache_ranges": ranges.cache_ranges(run),
        "forecast": run.plan.forecast if run.plan else {},
        "missing": list(run.missing),
        "files": _files(run),
    }
    report["verdict"] = verdict(report)
    finite: dict[str, Any] = _finite(report)
    return finite


def write_json(report: dict[str, Any], path: Path) -> Path:
    """Writes `report` as JSON to `path`, in one step."""
    return write_text(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """`text` at `path` in one step: a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)
    return path


def _baseline(run: Run) -> str | None:
    """What deltas are against: accuracy.json says; without it, the first float variant that was timed."""
    if run.accuracy is not None:
        return run.accuracy.baseline
    if run.throughput is not None and run.throughput.baseline is not None:
        return run.throughput.baseline
    timed = run.throughput.variants if run.throughput else {}
    return next((name for name in ("fp32", "bf16", "fp16") if name in timed), None)


def _findings(run: Run, name: str, record: dict[str, Any], layers: list[LayerFacts]) -> list[advice.Finding]:
    of_layers = advice.layer_findings(name, layers)
    caches = {
        entry.name: sqnr_db(entry.about.loss)
        for entry in run.scales.get(name, {}).values()
        if entry.about.kind == "cache"
    }
    single = [advice.accuracy_finding(name, record, layers), advice.cache_finding(name, caches)]
    return [
        *(finding for finding in single if finding is not None),
        *advice.parity_findings(name, record),
        *of_layers,
        *advice.slow_findings(name, record),
    ]


def _worst(layers: list[LayerFacts], findings: list[advice.Finding]) -> list[dict[str, Any]]:
    """The layers with the lowest SQNR, one per shared input, with what to try where a rule has something to say."""
    ranked = sorted((layer for layer in layers if layer.worst_db is not None), key=lambda x: (x.worst_db, x.name))
    chosen: dict[object, LayerFacts] = {}
    for layer in ranked:
        by_input = layer.worst_db != layer.weight_sqnr_db and layer.tap is not None
        chosen.setdefault((layer.block, layer.tap) if by_input else layer.name, layer)
    said = {finding.layer: finding for finding in reversed(findings) if finding.layer}
    return [
        {
            "layer": layer.name,
            "worst_db": layer.worst_db,
            "because": _because(layer),
            "output_sqnr_db": layer.output_sqnr_db,
            "output_sqnr_db_before": layer.stages[0].output_sqnr_db if layer.stages else None,
            "what": said[layer.name].what if layer.name in said else None,
            "severity": said[layer.name].severity if layer.name in said else "ok",
            "try": list(said[layer.name].advice) if layer.name in said else [],
        }
        for layer in list(chosen.values())[: advice.WORST_SHOWN]
    ]


def _because(layer: LayerFacts) -> str:
    if layer.worst_db == layer.weight_sqnr_db:
        return "weight"
    return "input" if layer.worst_db == layer.input_sqnr_db else "outlier"


def _model(run: Run) -> str | None:
    for source in (run.plan.model if run.plan else None, (run.recipe or {}).get("model")):
        if isinstance(source, dict):
            source = source.get("name") or source.get("path")
        if source:
            return str(source)
    return None


def _conditions(run: Run) -> dict[str, Any]:
    """Under which these numbers hold; `compare` refuses to rank runs where they differ."""
    scored, timed, recipe = run.accuracy, run.throughput, run.recipe or {}
    return {
        "calibration": recipe.get("calibration"),
        "perplexity": [
            m.model_dump(include={"data", "tokens", "context"}) for m in (scored.perplexity if scored else [])
        ],
        "divergence": [m.model_dump(include={"data", "tokens"}) for m in (scored.divergence if scored else [])],
        "choices": [m.model_dump(include={"data", "questions"}) for m in (scored.choices if scored else [])],
        "machine": timed.machine if timed else None,
        "throughput": timed.model_dump(include={"prompt", "output", "rounds"}) if timed else None,
        "ceilings": timed.ceilings if timed else {},
    }


_DESCRIBED = {
    "report.html": "this report as a page",
    "report.json": "this report for programs",
    "recipe.lock.yaml": "the recipe with every default, reproduces the run",
    "plan.json": "what was decided for every layer, and by which rule",
}


def _files(run: Run) -> list[dict[str, str]]:
    """Where to find what, relative to the run folder."""
    found = [
        {"path": f"checkpoint/{name}", "holds": f"{name}: Hugging Face directory, ready to load"}
        for name in run.variants
        if (run.path / "checkpoint" / name).is_dir()
    ]
    found += [{"path": f"scales/{name}", "holds": f"{name}: scale tables"} for name in run.scales]
    return found + [{"path": name, "holds": text} for name, text in _DESCRIBED.items()]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
