"""What peft_mapping.py relies on in PEFT, or exists because of: a test for each fact (PEFT 0.21.2).

A failure after an upgrade says which part of the mapping to look at; a defect that is gone is code to delete.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.utils import transformers_weight_conversion as conversion
from torch import nn

from test_peft import (
    ATTENTION,
    IDS,
    MLP,
    adapted,
    attention,
    kimi,
    logits,
    lora,
    per_expert_adapter,
    routed,
    stock,
    upstream_function,
)
from transformers_k2 import packed_lora, peft_mapping

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
)
UPSTREAM = upstream_function(conversion)


def test_every_injection_calls_the_function_that_we_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        conversion,
        "convert_peft_config_for_transformers",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    model, config = stock(), lora(target_modules=["o_proj"])
    get_peft_model(model, config)
    native = stock()
    native.add_adapter(lora(target_modules=["o_proj"]))
    for (args, kwargs), asked in zip(calls, (model, native), strict=True):
        assert isinstance(args[0], LoraConfig)
        assert kwargs["model"] is asked
        assert set(kwargs) == {"model", "conversions"}


def test_deepseek_loses_shared_experts_and_dense_layers() -> None:
    """Why the mapping is not a line in PEFT's table."""
    model = get_peft_model(stock(), lora(target_modules=[*MLP, "o_proj"]))
    assert adapted(model) == routed() | attention(names=["o_proj"])


def test_an_unknown_model_type_loses_the_routed_experts() -> None:
    config = lora(target_modules=MLP)
    UPSTREAM(config, model=kimi(), conversions=None)
    assert (config.target_modules, config.target_parameters) == (set(MLP), None)
    assert "kimi_k2" not in conversion._MODEL_TO_CONVERSION_PATTERN


def test_partly_matching_targets_are_no_error() -> None:
    model = get_peft_model(stock(), lora(target_modules=["q_proj", "o_proj"]))
    assert adapted(model) == attention(names=["o_proj"])


def test_no_target_parameters_and_an_empty_list_are_kept_apart(tmp_path: Path) -> None:
    for value in (None, [], ["a"]):
        lora(target_modules=["o_proj"], target_parameters=value).save_pretrained(tmp_path)
        assert LoraConfig.from_pretrained(tmp_path).target_parameters == value


def test_patterns_are_sorted_when_saved_and_the_first_match_counts(tmp_path: Path) -> None:
    lora(target_modules=["o_proj"], rank_pattern={"o_proj": 5, ".*proj": 7}).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert list(config.rank_pattern) == [".*proj", "o_proj"]
    model = get_peft_model(stock(), config)
    assert model.base_model.model.model.layers[0].self_attn.o_proj.r["default"] == 7


def test_fused_gate_up_has_the_key_and_the_doubled_rank_that_we_write() -> None:
    ours, theirs = lora(target_modules=MLP), lora(target_modules=MLP)
    get_peft_model(kimi(), ours)
    get_peft_model(stock(), theirs)
    assert ours.rank_pattern == theirs.rank_pattern == {r".*\.gate_up_proj": 6}
    assert ours.alpha_pattern == theirs.alpha_pattern == {r".*\.gate_up_proj": 12}


def test_rank_stabilised_scaling_grows_when_peft_doubles_the_rank() -> None:
    """2 alpha / sqrt(2 r) is not alpha / sqrt(r): per-expert files with use_rslora load wrongly without us."""
    scalings = []
    for model in (stock(), kimi()):
        layer = get_peft_model(
            model, lora(target_modules=MLP, use_rslora=True)
        ).base_model.model.model.layers[1]
        scalings.append(
            layer.mlp.experts.base_layer.scaling["default"] / layer.mlp.experts.scaling["default"]
        )
    assert scalings == pytest.approx([2**0.5, 1.0], rel=1e-12)


def test_keys_of_parameters_are_said_to_be_ignored() -> None:
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match any .*gate_up_proj"):
        get_peft_model(stock(), lora(target_modules=MLP))


def test_layers_to_transform_is_not_heeded_for_parameters() -> None:
    config = lora(target_modules=["o_proj"], target_parameters=["gate_up_proj"], layers_to_transform=[1])
    assert adapted(get_peft_model(stock(), config)) == attention([1], ["o_proj"]) | routed(
        names=["gate_up_proj"]
    )


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_parameters_refuse_these_options_halfway(option: dict) -> None:
    model = stock()
    with pytest.raises(ValueError, match="does not work with"):
        get_peft_model(model, lora(target_modules=ATTENTION, target_parameters=["gate_up_proj"], **option))
    assert adapted(model) >= attention()


def test_variants_are_marked_in_the_configuration() -> None:
    variants = {
        field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")
    }
    assert {"use_dora", "velora_config", "kasa_config", "alora_invocation_tokens"} <= variants
    config = lora(target_modules=["o_proj"])
    assert not any(getattr(config, name) for name in variants)


def test_per_expert_file_without_down_proj_is_not_found(tmp_path: Path) -> None:
    """A documented limit: PEFT looks for gate_up_proj in `experts.base_layer`, its place beside down_proj."""
    folder = per_expert_adapter(tmp_path, ["gate_proj", "up_proj"])
    with pytest.warns(UserWarning, match=r"missing adapter keys.*mlp\.experts\.lora_A"):
        PeftModel.from_pretrained(kimi(), folder)


def test_lora_on_fused_experts_keeps_a_copy_of_them_for_backward() -> None:
    """The documented cost: bytes that autograd saves and that are no parameters, for one layer's experts."""

    def saved_bytes(model: nn.Module) -> int:
        storages = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = model(IDS, labels=IDS)
        del kept
        return sum(storages.values())

    options = {"target_modules": ["embed_tokens"]}  # so that both differ in the experts only
    without = saved_bytes(get_peft_model(kimi(), lora(**options)))
    experts = {
        "target_parameters": [
            "model.layers.2.mlp.experts.gate_up_proj",
            "model.layers.2.mlp.experts.down_proj",
        ]
    }
    with_experts = saved_bytes(get_peft_model(kimi(), lora(**options, **experts)))
    size = sum(parameter.nbytes for parameter in kimi().model.layers[2].mlp.experts.parameters())
    assert with_experts - without >= size


def test_peft_reads_a_renamed_property() -> None:
    """Why our own tests ignore one FutureWarning."""
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        get_peft_model(kimi(), lora(target_modules=["o_proj"]))


def test_the_seams_of_packed_experts() -> None:
    """What packed_lora.py wraps, and how PEFT finds parameters, its wrappers and custom modules."""
    parameters = inspect.getsource(packed_lora._upstream_inject_parameters)
    assert "named_parameters" in parameters
    assert list(inspect.signature(packed_lora._upstream_check_merge_allowed).parameters) == ["self"]
    assert "_check_merge_allowed()" in inspect.getsource(LoraModel._unload_and_optionally_merge)
    assert "_custom_modules" in inspect.getsource(LoraModel._create_new_module)
    assert "auto_mapping" in {field.name for field in dataclasses.fields(LoraConfig)}


def test_the_wrapper_is_in_place() -> None:
    assert UPSTREAM.__module__ == conversion.__name__
    assert conversion.convert_peft_config_for_transformers.__module__ == peft_mapping.__name__
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(logits(get_peft_model(kimi(), lora(target_modules="all-linear"))), logits(kimi()))
