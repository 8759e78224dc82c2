"""Recipe word `kv_smooth`: keys whose channels fill one range per KV head; quantizers/kv_smooth.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantbench.calibrate.apply import KEYS, transformed
from quantbench.calibrate.transforms.block import TRANSFORMS, Block, Transform, require_known
from quantbench.quantizers.kv_smooth import key_factors, powers_of_two
from quantbench.scales.table import Entry, ScaleTable


def kv_smooth(block: Block, table: ScaleTable, options: Mapping[str, Any]) -> list[Entry]:
    """One entry for the block's keys, where the KV cache is quantized.

    options: alpha (1). Factors are powers of two wherever a narrow float carries them (a bias of k_proj, the norms of q
    and k, a k_proj that stays float): dividing these is then exact.
    """
    require_known(options, "kv_smooth", ("alpha",))
    if not block.variant.cache.quantized:
        return []
    config, seen = block.config, block.tap(transformed(block.layer, block.statistics, table, block.config), "k")
    alpha = float(options.get("alpha", 1.0))
    factors = key_factors(seen.channel_absmax, config.num_kv_heads, alpha, shared=config.qk_norm)
    narrow = f"{KEYS}.bias" in block.weights or config.qk_norm or block.plan(KEYS) is None
    entry = Entry(
        name=f"{block.prefix}.{KEYS}.smooth",
        kind="transform",
        format="float32",
        granularity="channel",
        scale=powers_of_two(factors) if narrow else factors,
        zero=None,
        absmax=seen.channel_absmax,
        group_size=None,
        observer="kv_smooth",
        reason=f"keys divided by their channels' ranges to the power {alpha:g}, a factor for each pair that RoPE turns"
        + (", powers of two" if narrow else ""),
        loss=None,
    )
    return [entry]


TRANSFORMS.add("kv_smooth", Transform(kv_smooth, targets=()))
