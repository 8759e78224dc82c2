"""The block loop: observe, then settle (decide, write, hand on) while the next block is observed.

    for every block:   weights → statistics/ → scales (work/) → checkpoint shard of every variant → hidden states

Hidden states are committed last, so a run killed at any moment resumes at the block whose hidden states are the
newest, redoes it, and ends with the same bytes. Variants made from the same float model share one stream of hidden
states and one set of statistics: those that do not rotate one, those with equal rotations (or equal prefixes) another.
With `inputs: quantized` every quantized variant walks its own stream, in which block n sees what the quantized block
n-1 puts out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from quantbench.calibrate.apply import apply_block
from quantbench.calibrate.biases import with_biases
from quantbench.calibrate.choose import choose_block, choose_head
from quantbench.calibrate.collect import Collect, advance_block, collect_block
from quantbench.calibrate.diagnosis import Diagnosis, merge_files
from quantbench.calibrate.forward import Float
from quantbench.calibrate.hidden import HiddenStates
from quantbench.calibrate.job import BlockJob, Stream, checkpoint_path, statistics_path, streams, table_folder
from quantbench.calibrate.prefix import Search, folded, of_model, prefix_for, with_prefix
from quantbench.calibrate.rotated import first_hidden, model_of, rotation_table
from quantbench.calibrate.sample import TapSample
from quantbench.calibrate.simulate import quantized_block
from quantbench.calibrate.transforms import Block, Reobserve, Sample, hessian_taps
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.checkpoint.write import CheckpointWriter
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.quantizers.methods import METHODS
from quantbench.scales import statistics as stats
from quantbench.scales.seed import write_seed_tables
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Looks:
    """How a decision may look at the block's data again: statistics behind transforms, and rows (None: it may not)."""

    reobserve: Reobserve
    sample: Sample | None = None


def quantize_blocks(job: BlockJob, tick: Tick) -> None:
    """Run every block of every stream that is not committed yet. `tick` is told each finished block."""
    step = decide_again if job.reuse_statistics else observe_and_decide
    for stream in streams(job):
        for layer in step(job, stream):
            tick(f"block {layer}{' of ' + stream.name if stream.name else ''}")


@dataclass(frozen=True)
class Walk:
    """One stream on its way through the blocks. `job.forward` looks again at a block that is observed already."""

    job: BlockJob
    stream: Stream
    prefix: Prefix | None
    options: Collect
    writers: Mapping[str, CheckpointWriter]


@dataclass(frozen=True)
class Observed:
    """One block: its weights, what was seen, the hidden states before it, and those behind it, not committed yet."""

    weights: Mapping[str, Float]
    seen: dict[str, stats.Statistics]
    hidden: HiddenStates
    after: HiddenStates

    @property
    def layer(self) -> int:
        return self.hidden.layer


def observe_and_decide(job: BlockJob, stream: Stream) -> Iterator[int]:
    """Observe block by block, from the newest committed hidden states on; yields every block as it is settled.

    A block is settled on a thread of its own while the next one is observed, unless that one must see what the settled
    one puts out. Each side has a forward of its own, so two blocks are in memory.
    """
    prefix = prefix_of(job, stream.variants[0], stream.model)
    hidden = start_or_resume(job, stream)
    link_statistics(job, stream)
    yield from range(hidden.layer)
    forward, again = job.forward.behind(prefix), job.forward.behind(prefix)
    options = what_to_observe(job, stream)
    walk = Walk(replace(job, forward=again), stream, prefix, options, writers_of(job, stream))
    settling: Future[HiddenStates] | None = None
    with ThreadPoolExecutor(1) as pool:
        for layer in range(hidden.layer, job.source.config.num_layers):
            weights = stream.model.float_block(layer)
            seen, after = collect_block(forward, layer, weights, hidden, options, advance=not stream.quantized)
            if settling:
                settling.result()
                yield layer - 1
            settling = pool.submit(settle, walk, Observed(weights, seen, hidden, after))
            hidden = settling.result() if stream.quantized else after
        if settling:
            settling.result()
            yield layer


