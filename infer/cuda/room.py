"""How much of the GPU's memory the KV cache may take: what is left beside weights and the work of one step."""

from __future__ import annotations

from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.engine.forward import Model
from quantbench.infer.engine.limits import Limits
from quantbench.infer.ops import Ops

SHARE = 0.95  # of what is free: graphs, kernels and the driver take some more


def room_for_cache(ops: Ops, model: Model, limits: Limits) -> int:
    """Bytes for the cache's pages."""
    assert isinstance(ops, CudaOps)
    free, _ = ops.device.memory
    return int(free * SHARE) - work_bytes(model, limits)


def work_bytes(model: Model, limits: Limits) -> int:
    """Upper bound of the memory of one step: the widest arrays of a layer at float32, and the logits."""
    c = model.config
    tokens = limits.chunk + limits.max_batch
    wide = 2 * c.intermediate_size + c.intermediate_size + 4 * c.hidden_size + 4 * c.num_heads * c.head_dim
    return 4 * (tokens * wide + 2 * max(limits.max_batch, limits.chunk) * c.vocab_size)
