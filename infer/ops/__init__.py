"""The op table of the runtime: `load_ops("reference")` in numpy, "cpu" in C++, "cuda" on a GPU. Same signatures."""

from __future__ import annotations

from quantbench.errors import DependencyError, unknown
from quantbench.infer.ops.types import (
    FLOAT,
    PAGE,
    Activation,
    ActSpec,
    Batch,
    LayerCache,
    Ops,
    Packed,
)

__all__ = ["FLOAT", "PAGE", "ActSpec", "Activation", "Batch", "LayerCache", "Ops", "Packed", "load_ops"]

BACKENDS = ("cpu", "cuda", "reference")


def load_ops(name: str = "cpu", *, isa: str | None = None) -> Ops:
    """The backend called `name`. `isa` (or QUANTBENCH_ISA) forces the native instruction set.

    Raises DependencyError for an unknown backend, for "cpu" without the compiled extension, for an instruction set
    this processor does not have, and for "cuda" without a usable GPU, driver or compiler.
    """
    if name == "reference":
        from quantbench.infer.ops.reference import ReferenceOps

        return ReferenceOps()
    if name == "cpu":
        from quantbench.infer.ops.cpu import CpuOps

        return CpuOps(isa)
    if name == "cuda":
        from quantbench.infer.cuda.ops import CudaOps

        return CudaOps()
    raise DependencyError(unknown("operations backend", name, BACKENDS))
