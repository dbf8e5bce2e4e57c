"""MuonClip under Trainer and Accelerate: the same weights as a loop written by hand, whatever runs the loop.

What MuonClip itself computes is held against foreign oracles in tests/optim; here the oracle is a plain PyTorch loop, and
for the clip the logits that eager attention hands to its softmax.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip, muon_clip

VOCAB, LENGTH = 331, 19
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
MakeModel = Callable[..., KimiK2ForCausalLM]
# peft reads what transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def make(tiny_config: Callable[..., KimiK2Config]) -> MakeModel:
    """The tiny Kimi K2 with the same weights every time; float32 unless told otherwise."""

    def made(dtype: torch.dtype = torch.float32, **changes: Any) -> KimiK2ForCausalLM:
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(tiny_config(**changes), dtype=dtype)

    return made


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def sequences(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def batch(first: int, size: int) -> torch.Tensor:
    return torch.stack([item["input_ids"] for item in sequences(first + size)[first:]])


def trainer(
    model: nn.Module, folder: Path, options: dict[str, Any], data: int = 64, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **(settings | changes))
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=sequences(data),
        optimizer_cls_and_kwargs=muon_clip(**options),
    )


def muon_of(run: Trainer) -> MuonClip:
    optimizer: Any = run.optimizer
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, MuonClip)
    return optimizer


def by_hand(model: PreTrainedModel, options: dict[str, Any], steps: int, size: int = 4) -> MuonClip:
    optimizer = MuonClip.for_model(model, **options)
    for step in range(steps):
        ids = batch(step * size, size)
        loss = F.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        (loss / ids[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    other = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if tolerance:
            torch.testing.assert_close(
                parameter, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )
        else:
            assert torch.equal(parameter, other[name]), name


def eager_maxima(
    model: PreTrainedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """The largest input of each layer's softmax, per head: eager attention in evaluation, which nothing watches."""
    seen: list[torch.Tensor] = []
    softmax = F.softmax

    def recorded(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if logits.dim() == 4:
            seen.append(logits.amax((0, 2, 3)))
        return softmax(logits, *args, **kwargs)

    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "softmax", recorded)
        model.eval()(input_ids=ids)
    model.set_attn_implementation(implementation)
    model.train()
    return seen


def test_trainer_does_what_the_loop_does(make: MakeModel, tmp_path: Path) -> None:
    options = {"lr": 2e-2, "qk_clip_tau": 0.4, "nesterov": True}
    run = trainer(make(), tmp_path, options)
    run.train()
    model = make()
    optimizer = by_hand(model, options, 3)
    assert_same(run.model, model, rtol=1e-3, atol=2e-5)
    stats, expected = muon_of(run).qk_clip_stats(), optimizer.qk_clip_stats()
    assert stats.keys() == expected.keys()
    assert len(stats) == 3
    for name, values in stats.items():
        torch.testing.assert_close(values["gamma"], expected[name]["gamma"], rtol=1e-4, atol=0)
    assert any(bool((values["gamma"] < 1).any()) for values in stats.values())


def test_the_loss_falls(make: MakeModel, tmp_path: Path) -> None:
    run = trainer(make(), tmp_path, {"lr": 1e-2, "qk_clip_tau": 20.0}, data=4, max_steps=10)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] > 0.9 * math.log(VOCAB)
    assert losses[-1] < 0.7 * losses[0]


