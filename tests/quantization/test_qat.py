"""Experts trained for INT4 compute what plain experts with dequantised weights compute, on one process and on two."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, experts
from transformers_k2.parallel import Layout, RandomWeights, build_model
from transformers_k2.quantization import QATSchedule, int4, prepare_qat, qat, remove_qat
from transformers_k2.quantization.qat import is_prepared, round_weights, set_rounding, settings
from transformers_k2.recompute import apply_recompute

experts.register()

IDS = torch.arange(33).reshape(3, 11) * 37 % 331
SIZES = {"hidden_size": 64, "moe_intermediate_size": 96}
STACKS = r".*\.experts\.(gate_up|down)_proj"
DOWN = r"re:.*\.experts\.down_proj"


@pytest.fixture
def model(tiny_config: Callable[..., KimiK2Config]) -> KimiK2ForCausalLM:
    return KimiK2ForCausalLM(tiny_config(**SIZES))


def on_grid(
    model: KimiK2ForCausalLM, names: str = STACKS, group_size: int = 32, convention: str = "kimi"
) -> KimiK2ForCausalLM:
    """A plain copy whose parameters of these names (a regular expression) were quantised and dequantised."""
    plain = copy.deepcopy(model)
    remove_qat(plain)
    found = 0
    for name, parameter in plain.named_parameters():
        if re.fullmatch(names, name):
            codes, scale = int4.quantize(parameter.data, group_size, convention)
            parameter.data = int4.dequantize(codes, scale, parameter.dtype)
            found += 1
    assert found
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
    prepare_qat(model, 8, targets=[DOWN])
    assert torch.equal(gradients(model)[0], gradients(on_grid(model, DOWN[3:], 8))[0])
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
    assert torch.equal(gradients(copied)[0], gradients(on_grid(copied, DOWN[3:], 8))[0])


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


# The published ignore list; what it leaves of all linear layers are the routed experts.
THINKING = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]


@pytest.mark.parametrize(
    ("targets", "ignore", "names"),
    [
        (["Linear"], THINKING, STACKS),
        ([r"re:.*mlp\.experts.*"], [], STACKS),
        (["model.layers.1.mlp.experts"], [], r"model\.layers\.1\..*\.experts\.(gate_up|down)_proj"),
        ([r"re:.*experts\.\d+\.(gate|up)_proj$"], [], r".*\.experts\.gate_up_proj"),
        (["re:.*down_proj"], ["re:.*mlp.down_proj"], r".*experts\.down_proj(\.weight)?"),
        (["Linear"], ["lm_head"], r".*(_proj(_with_mqa)?\.weight|experts\.(gate_up|down)_proj)"),
        (["model.layers.2.self_attn.o_proj"], [], r"model\.layers\.2\.self_attn\.o_proj\.weight"),
    ],
)
@pytest.mark.parametrize("convention", ["kimi", "compressed_tensors"])
def test_patterns(
    model: KimiK2ForCausalLM, targets: list[str], ignore: list[str], names: str, convention: str
) -> None:
    """Whatever they choose computes quantised, and nothing else does; compressed-tensors chooses the same modules."""
    prepare_qat(model, 8, targets, convention, ignore)
    chosen = {name for name, _ in model.named_parameters() if re.fullmatch(names, name)}
    assert settings(model).keys() == chosen
    assert set(settings(model).values()) == {(8, convention, torch.float32)}
    loss, grads = gradients(model)
    expected_loss, expected = gradients(on_grid(model, names, 8, convention))
    assert torch.equal(loss, expected_loss)
    if convention == "kimi":  # the other clips
        assert all(torch.equal(grads[name], expected[name]) for name in expected)
    match = pytest.importorskip("compressed_tensors.utils.match")
    stacks = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last in stacks:
            modules = [f"{path}.{expert}.{part}" for expert in range(len(parameter)) for part in stacks[last]]
        elif isinstance(model.get_submodule(path), torch.nn.Linear):
            modules = [path]
        else:
            continue
        if targets == ["model.layers.1.mlp.experts"]:  # a module that the file does not have
            continue
        assert all(
            match.is_match(module, torch.nn.Linear(1, 1), targets, ignore) == (name in chosen)
            for module in modules
        )


def test_autocast_rounds_what_was_dequantised(model: KimiK2ForCausalLM) -> None:
    """Float32 masters under autocast compute as the bfloat16 file does under it, where the products follow autocast."""
    model.set_experts_implementation("k2")
    targets, names = ["Linear"], r".*(_proj(_with_mqa)?\.weight|experts\.(gate_up|down)_proj)"
    prepare_qat(model, 8, targets, ignore=["lm_head"])
    file = on_grid(model, names, 8)
    for name, parameter in file.named_parameters():
        if re.fullmatch(names, name):
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS).logits, file(IDS).logits)


def test_schedule_and_switch(model: KimiK2ForCausalLM) -> None:
    schedule = QATSchedule(warmup=2, freeze=3)
    assert [schedule.rounds(step) for step in range(6)] == [False, False, True, True, True, True]
    assert [schedule.freezes(step, 6) for step in range(6)] == [False, False, False, True, True, True]
    with pytest.raises(ValueError, match="warmup is -1, freeze 0: expected steps"):
        QATSchedule(warmup=-1)
    plain, _ = gradients(copy.deepcopy(model))
    prepare_qat(model)
    rounded, _ = gradients(model)
    set_rounding(model, False)
    assert torch.equal(gradients(model)[0], plain)
    set_rounding(model, True)
    assert torch.equal(gradients(model)[0], rounded)
    assert not torch.equal(plain, rounded)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_compiled_without_a_graph_break(
    model: KimiK2ForCausalLM, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = [(int4, "count_groups"), (int4, "_rule"), (qat, "fake_quantize"), (qat, "_rounded")]
    for owner, name in [
        *checked,
        (qat._OnGrid, "__call__"),
    ]:  # without the checks of shapes that only tests have
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    model = model.bfloat16()
    model.set_experts_implementation(implementation)
    prepare_qat(model, 8, [r"re:.*mlp\.experts.*", "re:.*o_proj"])
    experts, o_proj = model.model.layers[1].mlp.experts, model.model.layers[1].self_attn.o_proj
    index = torch.tensor([[0, 3], [2, 5], [2, 0], [5, 4], [3, 0]])  # nothing for one of them
    inputs = (torch.randn(5, 64).bfloat16(), index, torch.rand(5, 2).bfloat16())
    for module, arguments in ((experts, inputs), (o_proj, (torch.randn(3, 112).bfloat16(),))):
        results = []
        for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            output = function(*arguments)
            output.square().sum().backward()
            results.append((output.detach(), *(parameter.grad for parameter in module.parameters())))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def checkpointed(model: KimiK2ForCausalLM) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()


@pytest.mark.parametrize("names", [["full"], ["norms", "swiglu", "mla_up", "moe_down"], None])
def test_recomputation_changes_nothing(model: KimiK2ForCausalLM, names: list[str] | None) -> None:
    """Ours, and transformers' gradient checkpointing."""
    model.set_experts_implementation("k2")
    prepare_qat(model, 8, ["Linear"], ignore=["lm_head"])
    loss, expected = gradients(model)
    handle = apply_recompute(model, names) if names else checkpointed(model)
    again, grads = gradients(model)
    if handle is not None:
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
    with pytest.raises(
        ValueError, match=r"kv_b_proj.weight: INT4 group_size is 32, but rows have 24 weights"
    ):
        prepare_qat(model, targets=["Linear"], ignore=["lm_head", "re:.*q_b_proj"])
    for targets, words in (
        (
            ["gate_proj"],
            r"targets \['gate_proj'\] match no .* of .*layers.N.mlp.experts.gate_up_proj, .*lm_head",
        ),
        ([DOWN, "re:.*up_porj"], r"targets \['re:.*up_porj'\] match no weight of KimiK2ForCausalLM"),
        (
            ["re:.*experts.2.up_proj"],
            "matches model.layers.1.mlp.experts.2.up_proj and 0 other of 12 matrices",
        ),
        (
            ["re:.*experts.*gate_proj"],
            "and 5 other of 12 matrices in .*gate_up_proj: expected all of a stack",
        ),
        (["re:(", DOWN], r"pattern 're:\(': .*expected a regular expression"),
        (["Linear"], "match lm_head, .*: expected it in ignore"),
        (DOWN, "expected lists"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare_qat(model, targets=targets)
    with pytest.raises(ValueError, match=r"without ignore \['Linear'\] match no weight"):
        prepare_qat(model, ignore=["Linear"])
    with pytest.raises(ValueError, match="expected one of kimi"):
        prepare_qat(model, convention="awq")
    assert not is_prepared(model)
    with pytest.raises(ValueError, match=r"match no weight of Embedding: .* it has none"):
        prepare_qat(torch.nn.Embedding(32, 32))
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
        prepare_qat(model, 8, [r"re:.*mlp\.experts.*", "re:.*o_proj"])
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
    plain = on_grid(model, rf"{STACKS}|.*o_proj\.weight", group_size=8)
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
