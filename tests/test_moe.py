"""The balance loss's gradient is autograd's, loads and bias are numpy's, and nothing is counted twice or never."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, KimiK2Model
from transformers_k2.modeling_kimi_k2 import KimiK2TopkRouter
from transformers_k2.moe import RouterBalance, RouterLoad, routers, sequence_losses

ALPHA = 0.3
# The router computes in float32, the formulas below in float64.
CLOSE = {"rtol": 2e-4, "atol": 1e-6}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 331, shape)


def left_padding(*lengths: int) -> Tensor:
    """bool [batch, longest]: False, ..., True."""
    longest = max(lengths)
    return torch.tensor([[position >= longest - length for position in range(longest)] for length in lengths])


def textbook(logits: Tensor, mask: Tensor, top_k: int) -> Tensor:
    """Equations 17-20, token by token, for one layer: the sequences' losses [batch], without alpha."""
    losses = []
    for row, keep in zip(logits.double(), mask, strict=True):
        num_experts = row.shape[-1]
        length = int(keep.sum())
        frequency = torch.zeros(num_experts, dtype=torch.float64)
        probability = torch.zeros(num_experts, dtype=torch.float64)
        for token in row[keep]:
            scores = 1 / (1 + torch.exp(-token))
            for expert in sorted(range(num_experts), key=lambda index: -scores[index].item())[:top_k]:
                frequency[expert] += num_experts / (top_k * length)
            probability = probability + scores / scores.sum() / length
        losses.append((frequency * probability).sum())
    return torch.stack(losses)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# -- the router in float32


def test_bf16_autocast_does_not_change_the_choice(tiny_config: Callable[..., KimiK2Config]) -> None:
    config = tiny_config(n_routed_experts=96, num_experts_per_tok=8, num_hidden_layers=2)
    ours = KimiK2Model(config).layers[1].mlp.gate
    ours.e_score_correction_bias.normal_(std=0.05)
    stock = DeepseekV3TopkRouter(config)
    stock.load_state_dict(ours.state_dict())
    hidden = torch.randn(3, 67, 72)
    scores = torch.sigmoid(hidden.view(-1, 72).double() @ ours.weight.double().T)
    wanted = (scores + ours.e_score_correction_bias.double()).topk(8).indices.sort().values

    with torch.autocast("cpu", torch.bfloat16):
        got, upstream = ours(hidden), stock(hidden)
        assert (hidden[0] @ hidden[0].T).dtype == torch.bfloat16  # it is switched on again
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(got[2].sort().values, wanted)
    assert not torch.equal(upstream[2].sort().values, wanted)
    for value, same in zip(ours(hidden), stock(hidden), strict=True):
        assert torch.equal(value, same)  # without autocast


