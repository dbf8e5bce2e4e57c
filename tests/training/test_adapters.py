"""Recipes' adapters and 4-bit bases against plain PEFT, bitsandbytes' own dequantisation, and one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip, experts
from transformers_k2.parallel import Layout, RandomWeights, build_model
from transformers_k2.quantization import int4
from transformers_k2.quantization.packed_experts import PackedExperts
from transformers_k2.recompute import apply_recompute
from transformers_k2.training.adapters import add_adapter, load_quantised, save_adapter, start_qat
from transformers_k2.training.optimizers import adamw
from transformers_k2.training.recipe import NF4, AdapterSection, Int4, Int4QAT

experts.register()
# PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(44).reshape(4, 11) * 37 % 331
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
DENSE = [*ATTENTION, "shared_experts.down_proj", "layers.0.mlp.up_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
LORA = AdapterSection(rank=3, alpha=6.0, dropout=0.0, targets=EVERYTHING)
NF4_SECTION = NF4("nf4", group_size=8, double_quant=True)


def section(targets: list[str], **changes: Any) -> AdapterSection:
    return AdapterSection(**{"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": targets} | changes)


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def randomise(model: nn.Module) -> None:
    """B is no longer zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in factors(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def backward(model: nn.Module, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- LoRA


def test_nothing_changes_at_first_and_only_the_adapter_trains(tiny_model: KimiK2ForCausalLM) -> None:
    expected = tiny_model(IDS).logits
    model = add_adapter(tiny_model, LORA, seed=0)
    assert torch.equal(model(IDS).logits, expected)
    randomise(model)
    _, grads = backward(model)
    assert grads.keys() == factors(model).keys()
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in grads}
    assert {*ATTENTION, "gate_proj", "up_proj", "down_proj", "experts", "base_layer"} == adapted


def test_draws_depend_on_seed_and_name_alone(tiny_config: Callable[..., KimiK2Config]) -> None:
    def drawn(seed: int, targets: list[str], noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        return factors(add_adapter(KimiK2ForCausalLM(tiny_config()), section(targets), seed))

    one, other, fewer = drawn(5, EVERYTHING, 1), drawn(6, EVERYTHING, 1), drawn(5, ["o_proj"], 9)
    for name, tensor in one.items():
        if ".lora_B." in name:
            assert not tensor.any()
            continue
        assert not torch.equal(tensor, other[name])
        # As torch draws a linear layer: uniform within 1 / sqrt(in).
        bound = tensor.shape[1] ** -0.5
        assert 0.8 * bound < tensor.abs().max() <= bound
        assert abs(tensor.std() / (bound / 3**0.5) - 1) < 0.25
    assert fewer
    assert all(torch.equal(tensor, one[name]) for name, tensor in fewer.items())
    assert (
        len({tensor.flatten()[0].item() for name, tensor in one.items() if ".lora_A." in name})
        == len(one) // 2
    )


@pytest.mark.parametrize(
    ("targets", "dtype"),
    [(EVERYTHING, torch.float32), (["all-linear"], torch.bfloat16), (["kv_b_proj"], torch.bfloat16)],
)
def test_plain_peft_loads_what_was_saved(
    tiny_model: KimiK2ForCausalLM, targets: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model.to(dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = add_adapter(base, section(targets), 0, base=tmp_path / "base").eval()
    assert {tensor.dtype for tensor in factors(model).values()} == {torch.float32}
    assert {tensor.dtype for name, tensor in model.named_parameters() if ".lora_" not in name} == {dtype}
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in stored)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), str(tmp_path / "adapter")
    ).eval()
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.equal(tiny_model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("names", [["full"], ["norms", "swiglu", "mla_up"]])
def test_recomputation_and_the_chunked_loss(tiny_model: KimiK2ForCausalLM, names: list[str]) -> None:
    tiny_model.set_experts_implementation("k2")
    model = add_adapter(tiny_model, LORA, 0)
    randomise(model)
    loss, expected = backward(model)
    tiny_model.loss_chunk_tokens = 5
    handle = apply_recompute(model, names)
    chunked, grads = backward(model)
    handle.remove()
    assert model(input_ids=IDS, labels=IDS).logits is None
    torch.testing.assert_close(chunked, loss)
    assert grads.keys() == expected.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:QK-Clip leaves 3 of 3 attention modules alone:UserWarning")
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("kind", ["muonclip", "adamw"])
def test_optimizers_step_the_adapter_alone(
    tiny_model: KimiK2ForCausalLM, tmp_path: Path, kind: str, nf4: bool
) -> None:
    tiny_model.save_pretrained(tmp_path)
    base = load_quantised(tmp_path, tiny_model.config, Layout(), NF4_SECTION) if nf4 else tiny_model
    model = add_adapter(base, LORA, 0)
    randomise(model)
    if kind == "adamw":
        optimizer: Any = adamw(model, lr=1e-2)
    else:  # tau so low that every head would be clipped; 4-bit projections have no rows to look at
        optimizer = MuonClip.for_model(model, lr=1e-2, qk_clip_tau=None if nf4 else 1e-3)
        assert {group["algorithm"] for group in optimizer.param_groups} == {"adamw"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = backward(model)[0]
    optimizer.step()
    backward(model)
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == factors(model).keys()
    assert backward(model)[0] < first


def test_adapter_errors(tiny_model: KimiK2ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"'q_porj' matches nothing.*q_b_proj"):
        add_adapter(tiny_model, section(["q_porj"]), 0)
    with pytest.raises(ValueError, match=r"lora_dropout=0.1 is impossible"):
        add_adapter(tiny_model, section(EVERYTHING, dropout=0.1), 0)
    assert not factors(add_adapter(tiny_model, section(["o_proj"], dropout=0.1), 0)).keys() & {
        "model.lm_head"
    }


def test_an_adapter_and_int4_training_exclude_each_other(tiny_model: KimiK2ForCausalLM) -> None:
    start_qat(tiny_model, Int4QAT("int4_qat", [r"re:.*mlp\.experts.*"], [], 8, "kimi", warmup=0, freeze=0))
    with pytest.raises(ValueError, match="one of the two sections to be null"):
        add_adapter(tiny_model, LORA, 0)


# -- 4-bit bases


def dequantised(model: Any, plain: Any, exact: Any) -> Any:
    """The float model with bitsandbytes' own idea of its 4-bit weights, and its experts on the INT4 grid."""
    import bitsandbytes as bnb

    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            original = plain.get_submodule(name).weight
            stored = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            error = (stored - original).float().norm() / original.float().norm()
            assert 0.05 < error < 0.13, name  # NF4 of a normal distribution, blocks of 64: 0.092
            original.data = stored.to(original.dtype)
        elif isinstance(module, PackedExperts):
            for stack, parameter in plain.get_submodule(name).named_parameters():
                weight = exact.get_parameter(f"{name}.{stack}").data
                parameter.data = int4.fake_quantize(weight, 8).to(parameter.dtype)
    return plain


def nf4_config(config: KimiK2Config) -> KimiK2Config:
    """Inputs in whole blocks of 64: where the CPU has AVX-512, bitsandbytes 0.50 misreads others."""
    sizes = {"hidden_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 32}
    sizes |= {"intermediate_size": 64, "moe_intermediate_size": 64}
    return type(config)(**(config.to_dict() | sizes))


@pytest.mark.parametrize(
    ("method", "dtype", "double_quant"),
    [
        ("nf4", torch.float32, False),
        ("nf4", torch.float32, True),
        ("nf4", torch.bfloat16, True),
        ("int4", torch.float32, None),
    ],
)
def test_quantised_bases_compute_with_their_weights(
    tiny_model: KimiK2ForCausalLM, method: str, dtype: torch.dtype, double_quant: bool, tmp_path: Path
) -> None:
    if method == "nf4":
        tiny_model = KimiK2ForCausalLM(nf4_config(tiny_model.config)).eval()
    tiny_model.save_pretrained(tmp_path)
    settings = NF4("nf4", 8, double_quant) if method == "nf4" else Int4("int4", 8)
    model: Any = load_quantised(tmp_path, tiny_model.config, Layout(), settings, dtype)
    linears = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    # Attention, one dense layer, two layers of shared experts.
    assert len(linears) == (3 * 5 + 3 + 2 * 3 if method == "nf4" else 0)
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = dequantised(model, KimiK2ForCausalLM.from_pretrained(tmp_path, dtype=dtype), tiny_model)
    reference = plain.state_dict()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".weight")[0] not in linears and ".experts." not in name:
            assert torch.equal(tensor.float(), reference[name].float()), name
            assert tensor.dtype == (torch.float32 if name.endswith("bias") else dtype), name
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, **close)

    plain.requires_grad_(False)
    adapted, reference = (add_adapter(each, LORA, 1) for each in (model, plain))
    randomise(adapted), randomise(reference)
    loss, grads = backward(adapted.train())
    expected_loss, expected = backward(reference.train())
    assert grads.keys() == expected.keys() == factors(adapted).keys()
    if dtype is torch.float32:
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    else:  # PEFT adds the update before it rounds to bfloat16, or, to 4-bit layers, after
        torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0)
        flat, expected_flat = (
            torch.cat([part[name].flatten() for name in grads]) for part in (grads, expected)
        )
        assert torch.cosine_similarity(flat, expected_flat, dim=0) > 0.9  # a token may meet other experts
    adapted.eval()(IDS)
    assert torch.equal(backward(adapted.train())[0], loss)  # an evaluation leaves the packing alone


def test_int4_files_keep_their_codes(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    """Codes that no quantisation of the dequantised weights would give: scales beside amax / 7."""
    tiny_model.save_pretrained(tmp_path / "float")
    base = load_quantised(tmp_path / "float", tiny_model.config, Layout(), Int4("int4", 8))
    for module in base.modules():
        if isinstance(module, PackedExperts):
            module.use_hub_form()
            module.down_proj_packed.data.bitwise_and_(0x33333333)  # codes -8 to -5
    base.save_pretrained(tmp_path / "int4")
    again = load_quantised(tmp_path / "int4", tiny_model.config, Layout(), Int4("int4", 8))
    expected = base.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"weight_scale is .*group of 4"):
        load_quantised(tmp_path / "int4", tiny_model.config, Layout(), Int4("int4", 4))


def test_nf4_under_autocast(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    model: Any = load_quantised(
        tmp_path, tiny_model.config, Layout(), NF4_SECTION, torch.bfloat16, compute_dtype=torch.bfloat16
    )
    model = add_adapter(model, LORA, 0)
    randomise(model)
    reference, _ = backward(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = backward(model)
    torch.testing.assert_close(loss, reference, rtol=2e-2, atol=2e-2)
    assert {gradient.dtype for gradient in grads.values()} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in grads.values())


def test_nf4_is_not_split(tiny_config: Callable[..., KimiK2Config]) -> None:
    config = tiny_config()
    for layout in (Layout(shard=2), Layout(pipeline=2)):
        with pytest.raises(
            ValueError, match=f"shard {layout.shard} and pipeline {layout.pipeline}: expected 1 and 1"
        ):
            load_quantised("nowhere", config, layout, NF4_SECTION)


# -- INT4 training


# -- several processes


def run_rank(rank: int, folder: Path, config: KimiK2Config) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights, ids = RandomWeights(config, 3), IDS[2 * rank : 2 * rank + 2]
    for name, layout in LAYOUTS.items():
        torch.manual_seed(rank)
        if name == "nf4":
            base = load_quantised(folder / "base", config, layout, NF4_SECTION)
        else:
            base = build_model(config, layout, weights)
        if layout.splits_the_model:
            with pytest.raises(ValueError, match="leave out gate_proj, up_proj, down_proj"):
                add_adapter(base, LORA, 5)
        adapted = add_adapter(base, section(DENSE), 5)
        start = {key: tensor.detach().clone() for key, tensor in factors(adapted).items()}
        randomise(adapted)
        model: Any = adapted if layout.splits_the_model else DistributedDataParallel(adapted)
        optimizer = MuonClip.for_model(adapted, lr=1e-2, qk_clip_tau=None)
        model(input_ids=ids[:1], labels=ids[:1], use_cache=False).loss.backward()
        model(input_ids=ids[1:], labels=ids[1:], use_cache=False).loss.backward()
        grads = {key: tensor.grad.clone() for key, tensor in factors(adapted).items()}
        optimizer.step()
        save_adapter(adapted, folder / name)
        dist.barrier()
        saved = load_file(folder / name / "adapter_model.safetensors")
        torch.save({"start": start, "grads": grads, "saved": saved}, folder / f"{name} {rank}.pt")
    dist.destroy_process_group()


LAYOUTS = {
    "copies": Layout(replicate=2),
    "nf4": Layout(replicate=2),
    "shards": Layout(shard=2),
    "experts": Layout(shard=2, expert=2),
}


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(
    tiny_config: Callable[..., KimiK2Config], tmp_path: Path
) -> None:
    config = tiny_config()
    build_model(config, Layout(), RandomWeights(config, 3)).save_pretrained(tmp_path / "base")
    mp.spawn(run_rank, args=(tmp_path, config), nprocs=2)
    weights = RandomWeights(config, 3)
    for name in LAYOUTS:
        if name == "nf4":
            base = load_quantised(tmp_path / "base", config, Layout(), NF4_SECTION)
        else:
            base = build_model(config, Layout(), weights)
        model = add_adapter(base, section(DENSE), 5)
        start = {key: tensor.detach().clone() for key, tensor in factors(model).items()}
        randomise(model)
        optimizer = MuonClip.for_model(model, lr=1e-2, qk_clip_tau=None)
        for row in range(4):
            (
                model(input_ids=IDS[row : row + 1], labels=IDS[row : row + 1], use_cache=False).loss / 2
            ).backward()
        expected = {key: tensor.grad.clone() for key, tensor in factors(model).items()}
        optimizer.step()
        for rank in range(2):
            seen = torch.load(tmp_path / f"{name} {rank}.pt")
            assert all(torch.equal(seen["start"][key], tensor) for key, tensor in start.items()), name
            for key, gradient in expected.items():
                torch.testing.assert_close(
                    seen["grads"][key],
                    gradient,
                    rtol=1e-3,
                    atol=1e-6,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
            for key, tensor in factors(model).items():
                stored = seen["saved"][key.replace(".default", "")]
                torch.testing.assert_close(stored, tensor.detach(), rtol=1e-3, atol=1e-4)
