"""What the weight methods and the rotation are worth on a real model, and what they cost in time.

    python benchmarks/methods.py MODEL --blocks 0,10,20,29 --data demo:wikipedia --heldout demo:wikipedia-heldout

Every method quantizes the linears of the chosen blocks with what calibration text shows of their inputs, and is judged
by the error of the linears' outputs on other text, through its Hessian: tr((W - Q) H (W - Q)^T) over that of rounding
to nearest, the geometric mean over the linears and the worst of them. Inputs are those of the float model. Seconds are
of the processor, not of the clock. Rotation is judged by the error of the norms' outputs in int8, with one scale for
all (static) and one per token (dynamic).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np

from quantbench.calibrate.collect import Collect, collect_block
from quantbench.calibrate.data import DataSpec, load_tokens
from quantbench.calibrate.hidden import HiddenStates
from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.models import LINEARS, TAPS
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.autoclip import ClipGrid, clip_range
from quantbench.quantizers.awq import AwqGrid, Reader, awq_scale
from quantbench.quantizers.bias_correction import corrected_bias, input_mean
from quantbench.quantizers.gptq import gptq
from quantbench.quantizers.output_loss import output_loss, round_trip
from quantbench.quantizers.rotation import rotation
from quantbench.quantizers.weight import dequantize_weight
from quantbench.quantizers.weight_range import WeightRange, weight_entry
from quantbench.scales.arrays import F32, F64
from quantbench.scales.statistics import Statistics, scaled
from quantbench.vocabulary import LayerPlan

PLANS = {
    "int4 group 64": LayerPlan("w", "int4", "group", 64),
    "int4 group 64 asymmetric": LayerPlan("w", "int4", "group", 64, symmetric=False),
    "int4 channel": LayerPlan("w", "int4", "channel"),
    "int8 channel": LayerPlan("w", "int8", "channel"),
}
KEPT = 512  # tokens of a norm's output that the rotation is judged on


@dataclass(frozen=True)
class Tap:
    """One input on both texts, and the weights that read it."""

    seen: Statistics
    heldout: Statistics
    weights: dict[str, F32]
    gain: F32 | None = None  # the norm's weight, where the input is a norm's output


Method = Callable[[Tap, LayerPlan], dict[str, F32]]  # the weights as they would be served
Ranger = Callable[[F32, LayerPlan, Statistics], "WeightRange | None"]


def whole(w: F32, plan: LayerPlan, seen: Statistics) -> WeightRange | None:
    return None  # what the plan's weight observer says


def clipped(diagonal: bool) -> Ranger:
    return lambda w, plan, seen: clip_range(w, plan, seen, ClipGrid(diagonal=diagonal))


def nearest(ranger: Ranger = whole, observer: str = "absmax") -> Method:
    def quantize(tap: Tap, plan: LayerPlan) -> dict[str, F32]:
        used = replace(plan, weight_observer=observer)
        return {n: round_trip(w, used, ranger(w, used, tap.seen)) for n, w in tap.weights.items()}

    return quantize


def column_by_column(ranger: Ranger = whole, act_order: bool = True, damping: float = 0.01, sweeps: int = 0) -> Method:
    def one(w: F32, plan: LayerPlan, seen: Statistics) -> F32:
        entry = weight_entry(w, plan, ranger(w, plan, seen))
        return dequantize_weight(gptq(w, entry, seen, act_order, (damping, 1.0), sweeps))

    return lambda tap, plan: {n: one(w, plan, tap.seen) for n, w in tap.weights.items()}


def rescaled(behind: Method, grid: AwqGrid | None = None) -> Method:
    """AWQ, then `behind` on the scaled weights."""

    def quantize(tap: Tap, plan: LayerPlan) -> dict[str, F32]:
        readers = [Reader(n, w, partial(round_trip, plan=plan)) for n, w in tap.weights.items()]
        s = awq_scale(readers, tap.seen, grid).factors
        inner = replace(tap, seen=scaled(tap.seen, 1 / s), weights={n: w * s for n, w in tap.weights.items()})
        return {n: q / s for n, q in behind(inner, plan).items()}

    return quantize


def turned(behind: Method) -> Method:
    """R1 (rotation.py) around `behind`: columns of what reads the residual stream, rows of what writes to it."""

    def read(tap: Tap, gain: F32, r: F64) -> Tap:
        bare = scaled(tap.seen, 1 / gain)
        assert bare.hessian is not None
        weights = {n: ((w * gain) @ r).astype(np.float32) for n, w in tap.weights.items()}
        return replace(tap, seen=replace(bare, hessian=r.T @ bare.hessian @ r), weights=weights)

    def quantize(tap: Tap, plan: LayerPlan) -> dict[str, F32]:
        r = rotation(len(tap.gain if tap.gain is not None else next(iter(tap.weights.values())))).matrix
        if tap.gain is not None:
            return {n: (q @ r.T / tap.gain).astype(np.float32) for n, q in behind(read(tap, tap.gain, r), plan).items()}
        inner = replace(tap, weights={n: (r.T @ w).astype(np.float32) for n, w in tap.weights.items()})
        return {n: (r @ q).astype(np.float32) for n, q in behind(inner, plan).items()}

    return quantize


METHODS: dict[str, Method] = {
    "rtn": nearest(),
    "mse": nearest(observer="mse"),
    "clip diagonal": nearest(clipped(True)),
    "clip": nearest(clipped(False)),
    "awq": rescaled(nearest()),
    "awq, all rows": rescaled(nearest(), AwqGrid(rows=0)),
    "awq, clip": rescaled(nearest(clipped(False))),
    "gptq": column_by_column(),
    "gptq, no act_order": column_by_column(act_order=False),
    "gptq, damping 10 %": column_by_column(damping=0.1),
    "gptq, 4 sweeps": column_by_column(sweeps=4),
    "gptq, damping 10 %, 4 sweeps": column_by_column(damping=0.1, sweeps=4),
    "clip diagonal, gptq": column_by_column(clipped(True)),
    "clip, gptq": column_by_column(clipped(False)),
    "awq, gptq": rescaled(column_by_column()),
    "awq, clip, gptq": rescaled(column_by_column(clipped(False))),
    "rotated, rtn": turned(nearest()),
    "rotated, clip": turned(nearest(clipped(False))),
    "rotated, gptq": turned(column_by_column()),
    "rotated, clip, gptq": turned(column_by_column(clipped(False))),
    "rotated, clip, gptq, damping 10 %": turned(column_by_column(clipped(False), damping=0.1)),
    "rotated, clip, gptq, damping 10 %, 4 sweeps": turned(column_by_column(clipped(False), damping=0.1, sweeps=4)),
}


@dataclass
class Measured:
    """Per linear: output error on the held-out text, and that error behind bias correction; seconds over all."""

    loss: dict[str, float] = field(default_factory=dict)
    corrected: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def blocks(
    source: ModelSource, layers: list[int], spec: DataSpec
) -> Iterator[tuple[dict[str, Statistics], dict[str, F32]]]:
    """Statistics with Hessians, and some of the inputs, of every chosen block on one text; the float model runs."""
    tokens = load_tokens(spec, source.tokenizer())
    forward = PaddleForward.of(source, threads=1)  # one batch after another: the first tokens are always the same
    hidden = HiddenStates.start(forward.embed(tokens.ids), tokens.lengths)
    for layer in range(max(layers) + 1):
        kept: dict[str, F32] = {}

        def keep(tap: str, x: F32, kept: dict[str, F32] = kept) -> None:
            if tap in ("attn_in", "mlp_in"):
                kept.setdefault(tap, x[:KEPT].copy())

        taps = TAPS if layer in layers else ()
        options, replaced = Collect(taps=taps, hessian=taps), keep if taps else None
        seen, hidden = collect_block(forward, layer, source.float_block(layer), hidden, options, replace=replaced)
        hidden.commit()
        if taps:
            yield seen, kept


def measure(taps: dict[str, Tap], plan: LayerPlan, method: Method) -> Measured:
    found = Measured()
    for place, tap in taps.items():
        begin = time.process_time()
        served = method(tap, plan)
        found.seconds += time.process_time() - begin
        hessian, tokens = tap.heldout.hessian, tap.heldout.tokens
        assert hessian is not None
        mean = input_mean(tap.heldout)
        for name, w in tap.weights.items():
            q = served[name]
            bias = corrected_bias(w, q, input_mean(tap.seen)).astype(np.float64)
            loss = output_loss(w, q, hessian)
            found.loss[f"{place}.{name}"] = loss
            cross = bias @ ((w - q).astype(np.float64) @ mean)  # sum over tokens of |e - b|^2, e = (W - Q) x
            found.corrected[f"{place}.{name}"] = loss + tokens * float(bias @ bias - 2 * cross)
    return found


def int8_error(x: F32, dynamic: bool) -> float:
    """Relative squared error of x [T, C] in int8."""
    codes, scale = quantize_activation(x, "int8", None if dynamic else float(np.abs(x).max()) / 127)
    error = codes * (scale[:, None] if dynamic else scale) - x
    return float(np.square(error, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


def rotated(inputs: dict[str, tuple[F32, F32]], turn: F64) -> dict[str, dict[str, float]]:
    """Per norm: int8 error of its output with the norm's weight in it, folded away, and folded away and rotated."""
    found = {}
    for place, (x, gain) in inputs.items():
        bare = x / np.where(gain == 0, np.float32(1), gain)
        forms = {"norm": x, "folded": bare, "rotated": (bare @ turn).astype(np.float32)}
        found[place] = {
            f"{n} {'dynamic' if d else 'static'}": int8_error(a, d) for n, a in forms.items() for d in (0, 1)
        }
    return found


