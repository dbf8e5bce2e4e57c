"""Shares of a model against the whole one, on four processes over gloo; layouts and sources of weights on one.

What the ranks do is in pipeline_ranks.py beside the tests' conftest, where spawned processes can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from checkpoints import decoded, hub_config, per_expert, stock_model, to_fp8, to_int4, write
from pipeline_ranks import SHARES, global_batch, one_loss, run, run_model
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.parallel import (
    CheckpointWeights,
    Layout,
    RandomWeights,
    build_model,
    demand_sharded,
    stage_layers,
)

RANKS = 4
Config = Callable[..., KimiK2Config]


@pytest.fixture(scope="module")
def folder(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder of awkward sizes (rows of 88, 36, 331 do not go into 4), and what every rank saw of it."""
    path = tmp_path_factory.mktemp("shares")
    torch.manual_seed(0)
    KimiK2ForCausalLM(tiny_config(n_routed_experts=8, num_hidden_layers=4)).save_pretrained(path / "hub")
    run(run_model, RANKS, path)
    return path


@pytest.mark.parametrize("name", SHARES)
def test_shares_are_the_whole(folder: Path, name: str) -> None:
    one = KimiK2ForCausalLM.from_pretrained(folder / "hub")
    values, layout = one.state_dict(), Layout(**SHARES[name])
    results = [torch.load(folder / f"{name} {rank}.pt") for rank in range(RANKS)]
    assert {key for result in results for key in result["weights"]} == values.keys()
    for result in results:
        for key, value in result["weights"].items():
            assert torch.equal(value, values[key]), key
    # All ranks together hold every element once per replica: nothing is on two stages or two shards.
    total = sum(parameter.numel() for parameter in one.parameters())
    assert sum(result["local"] for result in results) == total * layout.replicate
    if layout.pipeline > 1:
        assert all(result["total"] < total for result in results)


@pytest.mark.parametrize("name", [name for name in SHARES if "pipeline" not in SHARES[name]])
def test_gradients_and_norm_of_shards(folder: Path, name: str) -> None:
    one = KimiK2ForCausalLM.from_pretrained(folder / "hub")
    batch = {key: rows[:RANKS] for key, rows in global_batch("plain").items()}
    one_loss(one, batch).backward()
    grads = {key: parameter.grad.clone() for key, parameter in one.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
    for rank in range(RANKS):
        result = torch.load(folder / f"{name} {rank}.pt")
        torch.testing.assert_close(result["norm"], norm, rtol=1e-5, atol=0)
        assert result["grads"].keys() == grads.keys()
        for key, parameter in one.named_parameters():
            close: dict[str, Any] = {
                "rtol": 1e-4,
                "atol": 1e-6,
                "msg": lambda text, key=key: f"{key}: {text}",
            }
            torch.testing.assert_close(result["grads"][key], grads[key], **close)
            torch.testing.assert_close(result["clipped"][key], parameter.grad, **close)


# -- random weights


def test_random_weights_are_distributed_as_upstreams(tiny_config: Config) -> None:
    config = tiny_config(vocab_size=1300, pad_token_id=7, initializer_range=0.03)
    ours = build_model(config, Layout(), RandomWeights(config, seed=3)).state_dict()
    keys = KimiK2Config().to_dict().keys() & DeepseekV3Config().to_dict().keys() - {
        "model_type",
        "architectures",
    }
    upstream = DeepseekV3ForCausalLM(
        DeepseekV3Config(**{k: v for k, v in config.to_dict().items() if k in keys})
    )
    theirs = upstream.state_dict()
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].shape == values.shape
        assert ours[name].dtype == values.dtype
        if values.unique().numel() == 1:
            assert torch.equal(ours[name], values), name  # norms and biases
            continue
        count = values.numel()
        # Both are samples of one normal distribution: five standard errors of a mean, a spread and a tail.
        assert ours[name].mean().abs() < 5 * 0.03 / count**0.5, name
        assert ours[name].std().item() == pytest.approx(0.03, rel=5 / (2 * count) ** 0.5 + 1e-3), name
        tail = (ours[name].abs() > 0.06).float().mean().item()
        assert tail == pytest.approx(0.0455, abs=5 * (0.0455 / count) ** 0.5 + 1e-3), name
    embedding = ours["model.embed_tokens.weight"]
    assert torch.equal(embedding[7], torch.zeros(72))
    assert (embedding.norm(dim=1) == 0).sum() == 1


def test_random_weights_do_not_depend_on_who_asks(tiny_config: Config) -> None:
    source = RandomWeights(tiny_config(), seed=1)
    for name, shape in {
        "lm_head.weight": (2500, 6),
        "model.layers.1.mlp.experts.gate_up_proj": (6, 10, 4),
    }.items():
        whole = source.rows(name, shape, torch.arange(shape[0]))
        assert len(whole.flatten().unique()) > 0.99 * whole.numel()  # no block repeats another
        for rows in ([5, 3], [0, 1, 4], list(range(1020, 1030)) if shape[0] > 1024 else [5]):
            assert torch.equal(source.rows(name, shape, torch.tensor(rows)), whole[rows])
    other = RandomWeights(tiny_config(), seed=2).rows("lm_head.weight", (3, 4), torch.arange(3))
    assert not torch.equal(other, source.rows("lm_head.weight", (3, 4), torch.arange(3)))
    assert not torch.equal(other, source.rows("x.lm_head.weight", (3, 4), torch.arange(3)))


# -- weights of a checkpoint


