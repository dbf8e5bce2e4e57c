"""LoRA on Kimi K2 through PEFT: what is named is adapted, what matches nothing is an error.

Two foreign oracles: W + scale * B A, written out here per expert, inside transformers' own DeepSeek-V3 in
float64; and PEFT on that class, where its own handling of the layout is right.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from transformers_k2 import (
    KimiK2Config,
    KimiK2ForCausalLM,
    KimiK2ForSequenceClassification,
    KimiK2Model,
    peft_mapping,
)

# PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,  # 2 I equals the hidden size: a transposed fused tensor would fit as well
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = SHAPE["n_routed_experts"]
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = ("gate_up_proj", "down_proj")
IDS = torch.arange(66).reshape(2, 33) * 37 % 101


def attention(layers: Iterable[int] = range(3), names: Iterable[str] = ATTENTION) -> set[str]:
    return {f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in names}


def shared(layers: Iterable[int] = (1, 2), names: Iterable[str] = MLP) -> set[str]:
    return {f"model.layers.{layer}.mlp.shared_experts.{name}" for layer in layers for name in names}


def dense(names: Iterable[str] = MLP) -> set[str]:
    return {f"model.layers.0.mlp.{name}" for name in names}


def routed(layers: Iterable[int] = (1, 2), names: Iterable[str] = FUSED) -> set[str]:
    return {f"model.layers.{layer}.mlp.experts.{name}" for layer in layers for name in names}


ROUTER = {"model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}
EVERYTHING = attention() | shared() | dense() | routed()


@cache
def weights(q_lora_rank: int | None = 24) -> dict[str, torch.Tensor]:
    """Seeded weights with a router bias, large enough for float32 to tell a wrong update from rounding."""
    config = DeepseekV3Config(**SHAPE | {"q_lora_rank": q_lora_rank})
    state = DeepseekV3ForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if "norm" not in name:
            scale = 0.05 if name.endswith("bias") else 0.5 / math.sqrt(tensor.shape[-1])
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return state


def kimi(cls: type = KimiK2ForCausalLM, q_lora_rank: int | None = 24, **changes: Any) -> Any:
    model = cls(KimiK2Config(**SHAPE | {"q_lora_rank": q_lora_rank} | changes)).eval()
    if cls is KimiK2ForCausalLM:
        model.load_state_dict(weights(q_lora_rank))
    return model


def kimi64() -> KimiK2ForCausalLM:
    model = kimi().double()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def stock() -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE)).eval()
    model.load_state_dict(weights())
    return model


def stock64(state: dict[str, torch.Tensor]) -> DeepseekV3ForCausalLM:
    model = stock().double()
    model.set_experts_implementation("eager")
    model.load_state_dict(state)
    return model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)


def randomise(model: nn.Module, seed: int = 2) -> nn.Module:
    """Trained adapters: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def adapted(model: nn.Module) -> set[str]:
    """The modules and parameters that carry LoRA weights, by their names before they were adapted."""
    found = set()
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None):
            parameter = getattr(module, "parameter_name", None)
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found.add(f"{name}.{parameter}" if parameter else name)
    return found


