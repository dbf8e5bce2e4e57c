"""LoRA on packed INT4 experts: PEFT's `target_parameters` on the dequantised model is the oracle, in double precision."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.packed_lora import KEY, PackedLoraConfig
from transformers_k2.quantization.int4 import dequantize, pack, quantize
from transformers_k2.quantization.packed_experts import STACKS, PackedExperts
from transformers_k2.recompute import apply_recompute

# PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXPERTS = 6
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 56,
    "moe_intermediate_size": 32,  # 2 I equals the hidden size: a transposed factor would fit as well
    "n_routed_experts": EXPERTS,
    "rope_scaling": None,
    "initializer_range": 0.2,
}
STOCK = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64}
IDS = torch.arange(66).reshape(2, 33) * 37 % 101
MLP = ["gate_proj", "up_proj", "down_proj"]
ROUTED = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
Models = Callable[..., tuple[KimiK2ForCausalLM, KimiK2ForCausalLM]]


@pytest.fixture
def models(tiny_config: Callable[..., KimiK2Config]) -> Models:
    """Two models with the same weights, INT4's: dequantised in one, packed in the other."""

    def make(dtype: torch.dtype = torch.float32) -> tuple[KimiK2ForCausalLM, KimiK2ForCausalLM]:
        torch.manual_seed(0)
        dense = KimiK2ForCausalLM(tiny_config(**SHAPE)).eval()
        packed = copy.deepcopy(dense)
        for layer, other in zip(dense.model.layers[1:], packed.model.layers[1:], strict=True):
            experts = PackedExperts(EXPERTS, 64, 32)
            for name in STACKS:
                weight = layer.mlp.experts.get_parameter(name).data
                codes, scale = quantize(weight)
                weight.copy_(dequantize(codes, scale, torch.float32))
                experts.get_parameter(f"{name}_packed").copy_(pack(codes))
                experts.get_parameter(f"{name}_scale").copy_(scale)
            other.mlp.experts = experts
        if dtype == torch.float64:
            dense.set_experts_implementation("eager")  # grouped_mm has none
        return dense.to(dtype), packed.to(dtype)

    return make


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)


def shared_lora(**options: Any) -> PackedLoraConfig:
    return PackedLoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", "shared_a": True} | options)


def randomise(model: nn.Module, seed: int = 2) -> Any:
    """Trained adapters: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of everything that is trained, and of the embeddings: what reaches the inputs."""
    embeddings: list[Tensor] = []
    inner: Any = model
    handle = inner.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embeddings.append(output.detach().requires_grad_()) or embeddings[0]
    )
    inner(IDS, labels=IDS).loss.backward()
    handle.remove()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert embeddings[0].grad is not None
    return found | {"inputs": embeddings[0].grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], close: float = 1e-6) -> None:
    """To float32's precision: transformers' norms compute in it whatever the model's dtype."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (found[name] - value).norm() <= close * value.norm(), name


TARGETS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": MLP, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    {"target_modules": MLP, "alpha_pattern": {"gate_up_proj": 7}, "rank_pattern": {"gate_up_proj": 5}},
    {"target_modules": r".*\.2\.mlp\.experts\.\d+\.(gate|up)_proj"},
    {"target_modules": ["experts.down_proj", "o_proj"]},
    {"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"]},
    {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]},
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_equals_peft_on_the_dequantised_model(
    models: Models, options: dict[str, Any], tmp_path: Path
) -> None:
    dense, packed = models(torch.float64)
    if options is TARGETS[0]:
        assert all(
            module.use_kernel_form() for module in packed.modules() if isinstance(module, PackedExperts)
        )
    adapted = []
    for name, model in (("dense", dense), ("packed", packed)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # PEFT's way to say that something was ignored
            adapted.append(randomise(get_peft_model(model, lora(**options))).double())
        adapted[-1].save_pretrained(tmp_path / name)
    theirs, ours = adapted
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("dense", "packed")
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"] or [])  # a set
    assert configs[0] == configs[1]
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("dense", "packed")]
    assert list(files[0]) == list(files[1])
    assert any(".mlp.experts." in name for name in files[0])
    assert all(torch.equal(files[1][name], value) for name, value in files[0].items())
    assert {name for name, value in ours.named_parameters() if value.requires_grad} == {
        name for name, _ in ours.named_parameters() if ".lora_" in name
    }
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(ours), logits(models(torch.float64)[1]), atol=1e-2)
    assert_same(gradients(ours), gradients(theirs))


def test_adapters_move_between_both(models: Models, tmp_path: Path) -> None:
    """By plain PEFT on transformers' own class, in both directions."""
    dense, packed = models()
    config = DeepseekV3Config(**{**dense.config.to_dict(), **STOCK})
    config.model_type = "deepseek_v3"
    stock = DeepseekV3ForCausalLM(config).eval()
    stock.load_state_dict(dense.state_dict())

    options = {"target_modules": "all-linear", "exclude_modules": r".*(shared_experts|layers\.0\.mlp).*"}
    ours = randomise(get_peft_model(copy.deepcopy(packed), lora(**options)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "ours")
    # float32: the same sums in another order, over logits of the order of 1.
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-3, atol=1e-3)
    assert (logits(ours) - logits(packed)).abs().mean() > 0.3

    theirs = randomise(get_peft_model(copy.deepcopy(stock), lora(target_modules=["q_a_proj", *MLP])), seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-3, atol=1e-3)

    # In bfloat16 ours is no further from that than PEFT's own.
    errors = []
    for base in (packed, stock):
        narrow = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path / "ours")
        assert {value.dtype for name, value in narrow.named_parameters() if ".lora_" in name} == {
            torch.float32
        }
        errors.append((logits(narrow).float() - logits(ours)).norm())
    assert errors[0] < 1.2 * errors[1]
    for low in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path / "ours", low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), logits(ours))


