"""What the tests share: a Kimi K2 that a CPU computes in milliseconds, with every part of the real one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Read once, when huggingface_hub is imported; no test needs the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM

torch.set_num_threads(1)  # tensors this small are slower on two threads, much slower on a busy machine

# No two sizes are equal, none of the feature sizes is a power of two, and YaRN is K2-Instruct's (the default).
TINY: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "q_lora_rank": 56,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "initializer_range": 0.1,  # logits far enough apart that greedy decoding is no tie
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., KimiK2Config]:
    """`tiny_config(**changes)`: a new KimiK2Config of the tiny size."""
    return lambda **changes: KimiK2Config(**(TINY | changes))


@pytest.fixture
def tiny_model(tiny_config: Callable[..., KimiK2Config]) -> KimiK2ForCausalLM:
    """An initialised float32 model in eval mode, with a router bias that changes which experts are chosen."""
    model = KimiK2ForCausalLM(tiny_config()).eval()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    return model