def updates(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def scaling(config: dict[str, Any], rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def folded(
    folder: Path, base: dict[str, torch.Tensor], per_expert_file: bool = False
) -> dict[str, torch.Tensor]:
    """float64 weights W + scale * B A, read from an adapter folder by the documented meaning of its keys.

    Fused keys: A [E r, in] holds expert after expert; in B [out, r E] the expert runs fastest.
    `experts.base_layer` is gate_up_proj and `experts` is down_proj when both are there.
    """
    stored, config = updates(folder)
    merged = {name: tensor.double() for name, tensor in base.items()}
    for key in sorted(stored):
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = stored[key].double(), stored[key.replace("lora_A", "lora_B")].double()
        if per_expert_file and ".mlp.experts." in name:
            container, expert, projection = name.rsplit(".", 2)
            half = slice(0, 24) if projection == "gate_proj" else slice(24, 48)
            scale = scaling(config, config["r"], config["lora_alpha"])
            if projection == "down_proj":
                merged[f"{container}.down_proj"][int(expert)] += scale * b @ a
            else:
                merged[f"{container}.gate_up_proj"][int(expert), half] += scale * b @ a
        elif name.endswith((".experts", ".experts.base_layer")):
            container = name.removesuffix(".base_layer")
            outer = (
                "down_proj" if f"base_model.model.{container}.base_layer.lora_A.weight" in stored else None
            )
            outer = outer or config["target_parameters"][0].rsplit(".", 1)[-1]
            parameter = "gate_up_proj" if name.endswith("base_layer") else outer
            rank = a.shape[0] // EXPERTS
            alpha = config["alpha_pattern"].get(rf".*\.{parameter}", config["lora_alpha"])
            for expert in range(EXPERTS):
                a_expert = a[expert * rank : (expert + 1) * rank]
                b_expert = b[:, expert::EXPERTS]
                merged[f"{container}.{parameter}"][expert] += (
                    scaling(config, rank, alpha) * b_expert @ a_expert
                )
        else:
            name += "" if name.endswith(".mlp.gate.weight") else ".weight"
            merged[name] += scaling(config, a.shape[0], config["lora_alpha"]) * b @ a
    return merged


def oracle(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits(stock64(state))


def assert_close_fp64(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Both in float64; the sums run in another order, over at most a few hundred terms.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# --- What is named is adapted -----------------------------------------------------------------------------

NO_EXPERTS = r".*\.mlp\.experts\..*"
TARGETS: list[tuple[dict[str, Any], set[str]]] = [
    ({"target_modules": ATTENTION}, attention()),
    ({"target_modules": set(MLP)}, dense() | shared() | routed()),
    (
        {"target_modules": [*MLP, "o_proj", "lm_head"]},
        dense() | shared() | routed() | attention(names=["o_proj"]) | {"lm_head"},
    ),
    (
        {"target_modules": ["down_proj"]},
        dense(["down_proj"]) | shared(names=["down_proj"]) | routed(names=["down_proj"]),
    ),
    ({"target_modules": ["mlp.gate_proj"]}, dense(["gate_proj"])),
    ({"target_modules": ["shared_experts.up_proj"]}, shared(names=["up_proj"])),
    ({"target_modules": ["experts.gate_proj", "experts.up_proj"]}, routed(names=["gate_up_proj"])),
    (
        {"target_modules": [f"1.mlp.experts.{e}.down_proj" for e in range(EXPERTS)]},
        routed([1], ["down_proj"]),
    ),
    ({"target_modules": ["model.layers.2.self_attn.o_proj"]}, attention([2], ["o_proj"])),
    ({"target_modules": r".*\.experts\.\d+\.(gate|up|down)_proj"}, routed()),
    ({"target_modules": r".*\.experts\.(gate|up|down)_proj"}, routed()),
    ({"target_modules": r".*\.1\.mlp\.experts\.\d+\.down_proj"}, routed([1], ["down_proj"])),
    ({"target_modules": r".*shared_experts\.(gate|up|down)_proj"}, shared()),
    ({"target_modules": r".*layers\.0\.mlp\..*"}, dense()),
    ({"target_modules": r".*\.mlp\..*"}, dense() | shared() | routed()),
    ({"target_modules": r".*\.self_attn\.[qo]_.*proj"}, attention(names=["q_a_proj", "q_b_proj", "o_proj"])),
    ({"target_modules": "all-linear"}, EVERYTHING),
    (
        {"target_modules": "ALL-linear", "exclude_modules": ["kv_b_proj", "experts"]},
        attention() - attention(names=["kv_b_proj"]) | shared() | dense(),
    ),
    ({"target_modules": ["gate", "o_proj"]}, ROUTER | attention(names=["o_proj"])),
    ({"target_modules": ["1.mlp.gate"]}, {"model.layers.1.mlp.gate.weight"}),
    (
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]},
        routed(names=["gate_up_proj"]) | ROUTER,
    ),
    (
        {"target_parameters": ["gate_up_proj", "model.layers.1.mlp.experts.down_proj"]},
        routed(names=["gate_up_proj"]) | routed([1], ["down_proj"]),
    ),
    ({"target_modules": MLP, "target_parameters": []}, dense() | shared()),
    (
        {"target_modules": MLP, "target_parameters": ["experts.down_proj"]},
        dense() | shared() | routed(names=["down_proj"]),
    ),
    ({"target_modules": MLP, "exclude_modules": NO_EXPERTS}, dense() | shared()),
    (
        {"target_modules": ["gate_proj"], "exclude_modules": NO_EXPERTS},
        dense(["gate_proj"]) | shared(names=["gate_proj"]),
    ),
    (
        {"target_modules": MLP, "exclude_modules": ["down_proj"]},
        dense(MLP[:2]) | shared(names=MLP[:2]) | routed(names=["gate_up_proj"]),
    ),
    (
        {"target_modules": MLP, "exclude_modules": ["gate_up_proj"]},
        dense() | shared() | routed(names=["down_proj"]),
    ),
    ({"target_modules": MLP, "exclude_modules": r".*shared_experts.*"}, dense() | routed()),
    (
        {"target_modules": [*MLP, "o_proj"], "layers_to_transform": [1]},
        shared([1]) | routed([1]) | attention([1], ["o_proj"]),
    ),
    ({"target_modules": MLP, "layers_to_transform": 0}, dense()),
    ({"target_modules": MLP, "modules_to_save": ["mlp.experts", "lm_head"]}, dense() | shared()),
    ({"target_modules": MLP, "modules_to_save": ["shared_experts"]}, dense() | routed()),
]


@pytest.mark.parametrize(
    ("options", "expected"), TARGETS, ids=[json.dumps(case[0], default=sorted) for case in TARGETS]
)
def test_targets(options: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's way to say that something was ignored
        config = lora(**options)
        model = get_peft_model(kimi(), config)
    assert adapted(model) == expected
    # All of it and nothing else is trainable (modules_to_save aside), and the saved adapter means the same.
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if ".modules_to_save." not in name} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    randomise(model).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others: adapter keys that were not found
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings(
            "ignore", "You have passed exclude_modules", UserWarning
        )  # PEFT asks modules only
        again = PeftModel.from_pretrained(kimi(), tmp_path)
    assert adapted(again) == expected
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(kimi()))


def test_query_projection_without_low_rank() -> None:
    model = get_peft_model(kimi(q_lora_rank=None), lora(target_modules=["q_proj", "o_proj"]))
    assert adapted(model) == attention(names=["q_proj", "o_proj"])


def test_other_roots() -> None:
    base = get_peft_model(kimi(KimiK2Model), lora(target_modules="all-linear", task_type=None))
    assert adapted(base) == {name.removeprefix("model.") for name in EVERYTHING}
    # The classifier's head is trained, not adapted; PEFT adds both names that such heads have.
    head = get_peft_model(
        kimi(KimiK2ForSequenceClassification), lora(target_modules="all-linear", task_type="SEQ_CLS")
    )
    assert adapted(head) == EVERYTHING
    assert head.base_model.model.score.modules_to_save.default.weight.requires_grad


# --- What matches nothing is an error, before any work ----------------------------------------------------

ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"target_modules": ["q_proj", "o_proj"]},
        r"'q_proj' matches nothing .*nearest: .*q_a_proj.*choices: .*kv_b_proj",
    ),
    (
        {"target_modules": ["o_prj", "gate_prj"]},
        r"'gate_prj', 'o_prj' matches nothing .*nearest: gate_proj.* o_proj",
    ),
    ({"target_modules": ["experts"]}, "'experts' matches nothing that can be adapted"),
    (
        {"target_modules": ["0.mlp.experts.0.down_proj", "o_proj"]},
        r"'0\.mlp\.experts\.0\.down_proj' matches nothing",
    ),
    ({"target_modules": "q_a_proj"}, "'q_a_proj' matches nothing .*a list matches the ends"),
    ({"target_modules": r".*\.mlp\.gate"}, r"matches nothing .*target_parameters=\['mlp\.gate\.weight'\]"),
    (
        {"target_modules": ["mlp.gate_proj", "o_proj"], "layers_to_transform": [1, 2]},
        r"'mlp\.gate_proj' matches nothing .*layers_to_transform=\[1, 2\]",
    ),
    ({"target_modules": MLP, "layers_to_transform": [1, 3]}, r"layers_to_transform \[3\]: .* layers 0 to 2"),
    (
        {"target_modules": MLP, "modules_to_save": ["head2"]},
        "modules_to_save 'head2' matches nothing .*lm_head",
    ),
    (
        {"target_parameters": ["experts.gate_proj"]},
        r"target_parameters 'experts\.gate_proj' matches nothing .*mlp\.experts\.gate_up_proj",
    ),
    (
        {"target_modules": ["experts.down_proj"], "target_parameters": ["gate_up_proj"]},
        r"target_modules 'experts\.down_proj' matches nothing",
    ),
    (
        {"target_modules": ["gate_proj"]},
        "leaves out up_proj of the experts .*gate_up_proj: name gate_proj and up_proj, or .*exclude_modules",
    ),
    ({"target_modules": MLP, "exclude_modules": ["up_proj"]}, "leaves out up_proj of the experts"),
    (
        {"target_modules": r".*\.experts\.[03]\.down_proj"},
        "selects down_proj of 2 of the 6 experts in model.layers.1.mlp.experts",
    ),
    (
        {"target_modules": MLP, "exclude_modules": r".*experts\.5\..*"},
        "selects gate_proj of 5 of the 6 experts",
    ),
    (
        {"target_parameters": ["gate_up_proj"], "layers_to_transform": [1], "target_modules": ["o_proj"]},
        "includes model.layers.2.mlp.experts.gate_up_proj, which layers_to_transform",
    ),
    (
        {"target_parameters": ["gate_up_proj"], "exclude_modules": ["experts.gate_up_proj"]},
        "includes .*exclude_modules",
    ),
    (
        {"target_modules": MLP, "lora_dropout": 0.1},
        "lora_dropout=0.1 is impossible .*no input.*exclude_modules",
    ),
    ({"target_modules": MLP, "use_dora": True}, "use_dora=True is impossible"),
    ({"target_modules": MLP, "lora_bias": True}, "lora_bias=True is impossible"),
    ({"target_modules": MLP, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' is impossible"),
    ({"target_parameters": ["mlp.gate.weight"], "lora_dropout": 0.1}, "lora_dropout=0.1 is impossible"),
    (
        {"target_modules": MLP, "rank_pattern": {"gate_proj": 2}},
        r"gate_proj and up_proj .*\[\(2, 6\), \(3, 6\)\]",
    ),
    (
        {"target_modules": MLP, "rank_pattern": {r"experts\.4\.down_proj": 2}},
        r"down_proj .*\[\(2, 6\), \(3, 6\)\]",
    ),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_errors(options: dict[str, Any], message: str) -> None:
    model, config = kimi(), lora(**options)
    before, modules = copy.deepcopy(config), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"^LoRA .*{message}") as error:
        get_peft_model(model, config)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == modules  # nothing half done
    before.base_model_name_or_path = config.base_model_name_or_path
    assert config == before


@pytest.mark.parametrize(
    "option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
)
def test_options_work_without_the_experts(option: dict[str, Any]) -> None:
    model = get_peft_model(kimi(), lora(target_modules="all-linear", exclude_modules=NO_EXPERTS, **option))
    assert adapted(model) == EVERYTHING - routed()


# --- The update is W + scale * B A ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"target_modules": "all-linear"}, (6, 3)),
        ({"target_modules": "all-linear", "use_rslora": True}, (6, 3)),
        ({"target_modules": r".*\.experts\.\d+\.(gate|up)_proj"}, (6, 3)),
        ({"target_modules": r".*\.experts\.\d+\.down_proj"}, (6, 3)),
        ({"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, (3, 3)),
        ({"target_modules": ["gate", *MLP], "r": 5, "lora_alpha": 2}, (10, 5)),
    ],
    ids=str,
)
def test_logits_against_float64(options: dict[str, Any], ranks: tuple[int, int], tmp_path: Path) -> None:
    model = randomise(get_peft_model(kimi64(), lora(**options)))
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            wrappers = [module, module.base_layer]
            for wrapper in wrappers:
                if getattr(wrapper, "lora_A", None):
                    assert (
                        wrapper.lora_A.default.weight.shape[0]
                        == EXPERTS * ranks[FUSED.index(wrapper.parameter_name)]
                    )
    model.save_pretrained(tmp_path)
    assert_close_fp64(logits(model), oracle(folded(tmp_path, weights())))


@pytest.mark.parametrize(
    ("patterns", "gate_up", "down", "shared_down"),
    [
        ({"rank_pattern": {"down_proj": 2}}, (6, 12), (2, 6), 2),
        ({"rank_pattern": {r"experts\.\d+\.down_proj": 2}}, (6, 12), (2, 6), 3),
        ({"alpha_pattern": {r".*\.mlp\.experts\..*": 5}}, (6, 10), (3, 5), 3),
        ({"rank_pattern": {r"layers\..*": 2}, "alpha_pattern": {r"layers\..*": 5}}, (4, 10), (2, 5), 2),
        ({"rank_pattern": {r"experts\.\d+\.down_proj": 2, "down_proj": 4}}, (6, 12), (2, 6), 4),
        (
            {"rank_pattern": {"gate_proj": 2, "up_proj": 4}, "alpha_pattern": {"gate_proj": 3, "up_proj": 6}},
            (6, 9),
            (3, 6),
            3,
        ),
        ({"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"gate_up_proj": 7}}, (5, 7), (3, 6), 3),
        ({"rank_pattern": {r"layers\.[12]\.mlp\.experts\.\d+\.(gate|up)_proj": 7}}, (14, 12), (3, 6), 3),
    ],
    ids=str,
)
def test_rank_and_alpha_patterns(
    patterns: dict[str, Any],
    gate_up: tuple[int, int],
    down: tuple[int, int],
    shared_down: int,
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = randomise(get_peft_model(kimi(), lora(target_modules=MLP, **patterns)))
    model.save_pretrained(tmp_path)
    for each in (model, PeftModel.from_pretrained(kimi(), tmp_path)):
        for layer in each.base_model.model.model.layers[1:]:
            for wrapper, (rank, alpha) in (
                (layer.mlp.experts.base_layer, gate_up),
                (layer.mlp.experts, down),
            ):
                assert wrapper.r["default"] == rank
                assert wrapper.lora_A.default.weight.shape[0] == EXPERTS * rank
                assert wrapper.scaling["default"] == alpha / rank
            assert layer.mlp.shared_experts.down_proj.r["default"] == shared_down
        assert torch.equal(logits(each), logits(model))


def test_rank_pattern_for_one_layer(tmp_path: Path) -> None:
    config = lora(target_modules=MLP, rank_pattern={r"layers\.2\.mlp\.experts\.\d+\.(gate|up)_proj": 4})
    model = randomise(get_peft_model(kimi(), config))
    ranks = [layer.mlp.experts.base_layer.r["default"] for layer in model.base_model.model.model.layers[1:]]
    assert ranks == [6, 8]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(kimi(), tmp_path)), logits(model))


# --- Files: ours, plain PEFT's, and those of per-expert models --------------------------------------------


def per_expert_adapter(folder: Path, projections: Iterable[str] = MLP, **options: Any) -> Path:
    """An adapter as PEFT wrote it for the hub's remote code: a pair of matrices per expert and projection."""
    generator = torch.Generator().manual_seed(3)
    sizes = {name.removesuffix(".weight"): tensor.shape for name, tensor in weights().items()}
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]
    names += [name for name in sizes if name.endswith(tuple(projections)) and ".experts." not in name]
    for layer in (1, 2):
        for expert in range(EXPERTS):
            for projection in projections:
                names.append(f"model.layers.{layer}.mlp.experts.{expert}.{projection}")
                sizes[names[-1]] = (48, 24) if projection == "down_proj" else (24, 48)
    tensors = {}
    for name in names:
        rows, columns = sizes[name]
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(3, columns, generator=generator) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 3, generator=generator) * 0.3
    config = lora(target_modules=[*projections, "o_proj"], **options)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_per_expert_file(options: dict[str, Any], tmp_path: Path) -> None:
    folder = per_expert_adapter(tmp_path, **options)
    expected = oracle(folded(folder, weights(), per_expert_file=True))
    model = PeftModel.from_pretrained(kimi64(), folder)
    assert adapted(model) == dense() | shared() | routed() | attention(names=["o_proj"])
    assert_close_fp64(logits(model), expected)
    # transformers' own way in.
    native = kimi()
    native.load_adapter(str(folder))
    assert adapted(native) == adapted(model)
    assert torch.equal(logits(native), logits(PeftModel.from_pretrained(kimi(), folder)))
    # And it is saved in the fused form with the same meaning.
    model.save_pretrained(tmp_path / "fused")
    assert_close_fp64(oracle(folded(tmp_path / "fused", weights())), expected)