def test_every_model_has_the_router_and_upstream_finds_it(
    tiny_config: Callable[..., KimiK2Config], tiny_model: KimiK2ForCausalLM, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    for model in (tiny_model, KimiK2ForCausalLM.from_pretrained(tmp_path), copy.deepcopy(tiny_model)):
        assert list(routers(model)) == [f"model.layers.{index}.mlp.gate" for index in (1, 2)]
        assert {type(router) for router in routers(model).values()} == {KimiK2TopkRouter}
    assert len(tiny_model(tokens(1, 5), output_router_logits=True).router_logits) == 2
    torch.manual_seed(4)
    gate = KimiK2Model(tiny_config(initializer_range=0.5)).layers[1].mlp.gate
    assert 0.4 < gate.weight.std() < 0.6  # by upstream's _init_weights


# -- the balance loss

MASKS = {
    "odd batch": torch.ones(3, 7, dtype=torch.bool),
    "one token": torch.ones(1, 1, dtype=torch.bool),
    "left padding": left_padding(9, 1, 5),
    "packed by halves": torch.tensor([[True, False, True, True], [False, False, True, False]]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("weight", [None, 0.125])
def test_the_gradient_is_that_of_the_formula(
    name: str, weight: float | None, tiny_config: Callable[..., KimiK2Config]
) -> None:
    config = tiny_config(n_routed_experts=12, num_experts_per_tok=3, num_hidden_layers=2)
    router = KimiK2Model(config).layers[1].mlp.gate.train()
    router.e_score_correction_bias.normal_(std=0.5)  # f does not see it
    with torch.no_grad():
        router.weight[5] = -4 * router.weight.abs().max()  # never chosen: its inputs are positive
    mask = MASKS[name]
    hidden = torch.rand(*mask.shape, 72).requires_grad_()

    balance = RouterBalance(router, bias_update_speed=0, balance_loss=ALPHA)
    balance.sequence_weight = weight
    with balance.tokens(mask):
        _, chosen_weights, _ = router(hidden)
    other = 0.1 * torch.randn_like(chosen_weights)
    (chosen_weights * other).sum().backward()
    got = (router.weight.grad, hidden.grad)
    value = balance.update()[""].balance_loss
    balance.close()

    copied = copy.deepcopy(router).requires_grad_()
    again = hidden.detach().clone().requires_grad_()
    copied.zero_grad()
    logits, chosen_weights, _ = copied(again)
    scale = ALPHA * (1 / len(mask) if weight is None else weight)
    loss = scale * textbook(logits.view(*mask.shape, -1), mask, 3).sum()
    ((chosen_weights * other).sum() + loss).backward()
    for gradient, wanted in zip(got, (copied.weight.grad, again.grad), strict=True):
        torch.testing.assert_close(gradient, wanted, **CLOSE)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    # not a rounding error beside the other gradient
    (alone,) = torch.autograd.grad(copied(again)[1], copied.weight, other)
    assert (got[0] - alone).norm() > 0.01 * alone.norm()


def test_a_sequence_without_tokens_has_no_loss() -> None:
    logits = torch.randn(2, 4, 6)
    fractions, losses = sequence_losses(logits, torch.tensor([[False] * 4, [True] * 4]), 2)
    assert fractions[0].count_nonzero() == losses[0] == 0
    assert losses[1] == pytest.approx(
        float(textbook(logits[1:], torch.ones(1, 4, dtype=torch.bool), 2)), rel=1e-5
    )


def test_extreme_logits_stay_finite(tiny_config: Callable[..., KimiK2Config]) -> None:
    router = KimiK2Model(tiny_config()).layers[1].mlp.gate.train()
    RouterBalance(router, bias_update_speed=0, balance_loss=ALPHA)
    for size in (1e4, -1e4):
        router.zero_grad()
        with torch.no_grad():
            router.weight.fill_(size)
        router(torch.rand(1, 3, 72))[1].sum().backward()
        assert router.weight.grad.isfinite().all()


def step(model: KimiK2ForCausalLM, ids: Tensor, mask: Tensor, alpha: float) -> tuple[Any, ...]:
    """Gradients, loads and losses of two micro-batches, the mask being gone at the backward pass."""
    balance = RouterBalance(model, bias_update_speed=0, balance_loss=alpha)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, None)):
        with balance.tokens(mask[part]):
            loss = model(ids[part], attention_mask=mask[part].long(), labels=ids[part], use_cache=False).loss
        loss.backward()
    stats = balance.update()
    balance.close()
    return gradients(model), stats


def test_checkpointing_changes_neither_gradients_nor_counts(tiny_model: KimiK2ForCausalLM) -> None:
    model = tiny_model.train()
    ids, mask = tokens(3, 11), left_padding(11, 4, 9)
    plain, stats = step(model, ids, mask, ALPHA)
    without, _ = step(model, ids, mask, 0.0)
    model.activation_checkpointing_enable()
    again, stats_again = step(model, ids, mask, ALPHA)
    name = "model.layers.1.mlp.gate.weight"
    assert not torch.allclose(plain[name], without[name], rtol=1e-2)
    assert plain.keys() == again.keys()
    for key in plain:
        assert torch.equal(plain[key], again[key]), key
    for key, load in stats.items():
        assert torch.equal(load.loads, stats_again[key].loads)
        assert load.loads.sum() == 24 * 2
        assert load.balance_loss == stats_again[key].balance_loss > 0


def test_reentrant_checkpoints_count_once_and_refuse_the_loss(tiny_model: KimiK2ForCausalLM) -> None:
    model = tiny_model.train()
    ids = tokens(3, 5)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    _, stats = step(model, ids, torch.ones_like(ids, dtype=torch.bool), 0.0)
    assert [int(load.loads.sum()) for load in stats.values()] == [30, 30]
    with pytest.raises(ValueError, match="use_reentrant"):
        step(model, ids, torch.ones_like(ids, dtype=torch.bool), ALPHA)


def test_the_whole_models_gradient_is_that_of_the_sum(tiny_model: KimiK2ForCausalLM) -> None:
    """Through later layers to the embedding: upstream's recorded logits give the loss, autograd its gradient."""
    model = tiny_model.train()
    ids, mask = tokens(3, 8), left_padding(8, 3, 7)
    balance = RouterBalance(model, bias_update_speed=0, balance_loss=ALPHA)
    with balance.tokens(mask):
        model(ids, attention_mask=mask.long(), labels=ids, use_cache=False).loss.backward()
    got = gradients(model)
    stats = balance.update()
    balance.close()
    model.zero_grad()
    inputs = {"attention_mask": mask.long(), "labels": ids, "output_router_logits": True}
    outputs = model(ids, use_cache=False, **inputs)
    losses = [ALPHA / 3 * textbook(logits.view(3, 8, -1), mask, 2).sum() for logits in outputs.router_logits]
    (outputs.loss + sum(losses)).backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(
            got[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
    values = [load.balance_loss for load in stats.values()]
    assert values == pytest.approx([loss.item() for loss in losses], rel=1e-5)


def test_no_coefficient_no_node(tiny_model: KimiK2ForCausalLM) -> None:
    gate = tiny_model.train().model.layers[1].mlp.gate
    hidden = torch.randn(2, 3, 72)
    before = gate(hidden)[1].grad_fn.name()
    balance = RouterBalance(tiny_model, bias_update_speed=1e-3, balance_loss=0)
    assert gate(hidden)[1].grad_fn.name() == before
    balance.balance_loss = ALPHA
    assert gate(hidden)[1].grad_fn.name() != before


# -- loads and bias


def test_loads_are_those_of_the_choices_and_only_in_training(tiny_model: KimiK2ForCausalLM) -> None:
    model = tiny_model.train()
    chosen: dict[str, list[np.ndarray]] = {name: [] for name in routers(model)}
    for name, router in routers(model).items():
        router.register_forward_hook(
            lambda module, args, output, name=name: chosen[name].append(output[2].numpy())
        )
    balance = RouterBalance(model, bias_update_speed=0, balance_loss=0)
    ids, mask = tokens(3, 7), left_padding(7, 2, 6)
    with balance.tokens(mask):
        model(ids)
    model(tokens(1, 1))
    kept = {name: [parts[0][mask.flatten().numpy()], parts[1]] for name, parts in chosen.items()}
    model.eval()(ids)
    stats = balance.update()
    for name, load in stats.items():
        wanted = np.bincount(np.concatenate(kept[name]).ravel(), minlength=6)
        assert load.loads.tolist() == wanted.tolist()
        assert load.max_over_mean == pytest.approx(wanted.max() / wanted.mean())
        assert load.num_dead == (wanted == 0).sum()
    assert all(load.loads.sum() == 0 for load in balance.update().values())  # counted afresh
    model.train()(ids)
    balance.reset()
    assert all(math.isnan(load.max_over_mean) for load in balance.update().values())
    balance.close()
    model(ids)
    assert all(load.loads.sum() == 0 for load in balance.update().values())


def test_the_bias_follows_the_centred_rule(tiny_model: KimiK2ForCausalLM) -> None:
    model = tiny_model.train()
    model.model.layers[2].mlp.gate.e_score_correction_bias[4] = -9.0  # a dead expert
    balance = RouterBalance(model, bias_update_speed=0.01, balance_loss=0)
    bias = {name: router.e_score_correction_bias.numpy().copy() for name, router in routers(model).items()}
    for _ in range(5):
        model(tokens(3, 13))
        for name, load in balance.update().items():
            loads = load.loads.numpy().astype(np.float64)
            error = np.sign(loads.mean() - loads)
            bias[name] = bias[name] + 0.01 * (error - error.mean())
            np.testing.assert_allclose(
                balance.routers[name].e_score_correction_bias.numpy(), bias[name], rtol=1e-6, atol=1e-7
            )
    assert load.num_dead >= 1

    def unchanged() -> bool:
        before = {name: router.e_score_correction_bias.clone() for name, router in routers(model).items()}
        balance.update()
        return all(
            torch.equal(before[name], router.e_score_correction_bias)
            for name, router in routers(model).items()
        )

    assert unchanged()  # no token was seen
    with balance.tokens(torch.zeros(2, 3, dtype=torch.bool)):
        model(tokens(2, 3))
    assert unchanged()
    model(tokens(2, 3))
    balance.frozen = True
    assert unchanged()
    model(tokens(2, 3))
    balance.frozen = False
    assert not unchanged()


def test_the_bias_is_float32(tiny_model: KimiK2ForCausalLM) -> None:
    model = tiny_model.train().bfloat16()
    balance = RouterBalance(model, bias_update_speed=1e-4, balance_loss=0)
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    model(tokens(2, 5))
    balance.update()
    moved = gate.e_score_correction_bias - before
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert moved.abs().max() <= 2.1e-4
    assert moved.count_nonzero() >= 5
    model.bfloat16()
    with pytest.raises(ValueError, match=r"layers.1.*bfloat16.*float32"):
        balance.update()


def test_wrong_values_are_refused(tiny_model: KimiK2ForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"bias_update_speed is -0.1"):
        RouterBalance(tiny_model, bias_update_speed=-0.1, balance_loss=0)
    with pytest.raises(ValueError, match="balance_loss is nan"):
        RouterBalance(tiny_model, bias_update_speed=0, balance_loss=math.nan)
    balance = RouterBalance(tiny_model.train(), bias_update_speed=0, balance_loss=0)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"token_mask is .*torch.bool \[2, 5\]"), balance.tokens(mask):
            tiny_model(tokens(2, 5))
    assert balance.token_mask is None


def test_a_stage_without_routers_has_nothing_to_do(tiny_model: KimiK2ForCausalLM) -> None:
    assert RouterBalance(tiny_model.model.layers[0], bias_update_speed=1, balance_loss=1).update() == {}


@pytest.mark.parametrize("alpha", [0.0, 1e-2])
def test_training_on_skewed_data_balances_with_it_and_not_without(
    alpha: float, tiny_config: Callable[..., KimiK2Config]
) -> None:
    """Tokens with something in common, and a router whose weights favour two experts."""
    ratios = {}
    for speed in (0.0, 0.02):
        torch.manual_seed(1)
        model = KimiK2ForCausalLM(tiny_config(num_hidden_layers=2)).train()
        gate = model.model.layers[1].mlp.gate
        with torch.no_grad():
            model.model.embed_tokens.weight += 0.05
            gate.weight[:2] += 0.06
        balance = RouterBalance(model, bias_update_speed=speed, balance_loss=alpha if speed else 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seen = []
        for _ in range(50):
            ids = torch.randint(3, 203, (4, 24))
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(balance.update()["model.layers.1.mlp.gate"].max_over_mean)
        ratios[speed] = float(np.mean(seen[-10:]))
    assert ratios[0.0] > 2
    assert ratios[0.02] < 0.85 * ratios[0.0]


# -- two processes


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state = torch.load(folder / "inputs.pt", weights_only=False)
    own = slice(0, 2) if rank == 0 else slice(2, 4)
    torch.save(update_once(state, own, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def update_once(
    state: dict[str, Any], own: slice, size: int
) -> tuple[dict[str, RouterLoad], list[Tensor], Any]:
    """One step on these sequences of the batch: loads and losses, the bias after it, and the gradients."""
    model = KimiK2ForCausalLM(state["config"]).train()
    model.load_state_dict(state["weights"])
    balance = RouterBalance(model, bias_update_speed=0.01, balance_loss=ALPHA)
    balance.sequence_weight = size / len(state["ids"])
    ids, mask = state["ids"][own], state["mask"][own]
    with balance.tokens(mask):
        hidden = model(ids, attention_mask=mask.long(), use_cache=False).logits
    (0 * hidden.sum()).backward()  # what is left is the balance loss's gradient
    stats = balance.update()
    return stats, [router.e_score_correction_bias for router in balance.routers.values()], gradients(model)


@pytest.mark.slow
def test_two_processes_equal_one(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    state = {"config": tiny_model.config, "weights": tiny_model.state_dict()}
    state |= {"ids": tokens(4, 7), "mask": left_padding(7, 3, 6, 5)}
    torch.save(state, tmp_path / "inputs.pt")
    mp.spawn(one_rank, args=(tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    stats, biases, gradient = update_once(state, slice(None), 1)
    for rank_stats, rank_biases, _ in ranks:
        for name, load in stats.items():
            assert torch.equal(rank_stats[name].loads, load.loads)
            assert load.loads.sum() == 21 * 2
            assert rank_stats[name].balance_loss == pytest.approx(load.balance_loss, rel=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(rank_biases, biases, strict=True))
    for name, value in gradient.items():  # averaged, as data parallelism does
        mean = (ranks[0][2][name] + ranks[1][2][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-3, atol=1e-6)
    assert gradient["model.layers.2.mlp.gate.weight"].norm() > 1e-3
