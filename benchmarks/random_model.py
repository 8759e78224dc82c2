"""Writes a model of SmolLM2-135M's shapes with random bf16 weights, for machines that no model can be fetched to.

    python benchmarks/random_model.py DIRECTORY

Speed does not depend on the values, so benchmarks/cpu.py DIRECTORY measures what it would on the real one. Its
tokenizer knows single bytes only: what is measured are token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": True,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor."""
    hidden, inner = 576, 1536
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (49152, hidden), "model.norm.weight": (hidden,)}
    for layer in range(30):
        linears = {
            "self_attn.q_proj": (576, hidden), "self_attn.k_proj": (192, hidden), "self_attn.v_proj": (192, hidden),
            "self_attn.o_proj": (hidden, 576), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linears.items()}
    return found


def write(directory: Path) -> None:
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (rng.standard_normal(shape, np.float32) * 0.05 + (len(shape) == 1)).astype(ml_dtypes.bfloat16)
        for name, shape in shapes().items()
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