def test_per_expert_file_of_down_only(tmp_path: Path) -> None:
    folder = per_expert_adapter(tmp_path, ["down_proj"])
    model = PeftModel.from_pretrained(kimi64(), folder)
    assert_close_fp64(logits(model), oracle(folded(folder, weights(), per_expert_file=True)))


def test_transformers_integration(tmp_path: Path) -> None:
    """add_adapter, save_pretrained, load_adapter and from_pretrained of an adapter folder: one meaning."""
    kimi().save_pretrained(tmp_path / "base")
    model = KimiK2ForCausalLM.from_pretrained(tmp_path / "base")
    base = logits(model)
    model.add_adapter(lora(target_modules="all-linear"))
    assert adapted(model) == EVERYTHING
    randomise(model).save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert not torch.equal(expected, base)

    loaded = kimi()
    report = loaded.load_adapter(str(tmp_path / "adapter"))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), base)
    assert torch.equal(logits(PeftModel.from_pretrained(kimi(), tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_auto_class(task_type: str | None, tmp_path: Path) -> None:
    kimi().save_pretrained(tmp_path / "base")
    base = KimiK2ForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, lora(target_modules=[*MLP, "q_b_proj"], task_type=task_type)))
    model.save_pretrained(tmp_path / "adapter")
    # Without a task type PEFT stores the model's class, and imports only libraries that it knows unless told.
    allowed = {"import_allowlist": ["transformers_k2.modeling_kimi_k2"]} if task_type is None else {}
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **allowed)
    assert type(again.base_model.model) is KimiK2ForCausalLM
    assert torch.equal(logits(again), logits(model))