def test_heads_are_clipped_to_tau(make: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, tau = batch(0, 4), 0.4
    before = eager_maxima(make(), ids, monkeypatch)
    run = trainer(make(), tmp_path, {"lr": 0.0, "qk_clip_tau": tau}, max_steps=1)
    run.train()
    after = eager_maxima(run.model, ids, monkeypatch)
    assert len(before) == 3
    # A clipped first layer changes no later layer's input by its own clip alone, but attention's output does.
    torch.testing.assert_close(after[0], before[0].clamp(max=tau), rtol=1e-5, atol=1e-6)
    assert bool((before[0] > tau).any())
    logits = [values["max_logit"] for values in muon_of(run).qk_clip_stats().values()]
    for seen, truth in zip(logits, before, strict=True):
        above = truth > tau
        torch.testing.assert_close(seen[above], truth[above], rtol=1e-5, atol=1e-6)
        assert bool((seen[~above] >= truth[~above] - 1e-6).all())  # a bound


# Trainer reads the checkpoint's config.json, which has the hub's keys, as that of no particular model.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_run(make: MakeModel, tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"lr": 2e-2, "qk_clip_tau": 0.4, "ns_dtype": "float32"}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    plain = {"rope_theta": 50000.0, "num_hidden_layers": 2}
    whole = trainer(make(dtype, **plain), tmp_path / "whole", options, **settings)
    whole.train()
    state = muon_of(whole).state
    kinds = {value.dtype for values in state.values() for name, value in values.items() if name != "step"}
    assert kinds == {torch.float32}
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = trainer(make(dtype, **plain), tmp_path / "resumed", options, **settings)
    with torch.no_grad():
        for param in resumed.model.parameters():
            param.zero_()  # what is not restored shows
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert_same(resumed.model, whole.model)
    for mine, other in zip(muon_of(resumed).state.values(), state.values(), strict=True):
        assert mine.keys() == other.keys()
        assert all(
            torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine
        )


def test_accumulation_sees_the_logits_of_the_whole_batch(make: MakeModel, tmp_path: Path) -> None:
    options = {"lr": 2e-2, "qk_clip_tau": 0.05}  # low: every head's logit is exact
    runs = [
        trainer(make(), tmp_path, options, max_steps=1, **sizes)
        for sizes in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        )
    ]
    for run in runs:
        run.train()
    whole, pieces = (muon_of(run).qk_clip_stats() for run in runs)
    for name, values in whole.items():
        torch.testing.assert_close(pieces[name]["max_logit"], values["max_logit"], rtol=1e-5, atol=1e-6)
    last = trainer(make(), tmp_path, options, max_steps=1, data=4)
    last.train()
    first = next(iter(whole))
    assert not torch.equal(muon_of(last).qk_clip_stats()[first]["max_logit"], whole[first]["max_logit"])


def test_gradient_checkpointing_changes_nothing(make: MakeModel, tmp_path: Path) -> None:
    options = {"lr": 2e-2, "qk_clip_tau": 0.4}
    runs = [
        trainer(make(), tmp_path, options, max_steps=2, activation_checkpointing=flag)
        for flag in (False, True)
    ]
    for run in runs:
        run.train()
    assert_same(runs[0].model, runs[1].model, rtol=1e-4, atol=1e-6)
    plain, again = (muon_of(run).qk_clip_stats() for run in runs)
    for name, values in plain.items():
        torch.testing.assert_close(again[name]["max_logit"], values["max_logit"], rtol=1e-5, atol=1e-6)


def test_accelerate_prepares_it_in_one_line(make: MakeModel) -> None:
    options = {"lr": 2e-2, "qk_clip_tau": 0.4}
    accelerator, model = Accelerator(cpu=True), make()
    model, optimizer = accelerator.prepare(model, MuonClip.for_model(model, **options))
    for step in range(2):
        ids = batch(step * 4, 4)
        loss = F.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        accelerator.backward(loss / ids[:, 1:].numel())
        optimizer.step()
        optimizer.zero_grad()
    expected = make()
    by_hand(expected, options, 2)
    assert_same(model, expected)


