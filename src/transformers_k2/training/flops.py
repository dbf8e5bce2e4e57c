"""How much arithmetic a token costs, and how much a device could do: what the MFU compares.

Model FLOPs, as in PaLM (arXiv 2204.02311, appendix B): matrix products of the forward pass and twice that for the
backward pass, attention over the mean causal length; recomputation and the optimizer do not count.
"""

from __future__ import annotations

import time
from typing import Any

import torch

# Dense bfloat16 tensor throughput in teraFLOPS from the makers' data sheets, by a part of the device's name.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
}


def training_flops_per_token(config: Any, sequence_length: int) -> float:
    """Of forward and backward pass, per token of a sequence of that length."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    qk = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    if config.q_lora_rank is None:
        attention += hidden * heads * qk
    else:
        attention += config.q_lora_rank * (hidden + heads * qk)
    scores = heads * (qk + config.v_head_dim) * sequence_length / 2
    experts = (config.num_experts_per_tok or 0) + config.n_shared_experts
    sparse = 3 * hidden * config.moe_intermediate_size * experts + hidden * config.n_routed_experts
    dense = 3 * hidden * config.intermediate_size
    num_dense = min(config.first_k_dense_replace or 0, config.num_hidden_layers)
    products = config.num_hidden_layers * (attention + scores)
    products += num_dense * dense + (config.num_hidden_layers - num_dense) * sparse
    products += hidden * config.vocab_size
    return 6.0 * products


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device, a second: a GPU's from its data sheet (None if it is not in the table), a CPU's as measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)
    size = 512
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(20):  # a busy machine seldom leaves one alone
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