def test_plain_peft_on_the_stock_class_reads_our_adapter(tmp_path: Path) -> None:
    """Attention and routed experts: plain PEFT cannot adapt shared experts and dense layers beside them."""
    ours = randomise(
        get_peft_model(
            kimi(), lora(target_modules="all-linear", exclude_modules=r".*(shared_experts|layers\.0\.mlp).*")
        )
    )
    assert adapted(ours) == attention() | routed()
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(stock(), tmp_path)
    assert adapted(theirs) == attention() | routed()
    assert torch.equal(logits(theirs), logits(ours))


def test_our_model_reads_the_adapter_of_plain_peft(tmp_path: Path) -> None:
    theirs = randomise(get_peft_model(stock(), lora(target_modules=["q_a_proj", *MLP])))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(kimi(), tmp_path)
    assert adapted(ours) == adapted(theirs) == attention(names=["q_a_proj"]) | routed()
    assert torch.equal(logits(ours), logits(theirs))


# --- Merging ----------------------------------------------------------------------------------------------


def test_merge_and_unmerge() -> None:
    base = logits(kimi())
    model = randomise(get_peft_model(kimi(), lora(target_modules="all-linear")))
    expected = logits(model)
    model.merge_adapter()
    # A module computes W x + s B (A x), merged (W + s B A) x: other float32 roundings, 1e-6 of logits near 1.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 0.1
    model.unmerge_adapter()
    # (W + d) - d rounds twice at the larger of both: an error of 1e-7 in each weight.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)


