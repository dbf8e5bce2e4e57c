"""Experts trained for INT4 compute what plain experts with dequantised weights compute, on one process and on two."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, experts
from transformers_k2.parallel import Layout, RandomWeights, build_model
from transformers_k2.quantization import int4, prepare_qat, remove_qat
from transformers_k2.quantization.qat import TARGETS, is_prepared, round_weights
from transformers_k2.recompute import apply_recompute

experts.register()

IDS = torch.arange(33).reshape(3, 11) * 37 % 331
SIZES = {"hidden_size": 64, "moe_intermediate_size": 96}


@pytest.fixture
def model(tiny_config: Callable[..., KimiK2Config]) -> KimiK2ForCausalLM:
    return KimiK2ForCausalLM(tiny_config(**SIZES))


def on_grid(
    model: KimiK2ForCausalLM, targets: tuple[str, ...] = TARGETS, group_size: int = 32
) -> KimiK2ForCausalLM:
    """A plain copy whose experts were quantised and dequantised."""
    plain = copy.deepcopy(model)
    remove_qat(plain)
    for name, parameter in plain.named_parameters():
        if name.split(".")[-1] in targets and ".experts." in name:
            codes, scale = int4.quantize(parameter.data, group_size)
            parameter.data = int4.dequantize(codes, scale, parameter.dtype)
    return plain


def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "k2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_with_quantised_experts(
    model: KimiK2ForCausalLM, implementation: str, dtype: torch.dtype
) -> None:
    """And the gradient of a weight is that of the quantised weight in its place."""
    model = model.to(dtype)
    model.set_experts_implementation(implementation)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = on_grid(model)
    unquantised, _ = gradients(model)
    prepare_qat(model)
    loss, grads = gradients(model)
    expected_loss, expected = gradients(plain)
    assert torch.equal(loss, expected_loss)
    assert not torch.equal(loss, unquantised)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    model.eval()
    assert torch.equal(model(IDS).logits, plain.eval()(IDS).logits)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_group_size_targets_and_twice(model: KimiK2ForCausalLM) -> None:
    prepare_qat(model)
    prepare_qat(model, 8, targets=("down_proj",))
    assert torch.equal(gradients(model)[0], gradients(on_grid(model, ("down_proj",), 8))[0])
    copied = copy.deepcopy(model)
    plain = KimiK2ForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    remove_qat(model)
    remove_qat(model)
    assert not is_prepared(model)
    assert torch.equal(gradients(model)[0], gradients(plain)[0])
    assert is_prepared(copied)  # with weights of its own
    with torch.no_grad():
        copied.model.layers[1].mlp.experts.down_proj.zero_()
    assert torch.equal(gradients(copied)[0], gradients(on_grid(copied, ("down_proj",), 8))[0])


def test_trains_and_saves_a_plain_model(model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    prepare_qat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = gradients(model)[0]
    for _ in range(3):
        gradients(model)
        optimizer.step()
    trained = gradients(model)[0]
    assert trained < first
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "masters")
    masters = KimiK2ForCausalLM.from_pretrained(tmp_path / "masters", dtype=torch.float32)
    assert torch.equal(on_grid(masters)(IDS).logits, logits)
    round_weights(model)
    assert torch.equal(model(IDS).logits, logits)  # the grid's points stay where they are
    remove_qat(model)
    model.save_pretrained(tmp_path / "rounded")
    rounded = KimiK2ForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32)
    assert torch.equal(rounded(IDS).logits, logits)


@pytest.mark.parametrize("names", [["full"], ["norms", "swiglu", "mla_up", "moe_down"]])
def test_recomputation_changes_nothing(model: KimiK2ForCausalLM, names: list[str]) -> None:
    model.set_experts_implementation("k2")
    prepare_qat(model)
    loss, expected = gradients(model)
    handle = apply_recompute(model, names)
    again, grads = gradients(model)
    handle.remove()
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_parameters_are_back_after_an_error(model: KimiK2ForCausalLM) -> None:
    prepare_qat(model)
    module = model.model.layers[1].mlp.experts
    parameters = dict(module.named_parameters())
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2))
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_errors(model: KimiK2ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"gate_up_proj: INT4 group_size is 48, but rows have 64 weights"):
        prepare_qat(model, 48)
    with pytest.raises(ValueError, match=r"\['gate_proj'\]: expected some of gate_up_proj, down_proj"):
        prepare_qat(model, targets=["gate_proj"])
    with pytest.raises(ValueError, match="expected one of kimi"):
        prepare_qat(model, convention="awq")
    assert not is_prepared(model)
    with pytest.raises(ValueError, match="Linear has no stacked experts"):
        prepare_qat(torch.nn.Linear(32, 32))
    from peft import LoraConfig, get_peft_model

    prepare_qat(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="trained for INT4 and adapted by LoRA"):
        adapted(IDS)


def run_rank(rank: int, folder: Path, config: KimiK2Config) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids = IDS[rank : rank + 2]
    for name, layout in LAYOUTS.items():
        model = build_model(config, layout, RandomWeights(config, 3))
        names = list(model.state_dict())
        prepare_qat(model, 16)
        assert list(model.state_dict()) == names
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
        round_weights(model)
        remove_qat(model)
        with torch.no_grad():
            rounded = model(ids, labels=ids, use_cache=False).loss
        seen = {"loss": loss.detach(), "rounded": rounded, "grads": grads}
        seen["weights"] = {
            key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for key, tensor in model.state_dict().items()
        }
        torch.save(seen, folder / f"{name} {rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


LAYOUTS = {"shards": Layout(shard=2), "experts": Layout(shard=2, expert=2)}


@pytest.mark.slow
def test_sharded_experts(tiny_config: Callable[..., KimiK2Config], tmp_path: Path) -> None:
    """FSDP2, and expert parallelism with it, against one process; the ranks see different rows."""
    config = tiny_config(**SIZES)
    mp.spawn(run_rank, args=(tmp_path, config), nprocs=2)
    model = build_model(config, Layout(), RandomWeights(config, 3))
    plain = on_grid(model, group_size=16)
    losses = []
    for rank in range(2):
        ids = IDS[rank : rank + 2]
        losses.append(plain(ids, labels=ids, use_cache=False).loss)
    (sum(losses) / 2).backward()
    for name in LAYOUTS:
        for rank in range(2):
            seen = torch.load(tmp_path / f"{name} {rank}.pt")
            torch.testing.assert_close(seen["loss"], losses[rank].detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(seen["rounded"], losses[rank].detach(), rtol=1e-5, atol=1e-6)
            for key, parameter in plain.named_parameters():
                torch.testing.assert_close(seen["grads"][key], parameter.grad, rtol=1e-4, atol=1e-6)
                assert torch.equal(seen["weights"][key], parameter)
