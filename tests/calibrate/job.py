"""A whole block loop over a small model on random tokens: plans for every linear, and the run to its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantbench.calibrate.blocks import finish_checkpoints, quantize_blocks
from quantbench.calibrate.data import TokenBatches
from quantbench.calibrate.job import BlockJob
from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.models import LINEARS, block_prefix
from quantbench.vocabulary import CachePlan, LayerPlan, VariantPlan, parse_mode


def plan(source: ModelSource, name: str, mode: str, *transforms: dict[str, Any], **fields: Any) -> VariantPlan:
    m = parse_mode(mode)
    fields = {"granularity": "channel", "activations": m.activations} | fields
    names = [f"{block_prefix(i)}.{line.name}" for i in range(source.config.num_layers) for line in LINEARS]
    layers = {n: LayerPlan(n, m.weights, **fields) for n in names} | {"lm_head": LayerPlan("lm_head", "bfloat16")}
    return VariantPlan(name, m, "bfloat16", CachePlan(m.cache), layers, transforms)


def run(folder: Path, source: ModelSource, *variants: VariantPlan, **options: Any) -> BlockJob:
    ids = np.random.default_rng(0).integers(0, 512, (6, 24)).astype(np.int32)
    tokens = TokenBatches(ids, np.full(6, 24, np.int32), "0" * 64, "random")
    forward = PaddleForward.of(source)
    job = BlockJob(folder, source, forward, tokens, {v.name: v for v in variants}, batch=3, **options)
    quantize_blocks(job, lambda _: None)
    finish_checkpoints(job, lambda _: None)
    return job