def test_merged_model_saves_in_hub_names(tmp_path: Path) -> None:
    model = randomise(get_peft_model(kimi(), lora(target_modules="all-linear")))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert type(merged) is KimiK2ForCausalLM
    assert not adapted(merged)
    expected = folded(tmp_path / "adapter", weights())
    merged.save_pretrained(tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name or "gate_up" in name for name in stored)
    for layer in (1, 2):
        container = f"model.layers.{layer}.mlp.experts"
        for expert in range(EXPERTS):
            gate_up = expected[f"{container}.gate_up_proj"][expert]
            down = expected[f"{container}.down_proj"][expert]
            for projection, weight in zip(MLP, (gate_up[:24], gate_up[24:], down), strict=True):
                # One float32 product and sum against float64.
                found = stored[f"{container}.{expert}.{projection}.weight"].double()
                torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    again = KimiK2ForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


# --- Several adapters, training, precision ----------------------------------------------------------------


def test_several_adapters(tmp_path: Path) -> None:
    model = randomise(get_peft_model(kimi(), lora(target_modules="all-linear")))
    first = logits(model)
    model.add_adapter("second", lora(target_modules=MLP, r=2, lora_alpha=9))
    model.add_adapter("third", lora(target_modules=["o_proj"]))
    for name, parameter in model.named_parameters():
        if ".second." in name or ".third." in name:
            parameter.data.normal_(0, 0.2)
    assert torch.equal(logits(model), first)
    # The first adapter's own layers are no targets for the next one.
    with pytest.raises(ValueError, match="'base_layer' matches nothing"):
        model.add_adapter("fourth", lora(target_modules=["base_layer"]))
    model.add_adapter("fifth", lora(target_modules="all-linear"))
    assert model.peft_config["fifth"].target_modules == model.peft_config["default"].target_modules
    expected = {}
    for name in ("second", "third"):
        model.set_adapter(name)
        expected[name] = logits(model)
        assert not torch.equal(expected[name], first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(kimi()))
    model.save_pretrained(tmp_path)
    for folder, value in (
        (tmp_path, first),
        (tmp_path / "second", expected["second"]),
        (tmp_path / "third", expected["third"]),
    ):
        assert torch.equal(logits(PeftModel.from_pretrained(kimi(), folder)), value)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapted_tensor_gets_a_gradient(checkpointing: bool) -> None:
    model = get_peft_model(kimi(), lora(target_modules="all-linear")).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(EVERYTHING)
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
    ids = torch.arange(404).reshape(4, 101) * 7 % 101
    losses = []
    for _ in range(2):  # B is zero before the first update, so A has no gradient yet
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[1] < losses[0]
    for name, parameter in trainable.items():
        gradient = parameter.grad
        if ".experts." in name and "shared" not in name:  # each expert's own part
            experts = (
                gradient.unflatten(0, (EXPERTS, -1))
                if "lora_A" in name
                else gradient.unflatten(1, (-1, EXPERTS)).movedim(-1, 0)
            )
            assert (experts.abs().amax((1, 2)) > 0).all(), name
        assert gradient.abs().max() > 0, name
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    assert all(
        parameter.grad is None for name, parameter in model.named_parameters() if name not in trainable
    )


