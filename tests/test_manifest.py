"""The manifest against published listings, transformers' own models and the quantisers' matching rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_name
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

from transformers_k2 import resources
from transformers_k2.checkpoint import DTYPE_BITS, Checkpoint
from transformers_k2.manifest import (
    FP8,
    INT4,
    PARTS,
    Tensors,
    count_parameters,
    expected_tensors,
    optional_tensors,
    part_of,
    quantization_of,
    split_config,
)

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "checkpoints"
needs_listings = pytest.mark.skipif(not SHARED.is_dir(), reason="the published tensor listings are not here")
SAFETENSORS = {"bf16": "BF16", "f32": "F32", "f8_e4m3fn": "F8_E4M3", "i32": "I32"}
TINY: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
# config.json of deepseek-ai/DeepSeek-V3 where it differs from K2-Instruct's.
DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "n_group": 8,
    "topk_group": 4,
}


def config_of(name: str) -> dict[str, Any]:
    return json.loads(resources.find("configs", name).read_text())


def published(name: str) -> dict[str, Any]:
    return json.loads((SHARED / f"{name}.config.json").read_text())


def expand(pattern: str) -> Iterator[str]:
    """`{0-60}` is a range, `{gate,up}` a choice; all combinations."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = []
    for choice in parts[1::2]:
        numbers = re.fullmatch(r"(\d+)-(\d+)", choice)
        choices.append(
            [str(number) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
            if numbers
            else choice.split(",")
        )
    for chosen in product(*choices):
        yield "".join(part for pair in zip(parts[::2], (*chosen, ""), strict=True) for part in pair)


def listed(file: str) -> Tensors:
    """The listing of a published checkpoint's language model, one name per tensor."""
    result: Tensors = {}
    for line in (SHARED / file).read_text().splitlines():
        if line.startswith(("#", "mm_projector", "vision_tower")):
            continue
        name, shape, dtype, *more = line.split("\t")
        for full in expand(name):
            result[full] = (tuple(json.loads(shape)), SAFETENSORS[dtype])
            if more and (scale := re.match(r"\+ weight_scale_inv (\[[\d,]+\]) (\w+)", more[0])):
                result[f"{full}_scale_inv"] = (tuple(json.loads(scale[1])), SAFETENSORS[scale[2]])
    return result


def num_bytes(tensors: Tensors) -> int:
    return sum(torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8 for shape, dtype in tensors.values())


@needs_listings
def test_k2_instruct_fp8_is_the_published_listing() -> None:
    config = published("kimi_k2_instruct")
    expected = expected_tensors(config) | optional_tensors(config)
    assert expected == listed("Kimi-K2-Instruct_fp8.tsv")
    assert len(expected) == 139_644
    assert len(optional_tensors(config)) == 61
    assert num_bytes(expected) / 2**30 == pytest.approx(958.51, abs=0.03)  # the hub counts headers too


@needs_listings
def test_k25_int4_is_the_published_listing() -> None:
    expected = expected_tensors(published("kimi_k2_5"))
    assert expected == listed("Kimi-K2.5_int4.tsv")
    assert len(expected) == 208_215


@needs_listings
def test_thinking_is_k25_without_the_prefix() -> None:
    thinking = json.loads((SHARED / "kimi_k2_thinking.config.reconstructed.json").read_text())
    thinking = expected_tensors(thinking)
    assert {f"language_model.{name}": value for name, value in thinking.items()} == listed(
        "Kimi-K2.5_int4.tsv"
    )


def test_deepseek_v3_with_its_mtp_layer_has_the_published_count_and_bytes() -> None:
    """deepseek-ai/DeepSeek-V3: 91,991 tensors, 688,574,839,360 bytes (a listing made from its headers)."""
    config = config_of("kimi_k2_instruct") | DEEPSEEK_V3
    expected = expected_tensors(config)
    assert len(expected) == 91_991
    assert num_bytes(expected) == 688_574_839_360
    assert expected["model.layers.61.eh_proj.weight"] == ((7168, 14336), "BF16")
    assert expected["model.layers.61.embed_tokens.weight"] == ((129280, 7168), "BF16")
    assert expected["model.layers.61.shared_head.head.weight"] == ((129280, 7168), "BF16")
    assert expected["model.layers.0.self_attn.q_b_proj.weight_scale_inv"] == ((192, 12), "F32")
    counts = count_parameters(config)
    assert counts["mtp"][1] == 0
    # The model card: 671 B of the main model, 37 B of them activated, and 14 B of the MTP module.
    assert sum(total for part, (total, _) in counts.items() if part != "mtp") == pytest.approx(
        671e9, rel=1e-3
    )
    assert sum(active for _, active in counts.values()) == pytest.approx(37e9, rel=0.02)
    assert counts["mtp"][0] == pytest.approx(14e9, rel=0.04)


def meta_model(config: dict[str, Any]) -> DeepseekV3ForCausalLM:
    known = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "auto_map", "model_type")
    }
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config(**known))


def fused_state(model: DeepseekV3ForCausalLM) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


