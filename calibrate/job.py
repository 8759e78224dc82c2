"""What the block loop works on: the job, its streams, and where in the run folder their files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantbench.calibrate.data import TokenBatches
from quantbench.calibrate.forward import BlockForward
from quantbench.calibrate.rotated import Turn, model_of
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.models import block_prefix
from quantbench.vocabulary import VariantPlan


@dataclass(frozen=True)
class BlockJob:
    """What the loop works on. `folder` is the run folder; `batch` samples per calibration batch."""

    folder: Path
    source: ModelSource
    forward: BlockForward
    tokens: TokenBatches
    variants: dict[str, VariantPlan]
    batch: int = 8
    quantized_inputs: bool = False
    spill_above: int = 1 << 30
    reuse_statistics: bool = False  # decide again from saved statistics, without running the model


@dataclass(frozen=True)
class Stream:
    """Variants that see the same inputs. `name` is "" for the stream of the model as it is stored, else the first
    variant's. `quantized`: blocks see what the quantized block before them puts out."""

    name: str
    variants: tuple[VariantPlan, ...]
    model: ModelSource
    quantized: bool = False

    def folder(self, root: Path) -> Path:
        return root / self.name if self.name else root


def streams(job: BlockJob) -> list[Stream]:
    """One stream for every float model and prefix; with quantized inputs, one for each quantized variant."""
    own = [v for v in job.variants.values() if job.quantized_inputs and any(p.quantized for p in v.layers.values())]
    plain = (None, "off")
    shared: dict[tuple[Turn | None, str | tuple[int, ...]], list[VariantPlan]] = {}
    for variant in job.variants.values():
        if variant not in own:
            shared.setdefault((Turn.of(variant), variant.prefix), []).append(variant)
    models = [("" if made == plain else vs[0].name, tuple(vs), False) for made, vs in shared.items()]
    models += [(v.name, (v,), True) for v in own]
    return [Stream(name, vs, model_of(job.source, vs[0]), quantized) for name, vs, quantized in models]


def checkpoint_path(folder: Path, variant: str) -> Path:
    return folder / "checkpoint" / variant


def statistics_path(job: BlockJob, stream: Stream, layer: int) -> Path:
    return stream.folder(job.folder / "statistics") / f"block_{layer:05d}.safetensors"


def table_folder(job: BlockJob, variant: VariantPlan, layer: int) -> Path:
    return job.folder / "work" / "scales" / variant.name / block_prefix(layer)
