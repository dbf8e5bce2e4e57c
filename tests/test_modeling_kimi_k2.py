"""The Kimi K2 classes compute what transformers' DeepSeek-V3 computes, bit for bit, given the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DeepseekV3Model,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from transformers_k2 import (
    KimiK2Config,
    KimiK2ForCausalLM,
    KimiK2ForSequenceClassification,
    KimiK2ForTokenClassification,
    KimiK2Model,
)

STOCK = {
    KimiK2Model: DeepseekV3Model,
    KimiK2ForCausalLM: DeepseekV3ForCausalLM,
    KimiK2ForSequenceClassification: DeepseekV3ForSequenceClassification,
    KimiK2ForTokenClassification: DeepseekV3ForTokenClassification,
}
YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "beta_slow": 1.0}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "K2-Instruct": {},
    "K2.5": {
        "rope_theta": 50000.0,
        "rope_scaling": YARN | {"factor": 64.0, "beta_fast": 32.0},
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
    },
    "Moonlight": {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
    },
    "DeepSeek groups": {"n_group": 3, "topk_group": 2},
    "tied": {"tie_word_embeddings": True},
}
EXPERTS = ("eager", "grouped_mm", "batched_mm")

Pair = tuple[PreTrainedModel, PreTrainedModel]


def pair(config: KimiK2Config, cls: type = KimiK2ForCausalLM, dtype: torch.dtype = torch.float32) -> Pair:
    """Our model and the stock one with its weights; the stock configuration comes from the text of our config.json."""
    ours = cls._from_config(config, dtype=dtype).eval()
    for module in ours.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(std=0.3)
    hub = config.to_hub_dict() | {"model_type": "deepseek_v3"}
    stock = STOCK[cls]._from_config(DeepseekV3Config.from_dict(hub), dtype=dtype).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def implement(models: Pair, attention: str, experts: str) -> None:
    for model in models:
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 331, shape)


def left_padded(batch: int = 3, length: int = 13) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length) >= torch.tensor([0, 4, 9])[:batch, None]).long()
    return {"input_ids": tokens(batch, length) * mask, "attention_mask": mask}


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": tokens(1, sum(lengths)), "position_ids": positions}


INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "plain": lambda: {"input_ids": tokens(2, 17)},
    "left padding": left_padded,
    "packed": lambda: packed(5, 9, 3),
    "far positions": lambda: {"input_ids": tokens(2, 7), "position_ids": torch.arange(131065, 131072)[None]},
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_deepseek(
    variant: str, dtype: torch.dtype, attention: str, experts: str, tiny_config: Callable[..., KimiK2Config]
) -> None:
    models = pair(tiny_config(**VARIANTS[variant]), dtype=dtype)
    implement(models, attention, experts)
    for kind, make in INPUTS.items():
        inputs = make()
        with torch.no_grad():
            got, wanted = (model(**inputs, use_cache=False).logits for model in models)
        assert got.dtype == dtype
        assert torch.equal(got, wanted), kind
        assert got.isfinite().all()
        assert got.float().std() > 0.1  # no degenerate model


def test_every_experts_implementation_is_covered() -> None:
    """The others of the registry need a GPU's kernels."""
    assert set(ALL_EXPERTS_FUNCTIONS.valid_keys()) - set(EXPERTS) == {
        "deepgemm",
        "sonicmoe",
        "k2",
    }  # k2: tests/test_experts.py


def test_experts_run_grouped_by_default(tiny_config: Callable[..., KimiK2Config]) -> None:
    ours, stock = pair(tiny_config())
    assert ours.config._experts_implementation == stock.config._experts_implementation == "grouped_mm"