def test_transformers_integration(models: Models, tmp_path: Path) -> None:
    _, model = models()
    base = logits(model)
    loaded = copy.deepcopy(model)
    model.add_adapter(lora(target_modules="all-linear"))
    randomise(model).save_pretrained(tmp_path)
    expected = logits(model)
    assert not torch.equal(expected, base)
    report = loaded.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), base)


def test_several_adapters(models: Models, tmp_path: Path) -> None:
    """Each alone, none, and two at a time, against PEFT on the dequantised model."""
    results: list[list[Tensor]] = []
    for model in models():
        base = logits(model)
        adapted: Any = randomise(get_peft_model(model, lora(target_modules="all-linear")))
        adapted.add_adapter("second", lora(target_modules=MLP, r=2, lora_alpha=9))
        for name, parameter in adapted.named_parameters():
            if ".second." in name:
                torch.nn.init.normal_(parameter, 0, 0.2, torch.Generator().manual_seed(len(name)))
        found = [logits(adapted)]
        adapted.set_adapter("second")
        found.append(logits(adapted))
        adapted.base_model.set_adapter(["default", "second"])
        found.append(logits(adapted))
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), base)
        adapted.set_adapter("second")
        adapted.delete_adapter("default")
        assert torch.equal(logits(adapted), found[1])
        assert torch.equal(logits(adapted.unload()), base)
        results.append(found)
    for mine, its in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
    assert (results[0][2] - results[0][0]).abs().max() > 0.1


def test_state_dict_round_trip(models: Models) -> None:
    _, packed = models()
    model = randomise(get_peft_model(copy.deepcopy(packed), lora(target_modules="all-linear")))
    other: Any = get_peft_model(packed, lora(target_modules="all-linear"))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


# --- Options that PEFT's wrapper does not have ------------------------------------------------------------


