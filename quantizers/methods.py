"""The methods by which a weight becomes codes under a given scale. Recipe word = registry name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantbench.errors import RecipeError
from quantbench.quantizers.gptq import gptq
from quantbench.quantizers.rtn import rtn
from quantbench.quantizers.weight import QuantizedWeight
from quantbench.registry import Registry


@dataclass(frozen=True)
class Method:
    """`quantize(w [N, K], entry, statistics of the input, **options)`, options: LayerPlan.options by name.

    `needs_hessian`: statistics must hold the sum of x xT.
    """

    name: str
    quantize: Callable[..., QuantizedWeight]
    needs_hessian: bool = False


METHODS: Registry[Method] = Registry("method", RecipeError)
METHODS.add("rtn", Method("rtn", rtn))
METHODS.add("gptq", Method("gptq", gptq, needs_hessian=True))
