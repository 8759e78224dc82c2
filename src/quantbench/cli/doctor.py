"""`quantbench doctor`: what this machine can run, and the line to type for what it cannot."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
from typing import Annotated, Any

import typer

from quantbench.cli.app import app
from quantbench.errors import DependencyError

# distribution -> (what it is for, the line that adds it)
_PARTS = {
    "paddlepaddle": ("calibration on a CPU", "pip install 'quantbench[cpu]'"),
    "paddlepaddle-gpu": ("calibration on a GPU", "see paddlepaddle.org.cn/install for the line of your CUDA version"),
    "paddleslim": (
        "observers named paddleslim:…",
        "pip install --no-deps paddleslim==2.6.0 && pip install six requests decorator scikit-learn pyzmq",
    ),
    "huggingface_hub": ("models by hub name", "pip install 'quantbench[hub]'"),
    "cuda-bindings": ("--device cuda", "pip install 'quantbench[cuda]'"),
    "nvidia-cuda-nvrtc": ("--device cuda: compiles its kernels", "pip install 'quantbench[cuda]'"),
    "nvidia-cublas": ("--device cuda: long prompts in bf16 and fp8, at full speed", "pip install 'quantbench[cuda]'"),
}


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def traps() -> list[str]:
    """Known bad combinations of versions that are installed here, one line each."""
    found = []
    numpy = version_of("numpy") or "0"
    if tuple(int(part) for part in numpy.split(".")[:2]) >= (2, 4):
        found.append(f"numpy {numpy}: float() of a tensor raises in paddle 3.3: pip install 'numpy<2.4'")
    if version_of("opencv-python") == "4.6.0.66":
        found.append("opencv-python 4.6.0.66 breaks on numpy 2, and PaddleSlim never uses it: pip uninstall it")
    if version_of("paddlepaddle") and version_of("paddlepaddle-gpu"):
        found.append("paddlepaddle and paddlepaddle-gpu exclude each other: uninstall one")
    return found


def gpu() -> dict[str, Any]:
    """The GPU that --device cuda would use, or in `error` why there is none."""
    from quantbench.infer.cuda.bench import describe
    from quantbench.infer.cuda.device import Device

    try:
        return describe(Device())
    except DependencyError as error:
        return {"error": str(error)}


def examine() -> dict[str, Any]:
    """What is here: machine, kernels, optional parts with versions, traps, demo assets."""
    from quantbench.infer.checkpoint.demo import fetched
    from quantbench.infer.validate.machine import describe_machine

    parts = {name: {"version": version_of(name), "for": use, "add": add} for name, (use, add) in _PARTS.items()}
    kernels = importlib.util.find_spec("quantbench._kernels") is not None
    return {
        "machine": describe_machine(),
        "kernels": kernels,
        "parts": parts,
        "gpu": gpu(),
        "traps": traps(),
        "demo": {name: fetched(name) for name in ("demo:smollm2", "demo:wikipedia")},
    }


@app.command("doctor")
def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What this machine can run, and what to install for more."""
    found = examine()
    if json:
        from json import dumps

        typer.echo(dumps(found, indent=1))
        return
    for key, value in found["machine"].items():
        typer.echo(f"{key:<16} {value}")
    typer.echo(f"{'kernels':<16} {'built' if found['kernels'] else 'missing: reinstall with a C++20 compiler (g++)'}")
    card = found["gpu"]
    here = card.get("error") or f"{card['gpu']}, driver {card['driver']}, kernels for {card['arch']}"
    typer.echo(f"{'gpu':<16} {here}")
    for name, part in found["parts"].items():
        state = part["version"] or f"not installed ({part['for']}): {part['add']}"
        typer.echo(f"{name:<16} {state}")
    for name, here in found["demo"].items():
        typer.echo(f"{name:<16} {'fetched' if here else f'not fetched: quantbench fetch {name}'}")
    for trap in found["traps"]:
        typer.echo(f"trap: {trap}")