def test_dropout_survives_a_file_that_plain_peft_loads(models: Models, tmp_path: Path) -> None:
    dense, packed = models()
    options = {"target_modules": [*MLP, "o_proj"], "lora_dropout": 0.25}
    model = randomise(get_peft_model(copy.deepcopy(packed), lora(**options))).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["lora_dropout"] == 0
    assert stored["auto_mapping"] == {KEY: {"lora_dropout": 0.25}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others: keys of the configuration that are not known
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^LoRA lora_dropout=0\.25 was made for packed INT4 experts"):
        PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)

    resumed: Any = PeftModel.from_pretrained(packed, tmp_path, is_trainable=True)
    assert resumed.peft_config["default"].lora_dropout == 0.25
    assert resumed.peft_config["default"].auto_mapping is None
    attention = resumed.base_model.model.model.layers[1].self_attn.o_proj
    assert attention.lora_dropout["default"].p == 0.25
    torch.manual_seed(3)
    loss = resumed.train()(IDS, labels=IDS).loss.item()
    torch.manual_seed(3)
    assert model.train()(IDS, labels=IDS).loss.item() == loss
    assert model.train()(IDS, labels=IDS).loss.item() != loss  # another draw
    resumed.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["auto_mapping"] == {
        KEY: {"lora_dropout": 0.25}
    }


