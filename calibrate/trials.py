"""What each group of linears costs when it alone is quantized: measured, as KL against the float model.

Every trial is the float model with one group taken from a checkpoint, run by the engine's own operations. A trial
changes nothing before its block, so the float hidden states in front of every block are kept, f32[T, D] each, and a
trial begins there: on average half of the blocks and the head. Memory: the float32 model, T·D floats per block and T·V
for the float log-probabilities.

Behind a transform (smoothing) the other linears of the block are float and transformed: the same float function, so
that what is measured is the quantization of the group and nothing else. The KV cache stays float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from quantbench.calibrate.apply import fold_block
from quantbench.calibrate.rotated import RotatedSource
from quantbench.calibrate.sensitivity import Group, quantized_groups
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.source import LinearWeight, ModelSource
from quantbench.infer.engine import Engine
from quantbench.infer.engine.cache import pages_for
from quantbench.infer.engine.forward import (
    Layer,
    Projection,
    Rows,
    batch_of,
    logits_of,
    rope_tables,
    run_layers,
)
from quantbench.infer.engine.weights import pack_group
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.infer.ops import PAGE
from quantbench.infer.validate.likelihood import divergence, log_softmax, row_chunks
from quantbench.scales.arrays import F32
from quantbench.scales.table import ScaleTable

ROTATION = "model.rotate"  # the entry that tells of a rotation of the whole model
_LARGEST_DRIFT = 1e-3  # relative change of a block's float output that its transforms may make
_UNMEASURABLE = "cannot be measured one by one. Leave that transform out, or use the estimate"


class Trials:
    """The float model on some windows of tokens, ready to have one part replaced."""

    def __init__(self, source: ModelSource, windows: Sequence[Sequence[int]], threads: int | None = None) -> None:
        """Loads `source` in float32 and runs it once. Raises RequestError for ids that the model cannot take."""
        pages = [pages_for(len(w)) for w in windows]
        engine = Engine.load(
            source, "fp32", threads=threads, cache_tokens=sum(pages) * PAGE, max_batch=len(windows), prefix_reuse=False
        )
        self.config, self.ops, self._model = source.config, engine.runner.ops, engine.runner.model
        self._cache = engine.runner.cache.layers
        self._rope = rope_tables(source.config, engine.limits.max_length)
        first = np.cumsum([0, *pages])
        rows = [
            Rows([int(i) for i in w], 0, list(range(start, start + n)))
            for w, start, n in zip(windows, first, pages, strict=False)
        ]
        self._batch = batch_of(rows)
        x = self.ops.embed(self._model.embedding, self._batch.ids)
        self._batch = replace(self._batch, ids=np.arange(len(x), dtype=np.int32))  # rows of a kept hidden state
        self._hidden = [x]
        for layer, block in enumerate(self._model.layers):
            x, delta = self._run(layer, [block])
            assert delta is not None
            self._hidden.append(x + delta)
        self._base = log_softmax(logits_of(self.ops, self._model, self._hidden[-1].copy(), None))

    def layer(self, number: int) -> Layer:
        """The float block, packed."""
        return self._model.layers[number]

    def kl(self, number: int, block: Layer) -> float:
        """Mean KL(float || trial) in nats over all positions, with `block` in the place of block `number`."""
        x, delta = self._run(number, [block, *self._model.layers[number + 1 :]])
        return self._divergence(x, delta, self._model.head)

    def head_kl(self, head: Projection) -> float:
        """The same with `head` in the place of the float head."""
        return self._divergence(self._hidden[-1], None, head)

    def drift(self, number: int, block: Layer) -> float:
        """Relative distance (of norms) between the output of `block` and that of the float block `number`."""
        x, delta = self._run(number, [block])
        assert delta is not None
        after = self._hidden[number + 1]
        return float(np.linalg.norm(x + delta - after) / max(float(np.linalg.norm(after)), 1e-30))

    def _run(self, first: int, layers: Sequence[Layer]) -> tuple[F32, F32 | None]:
        """`layers` on the float hidden states before block `first`: these are the embedding table of the trial."""
        start = self.ops.pack(LinearWeight(block_prefix(first), self._hidden[first], None))
        model = replace(self._model, embedding=start, layers=tuple(layers))
        return run_layers(self.ops, model, self._batch, self._rope, self._cache[first:])

    def _divergence(self, x: F32, delta: F32 | None, head: Projection) -> float:
        model, total = replace(self._model, head=head), 0.0
        for rows in row_chunks(self._base, 1 << 24):  # a part of the logits at a time: 64 MB
            part = slice(rows.start, min(rows.stop, len(x)))
            after = None if delta is None else delta[part]
            logits = logits_of(self.ops, model, x[part].copy(), after)
            total += float(divergence(self._base[part], log_softmax(logits))[0].sum())
        return total / len(x)


def measure(
    trials: Trials, source: ModelSource, checkpoint: ModelSource, table: ScaleTable, tick: Callable[[str], None]
) -> dict[str, float]:
    """Group name -> mean KL in nats, of every group that `checkpoint` holds quantized. `source` is the float model it
    was made from, which `trials` runs: behind a rotation the rotated one. `table` is its scale table, `tick` is told
    each group that is done.

    Raises CalibrationError where a transform also changes what a block hands on, so that the groups have no meaning in
    the float model, and for a checkpoint with a prefix, which the trials have not.
    """
    whole = [e.name for e in table if e.kind == "transform" and not e.name.startswith("model.layers.")]
    if outside := [name for name in whole if name != ROTATION or not isinstance(source, RotatedSource)]:
        raise CalibrationError(f"{outside[0]} transforms more than one block: groups {_UNMEASURABLE}")
    if checkpoint.prefix is not None:
        raise CalibrationError(f"{checkpoint.name} has a prefix, without which its groups {_UNMEASURABLE}")
    found: dict[str, float] = {}
    blocks: dict[int, Layer] = {}
    for group in quantized_groups(checkpoint):
        linears = [checkpoint.linear(name) for name in group.linears]
        if group.layer is None:
            found[group.name] = trials.head_kl(pack_group(trials.ops, linears))
        else:
            if group.layer not in blocks:
                blocks = {group.layer: float_block(trials, source, group.layer, table)}
            found[group.name] = trials.kl(group.layer, with_group(trials, blocks[group.layer], group, linears))
        tick(group.name)
    return found


def with_group(trials: Trials, block: Layer, group: Group, linears: Sequence[LinearWeight]) -> Layer:
    """`block` with the linears of one group replaced."""
    changes: dict[str, Any] = {group.fused: pack_group(trials.ops, list(linears))}  # groups are fields of Layer
    return replace(block, **changes)


def float_block(trials: Trials, source: ModelSource, number: int, table: ScaleTable) -> Layer:
    """The float block behind the transforms that `table` holds for it; the block itself where there are none."""
    plain = trials.layer(number)
    prefix = f"{block_prefix(number)}."
    if not any(e.kind in ("transform", "offset") and e.name.startswith(prefix) for e in table):
        return plain
    folded = fold_block(number, source.float_block(number), table, source.config)
    groups: dict[str, Any] = {
        kind: _packed(trials, folded, kind) for kind in dict.fromkeys(line.fused for line in LINEARS)
    }
    block = replace(
        plain,
        attn_norm=folded["input_layernorm.weight"],
        mlp_norm=folded["post_attention_layernorm.weight"],
        **groups,
    )
    drift = trials.drift(number, block)
    if not drift <= _LARGEST_DRIFT:
        raise CalibrationError(
            f"{block_prefix(number)}: its transforms change what the float block hands on by {drift:.2g} (at most "
            f"{_LARGEST_DRIFT:g}): its groups {_UNMEASURABLE}"
        )
    return block


def _packed(trials: Trials, folded: Mapping[str, F32], kind: str) -> Projection:
    names = [line.name for line in LINEARS if line.fused == kind]
    return pack_group(trials.ops, [LinearWeight(n, folded[f"{n}.weight"], folded.get(f"{n}.bias")) for n in names])