def settle(walk: Walk, block: Observed) -> HiddenStates:
    """Save, decide and write one block, and commit the hidden states that the next one sees; returns them."""
    job, stream, layer = walk.job, walk.stream, block.layer
    seen = with_prefix(block.seen, walk.prefix, layer)
    stats.save(statistics_path(job, stream, layer), seen)
    looks = Looks(partial(observe_again, walk, block), TapSample(job.forward, layer, block.weights, block.hidden))
    decide_and_write(job, walk.writers, layer, block.weights, seen, looks)
    after = hand_on(walk, block) if stream.quantized else block.after
    after.commit()
    return after


def observe_again(
    walk: Walk, block: Observed, factors: Mapping[str, Float], shifts: Mapping[str, Float]
) -> dict[str, stats.Statistics]:
    """Statistics of (tap - shift) · factor: a second look at one block, where they cannot be derived."""
    again = replace(walk.options, taps=tuple({**factors, **shifts}), factors=factors, shifts=shifts)
    seen = collect_block(walk.job.forward, block.layer, block.weights, block.hidden, again, advance=False)[0]
    return with_prefix(seen, walk.prefix, block.layer, factors, shifts)


def decide_again(job: BlockJob, stream: Stream) -> Iterator[int]:
    """Decide and write from the statistics of an earlier run: no forward, so nothing can be observed again."""
    if stream.quantized:
        raise CalibrationError("--from choose: with quantized inputs every block sees the last one: use --from collect")

    def refuse(factors: Mapping[str, Float], shifts: Mapping[str, Float]) -> dict[str, stats.Statistics]:
        raise CalibrationError(
            "--from choose: this recipe needs a second look behind its transforms, for its observer or a shift: use "
            "--from collect, or the absmax observer, whose ranges are derived, and no shift"
        )

    writers = writers_of(job, stream)
    for layer in range(job.source.config.num_layers):
        seen = stats.load(statistics_path(job, stream, layer))
        decide_and_write(job, writers, layer, stream.model.float_block(layer), seen, Looks(refuse))
        yield layer


def start_or_resume(job: BlockJob, stream: Stream) -> HiddenStates:
    """The newest committed hidden states of a stream, or those before block 0."""
    work = stream.folder(job.folder / "work" / "hidden")
    ids, lengths = job.tokens.ids, job.tokens.lengths
    shape = (*ids.shape, job.source.config.hidden_size)
    resumed = HiddenStates.resume(lengths, shape, work, job.spill_above)
    return resumed or HiddenStates.start(
        first_hidden(stream.model, job.forward.embed(ids)), lengths, work, job.spill_above
    )


def link_statistics(job: BlockJob, stream: Stream) -> None:
    """Every variant of a stream with a name finds its statistics under its own: links to the first one's folder."""
    for variant in stream.variants[1:] if stream.name else ():
        link = job.folder / "statistics" / variant.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(stream.name)


def decide_and_write(
    job: BlockJob,
    writers: Mapping[str, CheckpointWriter],
    layer: int,
    weights: Mapping[str, Float],
    observed: Mapping[str, stats.Statistics],
    looks: Looks,
) -> None:
    """One block of every variant: its scale table to work/, its tensors to the checkpoint's shard."""
    config = job.source.config
    for name, writer in writers.items():
        variant, diagnosis, seen = job.variants[name], Diagnosis(), dict(observed)
        table = choose_block(layer, weights, seen, variant, config, looks.reobserve, looks.sample, diagnosis)
        table.save(table_folder(job, variant, layer))
        writer.add_block(layer, apply_block(layer, weights, table, variant, config, seen))
        if any(plan.quantized and plan.method != "rtn" for plan in variant.layers.values()):
            held = writer.partial_source()
            diagnosis.stored(Block(layer, weights, seen, variant, config), table, lambda n, s=held: s.linear(n).weight)
        diagnosis.save(table_folder(job, variant, layer))