def test_gradients_against_float64(tmp_path: Path) -> None:
    """d loss / d A and d B of one expert are the chain rule on d loss / d W of the folded model."""
    model = randomise(get_peft_model(kimi64(), lora(target_modules=MLP)))
    model.save_pretrained(tmp_path)
    model(IDS, labels=IDS).loss.backward()
    reference = stock64(folded(tmp_path, weights()))
    reference(IDS, labels=IDS).loss.backward()
    for layer in (1, 2):
        wrapper = model.base_model.model.model.layers[layer].mlp.experts.base_layer
        a, b = wrapper.lora_A.default.weight, wrapper.lora_B.default.weight
        weight_gradient = reference.model.layers[layer].mlp.experts.gate_up_proj.grad
        for expert in range(EXPERTS):
            rows, columns = slice(expert * 6, expert * 6 + 6), slice(expert, None, EXPERTS)
            assert_close_fp64(a.grad[rows], 2 * b[:, columns].T @ weight_gradient[expert])
            assert_close_fp64(b.grad[:, columns], 2 * weight_gradient[expert] @ a[rows].T)


def test_experts_implementations_agree() -> None:
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = kimi()
        model.set_experts_implementation(implementation)
        results.append(logits(randomise(get_peft_model(model, lora(target_modules="all-linear")))))
    for other in results[1:]:
        # The same products summed in another order, in float32.
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_bf16_and_an_expert_without_tokens(tmp_path: Path) -> None:
    base = kimi()
    for layer in base.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[4] = -1e9
    model = get_peft_model(copy.deepcopy(base).bfloat16(), lora(target_modules="all-linear"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = dict(model.named_parameters())
    for name in (name for name in state if name.endswith("mlp.experts.lora_B.default.weight")):
        assert torch.equal(state[name][:, 4::EXPERTS], before[name][:, 4::EXPERTS])
        assert not torch.equal(state[name][:, 3::EXPERTS], before[name][:, 3::EXPERTS])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path)
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(base.bfloat16()))


