"""Small checkpoints in the hub's published forms, written with textbook loops and foreign packers, not with our codecs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

# 576 = 4.5 blocks and 192 = 1.5 blocks of 128: the partial blocks of the real checkpoints.
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 160,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ROPE = {
    "rope_theta": 50000.0,
    "rope_scaling": {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
}
ROPE["rope_scaling"] |= {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True,
                        "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None},
        }
    },
}  # fmt: skip


def hub_config(**changes: Any) -> dict[str, Any]:
    """A config.json as published: model_type kimi_k2, DeepSeek's class name and an auto_map to remote code."""
    published = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "torch_dtype": "bfloat16",
    }
    published["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    published |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    return SHAPE | ROPE | published | changes


def stock_model(seed: int = 0, **changes: Any) -> DeepseekV3ForCausalLM:
    """transformers' own DeepSeek-V3 of that shape in bf16, with a router bias that is not zero."""
    torch.manual_seed(seed)
    rope = {key: ROPE[key] for key in ROPE}
    config = DeepseekV3Config(**(SHAPE | rope | {"num_mtp_layers": 0} | changes))
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    for layer in model.model.layers[1:]:
        gate = layer.mlp.gate
        gate.e_score_correction_bias = 0.3 * torch.randn(gate.e_score_correction_bias.shape)
    return model


def per_expert(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The hub's tensors of a stock model: one per expert and projection, gate before up in the fused weight."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                stem = name.removesuffix("gate_up_proj")
                tensors[f"{stem}{index}.gate_proj.weight"] = gate.clone()
                tensors[f"{stem}{index}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            for index, expert in enumerate(tensor):
                tensors[f"{name.removesuffix('down_proj')}{index}.down_proj.weight"] = expert.clone()
        else:
            tensors[name] = tensor.clone()
    return tensors


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per 128x128 block, block by block: the last block of a side is whatever is left."""
    rows, cols = weight.shape
    quantised = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-cols // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
            scales[i, j] = block.abs().max() / 448.0
            quantised[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = (block / scales[i, j]).to(
                quantised.dtype
            )
    return quantised, scales


def from_fp8_blocks(quantised: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Element by block: value * scale of its block in float64, rounded once (the product of 4 and 24 bits is exact)."""
    rows = torch.arange(quantised.shape[0]) // 128
    cols = torch.arange(quantised.shape[1]) // 128
    product = quantised.double() * scales.double()[rows][:, cols]
    return product.float().to(dtype)


def to_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """K2-Instruct's form: every projection in FP8, the rest as it is."""
    stored = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name:
            stored[name], stored[f"{name}_scale_inv"] = fp8_blocks(tensor)
        else:
            stored[name] = tensor
    return stored


def int4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kimi's grid, group by group of 32: scale = bf16(amax / 7), code = round(w / scale) in -7..7."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], weight.shape[1] // 32, dtype=torch.bfloat16)
    for group in range(scales.shape[1]):
        columns = weight[:, group * 32 : (group + 1) * 32].float()
        scales[:, group] = (columns.abs().amax(1) / 7).to(torch.bfloat16)
        codes[:, group * 32 : (group + 1) * 32] = torch.round(
            columns / scales[:, group : group + 1].float()
        ).clamp(-7, 7)
    return codes, scales


def to_int4(
    tensors: dict[str, torch.Tensor], shape_dtype: torch.dtype = torch.int32
) -> dict[str, torch.Tensor]:
    """K2-Thinking's form: routed experts packed by compressed-tensors, the rest as it is."""
    stored = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            codes, scales = int4_groups(tensor)
            stem = name.removesuffix("weight")
            stored[f"{stem}weight_packed"] = pack_to_int32(codes, 4)
            stored[f"{stem}weight_scale"] = scales
            stored[f"{stem}weight_shape"] = torch.tensor(tensor.shape, dtype=shape_dtype)
        else:
            stored[name] = tensor
    return stored


def decoded(stored: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a stored checkpoint means: hub names, every quantised weight multiplied out."""
    meaning = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale_inv", "weight_scale", "weight_shape")):
            continue
        if f"{name}_scale_inv" in stored:
            meaning[name] = from_fp8_blocks(tensor, stored[f"{name}_scale_inv"], dtype)
        elif name.endswith("weight_packed"):
            stem = name.removesuffix("_packed")
            nibbles = [((tensor >> (4 * i)) & 15) - 8 for i in range(8)]
            codes = torch.stack(nibbles, -1).flatten(1).double()
            scale = stored[f"{stem}_scale"].double().repeat_interleave(32, 1)
            meaning[stem] = (codes * scale).float().to(dtype)
        else:
            meaning[name] = tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
    return meaning


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    num_shards: int = 3,
    rename: Callable[[str], str] = lambda name: name,
    stray: bool = True,
) -> Path:
    """A hub folder: shards named as K2-Instruct's (`model-1-of-3`), an index, config.json, stray rope buffers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {rename(name): tensor.contiguous() for name, tensor in tensors.items()}
    if stray:
        for layer in range(SHAPE["num_hidden_layers"]):
            buffer = torch.ones(SHAPE["qk_rope_head_dim"] // 2)
            tensors[rename(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")] = buffer
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1}-of-{num_shards}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::num_shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