def hand_on(walk: Walk, block: Observed) -> HiddenStates:
    """The hidden states that the quantized block puts out, by simulation with the block just written."""
    job, writer = walk.job, walk.writers[walk.stream.name]
    weights, fake = quantized_block(writer.partial_source(), block.layer)
    table = ScaleTable.load(table_folder(job, writer.variant, block.layer))
    forward = job.forward.behind(folded(walk.prefix, table, job.source.config))
    return advance_block(forward, block.layer, weights, block.hidden, replace=fake)


def prefix_of(job: BlockJob, variant: VariantPlan, model: ModelSource) -> Prefix | None:
    """The prefix that a variant asks for, as its float model has it: found on first use, then kept in the run folder.

    Raises CalibrationError where it would be of no use.
    """
    search = Search(job.forward.behind(None), job.source, job.tokens)
    return of_model(prefix_for(job.folder, search, variant.prefix), model)


def what_to_observe(job: BlockJob, stream: Stream) -> Collect:
    """Everything any variant of the stream asks for: live observers by name, Hessians where a word needs them."""
    plans = [p for v in stream.variants for p in v.layers.values()]
    live = {p.activation_observer for p in plans if p.activations} | {v.cache.observer for v in stream.variants}
    hungry = {p.name for p in plans if p.quantized and METHODS[p.method].needs_hessian}
    taps = {line.tap for line in LINEARS for name in hungry if name.endswith(line.name)}
    taps |= {tap for v in stream.variants for tap in hessian_taps(v)}
    return Collect(hessian=sorted(taps), observers=sorted(o for o in live if ":" in o), batch=job.batch)


def finish_checkpoints(job: BlockJob, tick: Tick) -> None:
    """Merge every variant's tables, write what is outside the blocks, lint, and move the checkpoint into place."""
    for variant in job.variants.values():
        if not checkpoint_path(job.folder, variant.name).exists():
            model = model_of(job.source, variant)
            outside = (rotation_table(model), head_table(model, variant))
            table = ScaleTable.merge(*block_tables(job, variant), *outside)
            folder = job.folder / "scales" / variant.name
            table.save(folder)
            merge_files((table_folder(job, variant, i) for i in range(job.source.config.num_layers)), folder)
            config = job.source.config
            write_seed_tables(folder, table, config.family, config.num_heads // config.num_kv_heads)
            prefix = folded(prefix_of(job, variant, model), table, config)
            written = with_biases(model, variant)
            CheckpointWriter(checkpoint_path(job.folder, variant.name), written, variant).finish(table, prefix)
        tick(variant.name)
    shutil.rmtree(job.folder / "work" / "hidden", ignore_errors=True)


def block_tables(job: BlockJob, variant: VariantPlan) -> Iterator[ScaleTable]:
    return (ScaleTable.load(table_folder(job, variant, layer)) for layer in range(job.source.config.num_layers))


def head_table(model: ModelSource, variant: VariantPlan) -> ScaleTable:
    """The output head's decision; its weight is read only where the plan quantizes it."""
    if not variant.layers["lm_head"].quantized:
        return ScaleTable()
    return choose_head(model.float_tensor("lm_head.weight"), variant)


def writers_of(job: BlockJob, stream: Stream) -> dict[str, CheckpointWriter]:
    paths = {v.name: checkpoint_path(job.folder, v.name) for v in stream.variants}
    return {v.name: CheckpointWriter(paths[v.name], with_biases(stream.model, v), v) for v in stream.variants}


def seen_by(run: Path, variant: str, table: ScaleTable) -> dict[str, stats.Statistics]:
    """Saved statistics of a run folder as `lint_table` takes them: "model.layers.0.attn_in" -> Statistics.

    Blocks that the table transforms are left out: their saved histograms are of what was there before.
    """
    own = run / "statistics" / variant
    found: dict[str, stats.Statistics] = {}
    for path in sorted((own if own.is_dir() else run / "statistics").glob("block_*.safetensors")):
        prefix = block_prefix(int(path.stem.removeprefix("block_")))
        if not any(entry.kind == "transform" and entry.name.startswith(f"{prefix}.") for entry in table):
            found |= {f"{prefix}.{tap}": seen for tap, seen in stats.load(path).items()}
    return found