# --- Registration -----------------------------------------------------------------------------------------


def upstream_function(module: Any) -> Any:
    return module.convert_peft_config_for_transformers.__closure__[0].cell_contents


def test_other_models_are_untouched() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    upstream = upstream_function(conversion)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=11))
    for model in (stock(), llama, nn.Sequential(nn.Linear(3, 3))):
        ours, theirs = (lora(target_modules=["gate_proj", "up_proj", "0"]) for _ in range(2))
        conversion.convert_peft_config_for_transformers(ours, model=model, conversions=None)
        upstream(theirs, model=model, conversions=None)
        assert ours == theirs
    # Other methods than LoRA are PEFT's affair on Kimi K2 as well.
    config = peft.LoHaConfig(target_modules=["o_proj", "q_proj"])
    assert get_peft_model(kimi(), config).base_model.targeted_module_names == sorted(
        attention(names=["o_proj"])
    )


def test_register_before_and_after_the_import_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file imports PEFT first; PEFT imports the module that is wrapped when it first adapts a model."""
    name = "peft.utils.transformers_weight_conversion"
    here = importlib.import_module(name)
    monkeypatch.setattr(
        peft.utils, "transformers_weight_conversion", here
    )  # undone, with what the import sets
    monkeypatch.delitem(sys.modules, name)
    for _ in range(2):
        peft_mapping.register()
    assert name not in sys.modules
    fresh = importlib.import_module(name)  # wrapped by the import
    assert fresh is not here
    assert upstream_function(fresh).__module__ == name
    wrapped = fresh.convert_peft_config_for_transformers
    peft_mapping.register()
    assert fresh.convert_peft_config_for_transformers is wrapped
    fresh.convert_peft_config_for_transformers = upstream_function(fresh)
    peft_mapping.register()  # wrapped where it was imported before
    assert upstream_function(fresh).__module__ == name


SCRIPT = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import transformers_k2
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
model = KimiK2ForCausalLM(KimiK2Config(**SHAPE))
del sys.modules["peft"]
transformers_k2.register()
assert "peft" not in sys.modules, "imported for nothing"
import peft
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
assert len(names) == 2 * 2 + 2 * 3 + 3, sorted(names)
"""


def test_without_peft_and_with_peft_last() -> None:
    code = SCRIPT.replace("SHAPE", repr(SHAPE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