def test_router_bias_chooses_but_does_not_weigh(tiny_model: KimiK2ForCausalLM) -> None:
    """A bias that is equal for all experts changes nothing; one that lifts an expert sends every token there."""
    ids = tokens(2, 9)
    base = tiny_model(ids).logits
    router = tiny_model.model.layers[1].mlp.gate
    router.e_score_correction_bias += 2.0
    assert torch.equal(tiny_model(ids).logits, base)
    router.e_score_correction_bias[4] += 100.0
    chosen = []
    router.register_forward_hook(lambda module, args, output: chosen.append(output))
    lifted = tiny_model(ids).logits
    _, weights, experts = chosen[0]
    assert (experts == 4).any(1).all()
    assert weights.sum(1).allclose(torch.full((18,), 2.827), rtol=1e-6, atol=0)
    assert not torch.allclose(lifted, base, atol=1e-3)


@pytest.mark.parametrize("variant", ["K2-Instruct", "K2.5"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cache_equals_deepseek_and_the_whole_pass(
    variant: str, attention: str, tiny_config: Callable[..., KimiK2Config]
) -> None:
    models = pair(tiny_config(**VARIANTS[variant]))
    implement(models, attention, "grouped_mm")
    inputs = left_padded()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    steps: list[list[torch.Tensor]] = []
    with torch.no_grad():
        whole = models[0](ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for model in models:
            cache, outputs = None, []
            for start, stop in ((0, 8), (8, 9), (9, 12), (12, 13)):  # a prefill, single tokens, a chunk
                part = slice(start, stop)
                output = model(
                    ids[:, part],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                outputs.append(output.logits)
            steps.append(outputs)
    assert torch.equal(steps[0][0], steps[1][0])  # nothing is cached yet
    real = mask[..., None].bool()
    # Other shapes, other summation order: float32 rounding of values of order one.
    torch.testing.assert_close(
        torch.cat(steps[0], 1) * real, torch.cat(steps[1], 1) * real, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(torch.cat(steps[0], 1) * real, whole * real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(attention: str, tiny_model: KimiK2ForCausalLM) -> None:
    tiny_model.set_attn_implementation(attention)
    inputs = packed(5, 9, 3)
    with torch.no_grad():
        together = tiny_model(**inputs, use_cache=False).logits[0]
        alone = [
            tiny_model(part, use_cache=False).logits[0] for part in inputs["input_ids"].split((5, 9, 3), 1)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)  # summation order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
def test_loss_and_gradients_equal_deepseek(
    experts: str, dtype: torch.dtype, tiny_config: Callable[..., KimiK2Config]
) -> None:
    models = pair(tiny_config(), dtype=dtype)
    implement(models, "sdpa", experts)
    inputs = left_padded()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses = []
    for model in models:
        model.train()
        losses.append(model(**inputs, labels=labels).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    gradients = [{name: weight.grad for name, weight in model.named_parameters()} for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[
        0
    ].items():  # on one thread (conftest.py): batched_mm's backward adds in any order
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    use_reentrant: bool, tiny_model: KimiK2ForCausalLM
) -> None:
    ids = tokens(2, 17)
    tiny_model.train()
    calls: list[int] = []
    tiny_model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        tiny_model.zero_grad()
        tiny_model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([weight.grad.clone() for weight in tiny_model.parameters()])
    assert len(calls) == 3  # once without checkpointing, then forward and again in the backward pass
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_recorded_outputs_equal_deepseek(tiny_config: Callable[..., KimiK2Config]) -> None:
    models = pair(tiny_config())
    implement(models, "eager", "grouped_mm")
    ids = tokens(2, 11)
    flags = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, wanted = (model(ids, **flags) for model in models)
    for kind, count in {"router_logits": 2, "hidden_states": 4, "attentions": 3}.items():
        assert len(got[kind]) == len(wanted[kind]) == count
        assert all(torch.equal(one, other) for one, other in zip(got[kind], wanted[kind], strict=True)), kind
    assert got.router_logits[0].shape == (22, 6)  # (tokens, experts), before the sigmoid


@pytest.mark.parametrize("head", [KimiK2ForSequenceClassification, KimiK2ForTokenClassification])
def test_classifiers_equal_deepseek(head: type, tiny_config: Callable[..., KimiK2Config]) -> None:
    ours, stock = pair(tiny_config(num_labels=5), cls=head)
    inputs = left_padded()
    labels = torch.tensor([0, 4, 2])
    if head is KimiK2ForTokenClassification:
        labels = torch.randint(0, 5, (3, 13)).masked_fill(inputs["attention_mask"] == 0, -100)
    got, wanted = ours(**inputs, labels=labels), stock(**inputs, labels=labels)
    assert got.logits.shape == ((3, 5) if labels.ndim == 1 else (3, 13, 5))
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)


@pytest.mark.parametrize("head", [KimiK2ForSequenceClassification, KimiK2ForTokenClassification])
def test_classifiers_start_from_a_language_model(
    head: type, tiny_model: KimiK2ForCausalLM, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    model, report = head.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    assert {key.split(".")[0] for key in report["missing_keys"]} == {"score"}
    ids = tokens(2, 9)
    assert torch.equal(model.model(ids).last_hidden_state, tiny_model.model(ids).last_hidden_state)
    assert model(ids).logits.shape[-1] == 7


def test_a_wrong_shape_is_also_the_error_of_transformers(
    tiny_model: KimiK2ForCausalLM, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=r"\[331, 72\].*\[330, 72\]"):
            KimiK2ForCausalLM.from_pretrained(tmp_path, vocab_size=330)


@pytest.mark.parametrize("cls", STOCK)
def test_parallel_plans_equal_deepseek(cls: type, tiny_config: Callable[..., KimiK2Config]) -> None:
    with torch.device("meta"):
        ours = cls(tiny_config())
        stock = STOCK[cls](DeepseekV3Config(num_hidden_layers=3, num_mtp_layers=0))
    for plan in ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"):
        assert getattr(ours, plan)
        assert getattr(ours, plan) == getattr(stock, plan), plan
    assert ours._no_split_modules == stock._no_split_modules
    assert (
        ours._keep_in_fp32_modules_strict == stock._keep_in_fp32_modules_strict == {"e_score_correction_bias"}
    )


def test_the_class_tree_is_ours(
    tiny_model: KimiK2ForCausalLM, tiny_config: Callable[..., KimiK2Config]
) -> None:
    assert type(tiny_model.model) is type(KimiK2ForSequenceClassification(tiny_config()).model) is KimiK2Model
    assert tiny_model.model.config is tiny_model.config


@pytest.mark.parametrize("experts", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(experts: str, tiny_config: Callable[..., KimiK2Config]) -> None:
    """`_can_compile_fullgraph`, as upstream claims; the eager loop over experts depends on the data and cannot."""
    model = KimiK2ForCausalLM(tiny_config(num_hidden_layers=2)).eval()
    model.set_experts_implementation(experts)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = tokens(2, 9)
    with torch.no_grad():
        got, wanted = (model(ids, use_cache=False).logits for model in (compiled, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_with_inductor(tiny_config: Callable[..., KimiK2Config]) -> None:
    model = KimiK2ForCausalLM(tiny_config(num_hidden_layers=2)).train()
    ids = tokens(2, 9)
    gradients = []
    for version in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = version(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    # Fused float32 kernels sum in another order.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_load_state_dict_takes_the_names_that_are_saved(
    tiny_model: KimiK2ForCausalLM, tmp_path: Path
) -> None:
    """Trainer resumes with it, file by file where a checkpoint is sharded."""
    tiny_model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    model = KimiK2ForCausalLM(tiny_model.config)
    missing: set[str] = set(model.state_dict())
    for file in files:
        result = model.load_state_dict(load_file(file), strict=False)
        assert not result.unexpected_keys
        missing &= set(result.missing_keys)
    assert not missing
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    model.load_state_dict(tiny_model.state_dict())
    whole = {name: value for file in files for name, value in load_file(file).items()}
    model.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**whole, "model.layers.1.mlp.shared_experts.other": torch.ones(1)})