@pytest.fixture
def hub(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The checkpoint with other tensors."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):
        index.unlink()
    return folder


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_checkpoints_are_read_bit_by_bit(hub: Path, tiny_model: KimiK2ForCausalLM, prefix: str) -> None:
    rewrite(hub, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    source = CheckpointWeights(hub)
    model = build_model(tiny_model.config, Layout(), source)
    expected = tiny_model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ids = global_batch("plain")["input_ids"]
    assert torch.equal(model.eval()(ids).logits, tiny_model(ids).logits)
    for name, rows in (
        ("lm_head.weight", [300, 301, 2]),  # runs, in the order that was asked for
        ("model.layers.1.mlp.experts.gate_up_proj", [4, 1]),
        ("model.layers.2.mlp.experts.down_proj", [0]),
    ):
        found = source.rows(name, expected[name].shape, torch.tensor(rows))
        assert torch.equal(found, expected[name][rows]), name


def test_checkpoints_in_half_precision(hub: Path, tiny_model: KimiK2ForCausalLM) -> None:
    rewrite(hub, lambda tensors: {name: t.bfloat16() if t.ndim > 1 else t for name, t in tensors.items()})
    model = build_model(tiny_model.config, Layout(), CheckpointWeights(hub), dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert value.dtype == wanted, name
        assert torch.equal(value, tiny_model.state_dict()[name].to(wanted)), name


@pytest.mark.parametrize(
    ("encode", "dtype"), [(to_fp8, torch.float32), (to_int4, torch.float32), (to_int4, torch.bfloat16)]
)
def test_quantised_checkpoints_are_multiplied_out(
    tmp_path: Path, encode: Callable[..., dict[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    stored = encode(per_expert(stock_model()))
    folder = write(tmp_path, stored, hub_config(), rename=lambda name: f"language_model.{name}")
    source = CheckpointWeights(folder)
    model = build_model(KimiK2Config(**hub_config()), Layout(), source, dtype=dtype)
    expected = decoded(stored, dtype)
    state = model.state_dict()
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts"
        for expert in range(6):
            parts = [expected.pop(f"{stem}.{expert}.{part}_proj.weight") for part in ("gate", "up")]
            assert torch.equal(state[f"{stem}.gate_up_proj"][expert], torch.cat(parts))
            down = expected.pop(f"{stem}.{expert}.down_proj.weight")
            assert torch.equal(state[f"{stem}.down_proj"][expert], down)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    name = "model.layers.2.mlp.experts.down_proj"
    rows = torch.tensor([4, 1, 2])
    assert torch.equal(source.rows(name, state[name].shape, rows).to(dtype), state[name][rows])


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.experts.5.up_proj.weight"])
def test_missing_and_misshapen_tensors_are_named(hub: Path, tiny_model: KimiK2ForCausalLM, name: str) -> None:
    rewrite(hub, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name} is missing|lacks {name}"):
        build_model(tiny_model.config, Layout(), CheckpointWeights(hub))


def test_tensors_of_another_shape_are_named(hub: Path, tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(331, 72\), expected \(332, 72\)"):
        build_model(tiny_config(vocab_size=332), Layout(), CheckpointWeights(hub))
    with pytest.raises(
        ValueError, match=r"experts.gate_up_proj has shape \(6, 80, 72\), expected \(6, 96, 72\)"
    ):
        build_model(tiny_config(moe_intermediate_size=48), Layout(), CheckpointWeights(hub))


# -- layouts


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None])
@pytest.mark.parametrize("name", ["replicate", "shard", "expert", "pipeline"])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"parallel.{name} is {value!r}: expected an integer >= 1"):
        Layout(**{name: value})


def test_layouts_that_do_not_fit(tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"parallel.expert is 4: expected a divisor of parallel.shard, 6"):
        Layout(shard=6, expert=4)
    config = tiny_config()  # 6 experts, 3 layers
    Layout(pipeline=3, replicate=2, shard=4, expert=2).check(config, 24)
    with pytest.raises(ValueError, match=r"2 x 1 x 4 = 8 processes .* but 4 run"):
        Layout(pipeline=2, shard=4).check(config, 4)
    with pytest.raises(ValueError, match=r"parallel.expert is 4, but the model has 6 .* one of 1, 2\."):
        Layout(shard=4, expert=4).check(config, 4)
    with pytest.raises(ValueError, match=r"parallel.pipeline is 4, but the model has 3 layers"):
        Layout(pipeline=4).check(config, 4)
    with pytest.raises(ValueError, match=r"2 processes .* but 1 run"):
        build_model(config, Layout(shard=2), RandomWeights(config, 0))


def test_ranks_of_a_layout() -> None:
    layout = Layout(pipeline=3, replicate=2, shard=4, expert=2)
    places = [(layout.stage(rank), layout.data_rank(rank)) for rank in range(layout.world_size)]
    assert places == [(stage, data) for stage in range(3) for data in range(8)]
    assert layout.splits_the_model
    assert not Layout(replicate=8).splits_the_model


@pytest.mark.parametrize("num_stages", range(1, 17))
def test_stages(num_stages: int) -> None:
    for num_layers in range(num_stages, 62):
        stages = [stage_layers(num_layers, num_stages, stage) for stage in range(num_stages)]
        assert [layer for stage in stages for layer in stage] == list(range(num_layers))
        sizes = [len(stage) for stage in stages]
        assert max(sizes) - min(sizes) <= 1
        # The ends, which carry the embedding and the head too, have no more than anyone else but in need.
        if num_stages > 2 and max(sizes) > min(sizes[1:-1]):
            assert sizes[0] == sizes[-1] == min(sizes)


def test_plain_parameters_are_no_shards(tiny_model: KimiK2ForCausalLM) -> None:
    with pytest.raises(RuntimeError, match=r"\d+ parameters are whole on every rank, model.embed_tokens"):
        demand_sharded(tiny_model)
    demand_sharded(nn.Identity())
