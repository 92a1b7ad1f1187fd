"""Small Llamas in memory, for our own forward pass and for transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "grouped and tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "one key head, other theta": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


def make_config(variant: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **variant,
    }


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (hidden, hidden),
            f"{name}.self_attn.k_proj.weight": (keys, hidden),
            f"{name}.self_attn.v_proj.weight": (keys, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.mlp.gate_proj.weight": (wide, hidden),
            f"{name}.mlp.up_proj.weight": (wide, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, wide),
        }
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def in_torch(config: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Any:
    """The same Llama in transformers; the test is skipped without it."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made.load_state_dict(state)
    return made