def test_dropout_without_a_task_type(models: Models, tmp_path: Path) -> None:
    """There PEFT writes the model's class into `auto_mapping`."""
    _, packed = models()
    config = lora(target_modules=MLP, lora_dropout=0.5, task_type=None)
    get_peft_model(packed, config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert stored["base_model_class"] == "KimiK2ForCausalLM"
    assert stored[KEY] == {"lora_dropout": 0.5}


def test_shared_a(models: Models, tmp_path: Path) -> None:
    """The gradient of a shared A is the sum over those of the experts' copies, in PEFT's form in every file."""
    dense, packed = models(torch.float64)
    model: Any = randomise(get_peft_model(copy.deepcopy(packed), shared_lora(target_modules=MLP))).double()
    experts = model.base_model.model.model.layers[1].mlp.experts
    assert experts.lora_A["default"].weight.shape == (3, 32)
    assert experts.base_layer.lora_A["default"].weight.shape == (6, 64)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a = stored["base_model.model.model.layers.1.mlp.experts.lora_A.weight"]
    assert torch.equal(a, experts.lora_A["default"].weight.repeat(EXPERTS, 1))

    expanded: Any = PeftModel.from_pretrained(dense, tmp_path).double()
    torch.testing.assert_close(logits(model), logits(expanded), rtol=1e-6, atol=1e-6)
    for name, parameter in expanded.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    expected = gradients(expanded)
    for name in list(expected):
        if "mlp.experts" in name and "lora_A" in name:
            expected[name] = expected[name].unflatten(0, (EXPERTS, -1)).sum(0)
    assert_same(gradients(model), expected)

    resumed: Any = PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path, is_trainable=True).double()
    assert resumed.peft_config["default"].shared_a
    assert {name: value.shape for name, value in resumed.named_parameters()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    assert torch.equal(logits(resumed), logits(model))
    with pytest.raises(ValueError, match=r"^LoRA shared_a=True was made for packed INT4 experts"):
        get_peft_model(models()[0], shared_lora(target_modules=MLP))
    differing = get_peft_model_state_dict(randomise(get_peft_model(models()[1], lora(target_modules=MLP))))
    with pytest.raises(ValueError, match=r"^LoRA shared_a is True, but in .* the experts' A differ"):
        set_peft_model_state_dict(resumed, differing)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": MLP, "use_dora": True}, "use_dora=True is impossible"),
    ({"target_modules": MLP, "lora_bias": True}, "lora_bias=True is impossible"),
    ({"target_modules": MLP, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' is impossible"),
    (
        {"target_parameters": [*ROUTED, "mlp.gate.weight"], "lora_dropout": 0.1},
        r"lora_dropout=0\.1 is impossible",
    ),
    (
        {"target_parameters": ["mlp.experts.gate_up_proj_packed"]},
        r"'mlp\.experts\.gate_up_proj_packed' matches nothing .*choices: .*mlp\.experts\.gate_up_proj",
    ),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_errors(models: Models, options: dict[str, Any], message: str) -> None:
    _, packed = models()
    config = lora(**options)
    modules = [type(module) for module in packed.modules()]
    with pytest.raises(ValueError, match=f"^LoRA .*{message}") as error:
        get_peft_model(packed, config)
    assert "\n" not in str(error.value)
    assert [type(module) for module in packed.modules()] == modules  # nothing half done
    assert type(config) is LoraConfig


def test_merging_is_refused_before_the_first_layer(models: Models) -> None:
    dense, packed = models()
    model = randomise(get_peft_model(packed, lora(target_modules="all-linear")))
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged in memory.*dequantize=True"):
            merge()
    assert torch.equal(logits(model), expected)
    get_peft_model(dense, lora(target_modules="all-linear")).merge_and_unload()  # others may
    with pytest.raises(ValueError, match="mixed adapter batches"):
        model.eval()(IDS, adapter_names=["default", "__base__"])


# --- Training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", ["checkpointing", "recompute", "full", "ddp"])
def test_gradients_are_the_same(models: Models, way: str, dropout: float) -> None:
    """Computed again, with the masks of the first time, or averaged over one process."""

    def run(way: str | None) -> dict[str, Tensor]:
        _, packed = models()
        model: Any = get_peft_model(packed, lora(target_modules=MLP, lora_dropout=dropout)).train()
        randomise(model)
        handle, trained = None, model
        if way == "checkpointing":
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        elif way in ("recompute", "full"):
            handle = apply_recompute(
                packed, ["swiglu", "moe_down", "norms"] if way == "recompute" else ["full"]
            )
        elif way == "ddp":
            trained = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(4)
        trained(IDS, labels=IDS).loss.backward()
        if handle is not None:
            handle.remove()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    if way == "ddp":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found, expected = run(way), run(None)
    finally:
        if way == "ddp":
            dist.destroy_process_group()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_expert_without_tokens(models: Models) -> None:
    _, packed = models()
    for layer in packed.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[4] = -1e9
    model: Any = randomise(get_peft_model(packed, lora(target_modules=MLP)))
    model(IDS, labels=IDS).loss.backward()
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    for each in (wrapper, wrapper.base_layer):
        a = each.lora_A.default.weight.grad.unflatten(0, (EXPERTS, -1))
        b = each.lora_B.default.weight.grad.unflatten(1, (-1, EXPERTS)).movedim(-1, 0)
        for gradient in (a, b):
            assert not gradient[4].any()
            assert (gradient[[0, 1, 2, 3, 5]].abs().amax((1, 2)) > 0).all()


def test_preparing_for_kbit_training_keeps_packed_weights(models: Models) -> None:
    _, packed = models(torch.bfloat16)
    before = copy.deepcopy(packed.model.layers[1].mlp.experts.state_dict())
    prepare_model_for_kbit_training(packed)
    model: Any = get_peft_model(packed, lora(target_modules="all-linear"))
    experts = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
    assert experts.gate_up_proj_packed.dtype == torch.int32
    assert experts.gate_up_proj_scale.dtype == experts.down_proj_scale.dtype == torch.bfloat16
    after = experts.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model(IDS, labels=IDS).loss.backward()


# --- Memory -----------------------------------------------------------------------------------------------


def kept(layer: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    parameters = {value.untyped_storage().data_ptr() for value in layer.parameters()}
    storages: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        output = layer(hidden.clone().requires_grad_(), index, weights.clone().requires_grad_())
    del output
    return sum(storages.values())


def test_nothing_of_the_weights_size_is_kept(tiny_config: Callable[..., KimiK2Config]) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 32, "num_hidden_layers": 2}
    dense = KimiK2ForCausalLM(tiny_config(**SHAPE | sizes))
    packed = copy.deepcopy(dense)
    packed.model.layers[1].mlp.experts = PackedExperts(32, 256, 64)
    hidden = torch.randn(24, 256)
    weights, index = torch.rand(24, 32).topk(2)
    found = []
    for model in (packed, dense):
        layer: Any = get_peft_model(model, lora(target_parameters=ROUTED)).base_model.model.model.layers[1]
        found.append(kept(layer.mlp.experts, hidden, index, weights))
    pairs = 24 * 2
    assert found[0] == pairs * 2 * 64 * 4 + 24 * 256 * 4 + pairs * (
        8 + 4
    )  # gate_up_out, hidden, ids and weights
    assert found[1] > 20 * found[0]
