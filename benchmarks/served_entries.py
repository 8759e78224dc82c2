"""Which recipes `served.py` runs on a model: every preset that quantizes one variant, and its plain counterpart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from quantbench.recipes.bundled import Preset, list_presets
from quantbench.recipes.load import load_recipe
from quantbench.recipes.source import Dumper, parse
from quantbench.vocabulary import MODES

CALIBRATION = {"data": "demo:wikipedia", "samples": 32, "length": 256, "seed": 0}
UNMEASURED = {"throughput": "off", "parity": "off"}
RTN = "round to nearest"
Words = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One recipe on one model. `rtn`: the entry to compare with, itself where it is one."""

    model: str  # as it is called in the results
    name: str  # of the preset, or "rtn-" and the mode
    mode: str  # "a8w8, static"
    method: str
    rtn: str
    words: Words  # the recipe, without model and output

    @property
    def key(self) -> str:
        return f"{self.model}/{self.name}"


def entries(model: str, family: str) -> list[Entry]:
    """Everything that is run on a model of `family`: counterparts first, presets of one mode behind their own."""
    found: dict[str, list[Entry]] = {}
    for preset in list_presets():
        words = single(preset)
        if words is None or (preset.families and family not in preset.families):
            continue
        plain, mode = counterpart(words), mode_of(words)
        rtn = f"rtn-{mode.replace(', ', '-').replace(' ', '')}"
        group = found.setdefault(rtn, [Entry(model, rtn, mode, RTN, f"{model}/{rtn}", plain)])
        if (method := method_of(words)) != RTN:
            group.append(Entry(model, preset.name, mode, method, f"{model}/{rtn}", words))
    return [entry for _, group in sorted(found.items()) for entry in group]


def single(preset: Preset) -> Words | None:
    """The words of a preset that quantizes one variant, without its float columns and what is measured of it; None for
    a preset that compares several, or that says nothing of the calibration text used here."""
    words: Words = parse(preset.path.read_text(encoding="utf-8"), preset.name).tree
    modes = [m if isinstance(m, dict) else {"mode": m} for m in words.get("modes", ["a8w8"])]
    quantized = [m for m in modes if MODES[m["mode"]].quantized]
    if len(quantized) != 1 or words.get("calibration", {}).get("data") != CALIBRATION["data"]:
        return None
    kept = {k: v for k, v in words.items() if k not in ("model", "output", "gates", "accuracy", *UNMEASURED)}
    return kept | {"modes": [{"name": "served", **quantized[0]}]}


def counterpart(words: Words) -> Words:
    """The same mode by rounding to nearest: no transforms, prefix, rules or method, absmax ranges."""

    def bare(section: Words) -> Words:
        return {k: v for k, v in section.items() if k != "observer"}

    variant = {k: v for k, v in words["modes"][0].items() if k not in ("transforms", "method", "prefix")}
    sections = ("weights", "activations", "cache_kv")
    variant |= {k: bare(variant[k]) for k in sections if k in variant}
    kept = {k: bare(words[k]) for k in sections if k in words}
    return kept | {"modes": [variant], "calibration": dict(CALIBRATION)}


def mode_of(words: Words) -> str:
    recipe = load_recipe(text_of(words, "-", "-"))
    variant = recipe.modes[0]
    mode, weights = MODES[variant.mode], recipe.variant_weights(variant)
    told = [mode.name]
    if mode.activations:
        told.append("dynamic" if recipe.variant_activations(variant).dynamic else "static")
    if mode.weights == "int4":
        told.append("channels" if weights.granularity == "channel" else f"groups of {weights.group_size}")
        told += [] if weights.symmetric else ["asymmetric"]
    if mode.weights == "fp8_e4m3" and weights.granularity in ("channel", "block"):
        told.append(weights.granularity)
    return ", ".join(told)


def method_of(words: Words) -> str:
    """What a recipe does beyond rounding to nearest with absmax ranges, in its own words."""
    variant = words["modes"][0]
    sections = {k: words.get(k, {}) | variant.get(k, {}) for k in ("weights", "activations", "cache_kv")}
    method = variant.get("method", words.get("method", "rtn"))
    prefix = variant.get("prefix", words.get("prefix", "off"))
    told = [] if prefix == "off" else [f"prefix {prefix if isinstance(prefix, str) else len(prefix)}"]
    told += [spoken(t) for t in variant.get("transforms", words.get("transforms", []))]
    ranges = {k.removesuffix("s"): s.get("observer", "absmax") for k, s in sections.items()}
    told += [f"{k} ranges {observer}" for k, observer in ranges.items() if observer != "absmax"]
    told += [spoken(method)] if method != "rtn" else []
    told += ["inputs of the quantized blocks"] if words.get("calibration", {}).get("inputs") == "quantized" else []
    told += [f"{len(words['rules'])} rules"] if words.get("rules") else []
    return " + ".join(told) or RTN


def spoken(word: str | Words) -> str:
    if isinstance(word, str):
        return word
    (name, settings), *_ = word.items()
    told = ", ".join(f"{k} {'-'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in (settings or {}).items())
    return f"{name} ({told})" if told else str(name)


def text_of(words: Words, model: str, output: str) -> str:
    return str(yaml.dump(words | UNMEASURED | {"model": model, "output": output}, Dumper=Dumper, sort_keys=False))