def test_a_skipped_step_clips_nothing(make: MakeModel) -> None:
    """The loss scale of float16 training overflows: no update, no clip, and the next step is an ordinary one."""
    model = make()
    muon = MuonClip.for_model(model, lr=2e-2, qk_clip_tau=0.4)
    Accelerator(cpu=True)  # the state that AcceleratedOptimizer reads
    optimizer = AcceleratedOptimizer(
        muon, device_placement=False, scaler=torch.amp.GradScaler("cpu", init_scale=4.0)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = batch(0, 4)
    for overflow in (True, False):
        optimizer.scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if overflow:
            model.lm_head.weight.grad.fill_(math.inf)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is overflow
        unchanged = [torch.equal(before[name], parameter) for name, parameter in model.named_parameters()]
        assert all(unchanged) if overflow else not any(unchanged[:1])
        assert bool(muon.qk_clip_stats()) is not overflow
    expected = make()
    by_hand(expected, {"lr": 2e-2, "qk_clip_tau": 0.4}, 1)
    assert_same(model, expected, rtol=1e-3, atol=2e-5)


def test_llama_with_grouped_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.2))
    ids, tau = batch(0, 4), 0.5
    before = eager_maxima(model, ids, monkeypatch)
    keys = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    run = trainer(model, tmp_path, {"lr": 0.0, "qk_clip_tau": tau}, max_steps=1)
    run.train()
    assert before[0].shape == (6,)
    assert bool((before[0] > tau).all())
    torch.testing.assert_close(
        eager_maxima(model, ids, monkeypatch)[0], before[0].clamp(max=tau), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(
        model.model.layers[0].self_attn.k_proj.weight, keys
    )  # three query heads share a key head


def test_qwen3_needs_no_clip(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    with pytest.raises(ValueError, match=r"q_norm.*set qk_clip_tau=None"):
        trainer(model, tmp_path, {"lr": 1e-2}).train()
    run = trainer(model, tmp_path, {"lr": 1e-2, "qk_clip_tau": None}, data=4, max_steps=8)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert not muon_of(run).qk_clip_stats()


def test_lora_factors_go_to_adamw(make: MakeModel, tmp_path: Path) -> None:
    base = make()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj"]))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path, {"lr": 1e-2, "qk_clip_tau": 0.01})
    with pytest.warns(UserWarning, match="QK-Clip leaves 3 of 3 attention modules alone"):
        run.train()
    groups = muon_of(run).param_groups
    assert {group["algorithm"] for group in groups} == {"adamw"}
    assert sum(len(group["params"]) for group in groups) == 3 * 2 * 2
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert any(bool(p.detach().ne(0).any()) for name, p in parameters.items() if "lora_B" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonClip.for_model(model, lr=1e-2, qk_clip_tau=None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": 1e-2, "tau": 3}, r"no option \['tau'\].*qk_clip_tau"),
        ({"momentum": 0.9}, "muon_clip needs lr"),
        ({}, "muon_clip needs lr"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        muon_clip(**options)


def sharded(rank: int, folder: Path) -> None:
    """One of two ranks: Accelerate shards with FSDP2 what an optimizer already holds."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # Accelerate asks; the file is used
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["DeepseekV3DecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP  # on CPUs Accelerate would fall back to DDP
    accelerator.state.fsdp_plugin = plugin
    model = KimiK2ForCausalLM.from_pretrained(folder / "model").train()
    model, optimizer = accelerator.prepare(model, MuonClip.for_model(model, **SHARDED))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for step in range(2):
        ids = batch(step * 4 + rank * 2, 2)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    torch.save((weights, optimizer.optimizer.qk_clip_stats()), folder / f"{rank}.pt")
    dist.destroy_process_group()


SHARDED: dict[str, Any] = {"lr": 2e-2, "qk_clip_tau": 0.4, "ns_dtype": "float32"}


@pytest.mark.slow
def test_accelerate_with_fsdp2_is_one_process(make: MakeModel, tmp_path: Path) -> None:
    expected = make()
    expected.save_pretrained(tmp_path / "model")
    optimizer = by_hand(expected, SHARDED, 2)
    mp.start_processes(sharded, (tmp_path,), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, parameter in expected.named_parameters():
        assert torch.equal(first[0][name], second[0][name]), name
        torch.testing.assert_close(first[0][name], parameter.detach(), rtol=1e-3, atol=5e-5)
    for name, values in optimizer.qk_clip_stats().items():
        torch.testing.assert_close(first[1][name]["gamma"], values["gamma"], rtol=1e-4, atol=0)