VARIANTS = {
    "plain": {},
    "no query LoRA": {"q_lora_rank": None},
    "two shared experts": {"n_shared_experts": 2},
    "bias": {"attention_bias": True},
    "bias, no query LoRA": {"attention_bias": True, "q_lora_rank": None},
    "all dense": {"first_k_dense_replace": 3},
    "all sparse": {"first_k_dense_replace": 0},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_form_is_transformers_state_dict(variant: str) -> None:
    config = TINY | VARIANTS[variant]
    model = meta_model(config)
    expected = expected_tensors(config, fused=True)
    assert {name: shape for name, (shape, _) in expected.items()} == fused_state(model)
    counts = count_parameters(config)
    assert sum(total for total, _ in counts.values()) == sum(
        tensor.numel() for tensor in model.state_dict().values()
    )


@pytest.mark.parametrize("name", resources.names("configs"))
def test_every_size_has_the_tensors_of_transformers_own_model(name: str) -> None:
    config = config_of(name)
    model = meta_model(config)
    expected = expected_tensors(config, "none", fused=True)
    assert {name: shape for name, (shape, _) in expected.items()} == fused_state(model)
    counts = count_parameters(config)
    biases = config["n_routed_experts"] * sum(
        layer.mlp.__class__.__name__.endswith("MoE") for layer in model.model.layers
    )
    assert sum(total for total, _ in counts.values()) == model.num_parameters() + biases
    assert list(counts) == list(PARTS)


def test_tied_embeddings_have_no_head_of_their_own(tmp_path: Path) -> None:
    config = TINY | {"tie_word_embeddings": True}
    assert "lm_head.weight" not in expected_tensors(config)
    assert optional_tensors(config)["lm_head.weight"] == ((330, 96), "BF16")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    assert count_parameters(config)["lm_head"] == (0, 0)
    biases = 2 * config["n_routed_experts"]
    assert sum(total for total, _ in count_parameters(config).values()) == model.num_parameters() + biases
    model.save_pretrained(tmp_path)
    assert sorted(Checkpoint.open(tmp_path).tensors) == sorted(expected_tensors(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_what_transformers_saves_has_these_names_shapes_and_dtypes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    DeepseekV3ForCausalLM(DeepseekV3Config(**TINY)).save_pretrained(tmp_path / "float32")
    # Loading keeps the router bias in float32; a bare `.to(dtype)` would not.
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    saved = Checkpoint.open(tmp_path / "saved")
    assert len(saved.shards) > 1
    assert {name: (info.shape, info.dtype) for name, info in saved.tensors.items()} == expected_tensors(
        config
    )


def test_k2_has_the_published_totals() -> None:
    counts = count_parameters(config_of("kimi_k2_instruct"))
    total = sum(total for total, _ in counts.values())
    active = {part: active for part, (_, active) in counts.items()}
    assert total == 1_026_408_232_448
    everything = sum(active.values())
    # "32.6 B activated" (arXiv 2507.20534) lies within 1% of the count with embedding and head, not without.
    assert everything == pytest.approx(32.6e9, rel=0.01)
    assert everything - active["router"] == pytest.approx(32.69e9, rel=1e-3)
    assert everything - active["embedding"] < 0.98 * 32.6e9
    assert active["routed_experts"] * 384 == counts["routed_experts"][0] * 8


@pytest.mark.parametrize(
    "ignore",
    [
        INT4["ignore"],
        [],
        ["lm_head", "model.layers.1.mlp.experts.3.up_proj", r"re:.*\.experts\.[02]\..*"],
        ["re:self_attn", "re:.*self_attn", r"re:model\.layers\.(0|2)\.", "Linear2"],
    ],
)
def test_int4_packs_what_compressed_tensors_would(ignore: list[str]) -> None:
    config = TINY | {"kv_lora_rank": 64, "q_lora_rank": 32, "v_head_dim": 32, "attention_bias": True}
    config["quantization_config"] = INT4 | {"ignore": ignore}
    plain, packed = expected_tensors(config, "none"), expected_tensors(config)
    modules = [
        module for module, child in meta_model(config).named_modules() if isinstance(child, torch.nn.Linear)
    ]
    modules += [
        name.removesuffix(".weight") for name in plain if ".experts." in name
    ]  # fused in transformers
    for module in modules:
        (rows, columns), dtype = plain.pop(f"{module}.weight")
        if any(match_name(module, pattern) for pattern in ignore):
            assert packed.pop(f"{module}.weight") == ((rows, columns), "BF16")
        else:
            assert packed.pop(f"{module}.weight_packed") == ((rows, columns // 8), "I32")
            assert packed.pop(f"{module}.weight_scale") == ((rows, columns // 32), dtype)
            assert packed.pop(f"{module}.weight_shape") == ((2,), "I32")
    assert packed == plain


@pytest.mark.parametrize(
    "skipped",
    [
        ["lm_head"],
        ["lm_head", "model.layers.1", "kv_b_proj"],
        ["lm_head", "model.layers.*.mlp.experts", "up_proj", r"model\.layers\.2\.self_attn"],
    ],
)
def test_fp8_keeps_what_transformers_would(skipped: list[str]) -> None:
    config = TINY | {"quantization_config": FP8 | {"modules_to_not_convert": skipped}}
    plain, stored = expected_tensors(config, "none"), expected_tensors(config)
    linear = [
        name
        for name, (shape, _) in plain.items()
        if len(shape) == 2 and not re.search("embed|gate.weight", name)
    ]
    assert any("scale_inv" in name for name in stored)
    for name in linear:
        module = name.removesuffix(".weight")
        quantised = should_convert_module(module, skipped)
        assert stored[name] == (plain[name][0], "F8_E4M3" if quantised else "BF16"), name
        assert (f"{name}_scale_inv" in stored) == quantised
    grid = stored.get("model.layers.0.mlp.gate_proj.weight_scale_inv")
    assert grid is None or grid == ((2, 1), "F32")  # 160 x 96 in blocks of 128: the last is partial


def test_an_override_takes_its_options_from_the_config_or_from_the_published_checkpoints() -> None:
    config = TINY | {"quantization_config": FP8 | {"weight_block_size": [32, 16]}}
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    assert expected_tensors(config, "fp8")[f"{name}_scale_inv"] == ((3, 2), "F32")
    assert expected_tensors(TINY, "fp8")[f"{name}_scale_inv"] == ((1, 1), "F32")
    assert expected_tensors(config, "int4")[f"{name}_packed"] == ((96, 4), "I32")
    assert expected_tensors(config, "none")[name] == ((96, 32), "BF16")
    unknown = TINY | {"quantization_config": {"quant_method": "awq"}}
    assert expected_tensors(unknown, "none") == expected_tensors(TINY)
    with pytest.raises(ValueError, match="quant_method 'awq': expected 'fp8' or 'compressed-tensors'"):
        expected_tensors(unknown)


def test_a_wrapper_lends_its_dtype_and_quantisation() -> None:
    wrapper = {"model_type": "kimi_k25", "text_config": TINY, "dtype": "float16", "quantization_config": FP8}
    names = expected_tensors(wrapper)
    assert all(name.startswith("language_model.") for name in names)
    assert names["language_model.lm_head.weight"] == ((330, 96), "F16")
    assert names["language_model.model.layers.0.mlp.up_proj.weight"] == ((160, 96), "F8_E4M3")
    assert quantization_of(wrapper).method == "fp8"
    assert split_config(wrapper)[1] == "language_model."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size None; expected positive integers"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"hidden_size": 96.0}, "hidden_size 96.0"),
        ({"hidden_size": True}, "hidden_size True"),
        ({"q_lora_rank": 0}, "q_lora_rank 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers -1"),
        ({"num_experts_per_tok": 6}, "6 experts per token, of 5"),
        ({"num_hidden_layers": 10**9}, "expected at most 1,000,000 experts"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn': expected one of bfloat16"),
        ({"text_config": 3}, "text_config '3': expected a JSON object"),
        ({"quantization_config": "fp8"}, "quantization_config 'fp8': expected a JSON object"),
        (
            {"quantization_config": FP8 | {"weight_block_size": None}},
            "weight_block_size \\[\\]: expected two sizes",
        ),
        (
            {"quantization_config": FP8 | {"modules_to_not_convert": "lm_head"}},
            "modules_to_not_convert 'lm_head'",
        ),
        (
            {"quantization_config": INT4 | {"format": "int-quantized"}},
            "format 'int-quantized' with 1 config_groups",
        ),
        ({"quantization_config": INT4 | {"ignore": ["re:("]}}, r"the pattern 're:\(' in ignore"),
        (
            {"quantization_config": INT4 | {"ignore": []}},
            "q_b_proj has 40 input features: expected a multiple of",
        ),
    ],
)
def test_a_config_that_describes_no_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        expected_tensors(TINY | changes)
    assert "\n" not in str(error.value)


def test_missing_keys_and_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match="lacks hidden_size, q_lora_rank: expected the keys of a kimi_k2"):
        expected_tensors(
            {key: value for key, value in TINY.items() if key not in ("q_lora_rank", "hidden_size")}
        )
    with pytest.raises(ValueError, match="Unknown quantization 'int8': expected one of none, fp8, int4"):
        expected_tensors(TINY, "int8")
    with pytest.raises(ValueError, match="Fused experts have no int4 form"):
        expected_tensors(TINY, "int4", fused=True)


def test_parts_of_names() -> None:
    assert (
        part_of("language_model.model.layers.3.mlp.experts.17.up_proj.weight_packed", 61) == "routed_experts"
    )
    assert part_of("model.layers.61.mlp.experts.17.up_proj.weight", 61) == "mtp"
    assert part_of("model.layers.3.self_attn.kv_a_layernorm.weight", 61) == "norms"
    assert part_of("vision_tower.encoder.final_layernorm.weight", 61) == "vision"
    assert part_of("decoder.layers.0.mlp.router.weight", 61) == "other"
