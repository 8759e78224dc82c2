"""Writes a model as a HF directory in float32, for peers whose converters read those.

python benchmarks/peers/to_hf.py MODEL DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from quantbench.infer.checkpoint.source import open_model


def convert(model: str, directory: Path) -> None:
    source = open_model(model)
    directory.mkdir(parents=True)
    tensors = {name: np.ascontiguousarray(source.read(name), np.float32) for name in source.names()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(source.hf_config | {"torch_dtype": "float32"}, indent=1))
    source.tokenizer().save(directory)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(sys.argv[1], Path(sys.argv[2]))
