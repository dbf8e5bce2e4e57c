"""Every trainable parameter has exactly one rule, on the models that the defaults know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, KimiK2ForSequenceClassification
from transformers_k2.optim import DEFAULT_RULES, MuonClip, Rule, find_attention
from transformers_k2.optim.groups import parameter_groups

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def roles(model: nn.Module) -> dict[str, str]:
    return {name: group["algorithm"] for group in parameter_groups(model) for name, _ in group["params"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 1},
    ],
)
def test_kimi_k2(tiny_config: Callable[..., KimiK2Config], changes: dict) -> None:
    model = KimiK2ForCausalLM(tiny_config(**changes))
    found = roles(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim >= 2 and not name.startswith(("lm_head", "model.embed_tokens"))
        assert found[name] == ("muon" if hidden else "adamw"), name


def test_classification_head_and_router_bias(tiny_config: Callable[..., KimiK2Config]) -> None:
    model = KimiK2ForSequenceClassification(tiny_config())
    router = model.model.layers[1].mlp.gate
    bias = router.e_score_correction_bias
    del router.e_score_correction_bias
    router.e_score_correction_bias = nn.Parameter(bias)
    found = roles(model)
    assert found["score.weight"] == "adamw"
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"] == "adamw"
    assert found["model.layers.1.mlp.gate.weight"] == "muon"


def test_gate_and_up_are_two_matrices(tiny_config: Callable[..., KimiK2Config]) -> None:
    blocks = {
        name: group["row_blocks"]
        for group in parameter_groups(KimiK2ForCausalLM(tiny_config()))
        for name, _ in group["params"]
    }
    assert blocks["model.layers.1.mlp.experts.gate_up_proj"] == (40,)
    assert blocks["model.layers.1.mlp.experts.down_proj"] is None
    assert blocks["model.layers.1.self_attn.q_b_proj.weight"] is None


def test_what_an_optimizer_says_of_itself(tiny_config: Callable[..., KimiK2Config]) -> None:
    said = repr(MuonClip.for_model(KimiK2ForCausalLM(tiny_config()), 2e-4))
    assert said.startswith("MuonClip (QK-Clip: 3 attention modules at tau 100.0)\n")
    assert "muon  lr 0.0002: 2 parameters, 69,120 numbers, rows cut into (40,)" in said
    assert len(said.splitlines()) == 8


def test_heads_are_matrices_when_asked(tiny_config: Callable[..., KimiK2Config]) -> None:
    model = KimiK2ForCausalLM(tiny_config())
    groups = parameter_groups(model, attention=find_attention(model), per_head=True)
    blocks = {name: group["row_blocks"] for group in groups for name, _ in group["params"]}
    assert blocks["model.layers.0.self_attn.q_b_proj.weight"] == (32,)  # 20 + 12
    assert blocks["model.layers.0.self_attn.kv_b_proj.weight"] == (20, 28)
    assert blocks["model.layers.0.self_attn.o_proj.weight"] is None


@pytest.mark.parametrize(
    "build", [lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL))]
)
def test_relatives(build: Callable[[], nn.Module]) -> None:
    model = build()
    found = roles(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["model.layers.0.self_attn.k_proj.weight"] == "muon"
    assert found["model.layers.1.mlp.down_proj.weight"] == "muon"
    assert {found[name] for name in found if name.endswith("bias")} <= {"adamw"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_factors_go_to_adamw(tiny_config: Callable[..., KimiK2Config]) -> None:
    model = get_peft_model(
        KimiK2ForCausalLM(tiny_config()),
        LoraConfig(r=3, target_modules=["q_b_proj", "o_proj"], modules_to_save=["lm_head"]),
    )
    found = roles(model)
    assert set(found.values()) == {"adamw"}
    assert any("lora_A" in name for name in found)
    assert any("lm_head" in name for name in found)
    with pytest.warns(UserWarning, match="QK-Clip leaves 3 of 3 attention modules alone"):
        MuonClip.for_model(model, 1e-3)


def test_no_rule_or_two_is_an_error() -> None:
    model = nn.ModuleDict({"mixer": nn.Linear(3, 5, bias=False)})
    with pytest.raises(ValueError, match=r"mixer\.weight \[5, 3\] matches none of the \d+ rules"):
        parameter_groups(model)
    rules = (Rule("mixer.*", "muon"), Rule(".*weight", "adamw"))
    with pytest.raises(ValueError, match=r"mixer\.weight \[5, 3\] matches 'mixer\.\*' and '\.\*weight'"):
        parameter_groups(model, rules)
    (group,) = parameter_groups(model, [Rule("mixer.*", "muon", options={"lr": 0.5})])
    assert MuonClip([group], lr=0.1).param_groups[0]["lr"] == 0.5


def test_frozen_parameters_need_no_rule() -> None:
    model = nn.ModuleDict({"mixer": nn.Linear(3, 5, bias=False), "norm": nn.LayerNorm(3)})
    model["mixer"].requires_grad_(False)
    assert set(roles(model)) == {"norm.weight", "norm.bias"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model)


def test_rules_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="algorithm is 'sgd'"):
        Rule(".*", "sgd")
    with pytest.raises(ValueError, match="num_matrices is 0"):
        Rule(".*", "muon", num_matrices=0)
    vector = nn.ParameterDict({"scale": nn.Parameter(torch.ones(4))})
    with pytest.raises(ValueError, match=r"scale \[4\] is to be updated by Muon"):
        parameter_groups(vector, [Rule("scale", "muon")])
    odd = nn.ParameterDict({"fused": nn.Parameter(torch.ones(2, 5, 3))})
    with pytest.raises(ValueError, match="5 rows cannot be cut into num_matrices=2"):
        parameter_groups(odd, [Rule("fused", "muon", num_matrices=2)])


def test_default_rules_are_disjoint_on_compiled_and_wrapped_names(
    tiny_config: Callable[..., KimiK2Config],
) -> None:
    plain = KimiK2ForCausalLM(tiny_config())
    names = set(roles(plain))
    assert set(roles(torch.compile(plain))) == names  # pyright: ignore[reportArgumentType]
    assert len({rule.pattern for rule in DEFAULT_RULES}) == len(DEFAULT_RULES)