def summary(found: Measured, base: Measured) -> dict[str, float]:
    ratios = np.array([found.loss[n] / base.loss[n] for n in base.loss])
    corrected = np.array([found.corrected[n] / found.loss[n] for n in found.loss])
    return {
        "loss": float(np.exp(np.log(ratios).mean())),
        "worst": float(ratios.max()),
        "bias_corrected": float(np.exp(np.log(corrected).mean())),
        "seconds": found.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", default="0,10,20,29")
    parser.add_argument("--data", default="demo:wikipedia")
    parser.add_argument("--heldout", default="demo:wikipedia-heldout")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source, layers = open_model(args.model), [int(i) for i in args.blocks.split(",")]
    taps: dict[str, Tap] = {}
    norms: dict[str, tuple[F32, F32]] = {}
    both = zip(*(blocks(source, layers, DataSpec(data=d)) for d in (args.data, args.heldout)), strict=True)
    for layer, ((seen, _), (heldout, inputs)) in zip(sorted(layers), both, strict=True):
        weights = source.float_block(layer)
        for tap in TAPS:
            readers = {line.name: weights[f"{line.name}.weight"] for line in LINEARS if line.tap == tap}
            source_weight = weights[f"{next(line.source for line in LINEARS if line.tap == tap)}.weight"]
            gain = source_weight if source_weight.ndim == 1 else None
            taps[f"{layer} {tap}"] = Tap(seen[tap], heldout[tap], readers, gain)
            if gain is not None:
                norms[f"{layer} {tap}"] = inputs[tap], gain
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "model": source.name,
        "blocks": sorted(layers),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "plans": {},
    }
    for label in args.plans.split(","):
        base = measure(taps, PLANS[label], METHODS["rtn"])
        result["plans"][label] = {
            name: summary(measure(taps, PLANS[label], METHODS[name]), base) for name in args.methods.split(";")
        }
    turn = rotation(source.config.hidden_size)
    result["rotation"] = {"construction": turn.construction, "norms": rotated(norms, turn.matrix)}
    print(json.dumps(result) if args.json else table(result))


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}, blocks {result['blocks']}, {result['date']}, numpy {result['numpy']}", ""]
    for label, methods in result["plans"].items():
        lines += [f"| {label} | error / rtn | worst linear | bias corrected | seconds |", "|---|---|---|---|---|"]
        lines += [
            f"| {n} | {m['loss']:.3f} | {m['worst']:.2f} | x {m['bias_corrected']:.3f} | {m['seconds']:.1f} |"
            for n, m in methods.items()
        ] + [""]
    places = result["rotation"]["norms"]
    columns = list(next(iter(places.values())))
    lines += [f"| int8 error, {result['rotation']['construction']} | {' | '.join(columns)} |", "|---" * 7 + "|"]
    lines += [f"| {p} | " + " | ".join(f"{e[c]:.2e}" for c in columns) + " |" for p, e in places.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
