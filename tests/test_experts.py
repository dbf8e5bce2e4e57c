"""The experts of training against transformers' loop over experts, and against its loop in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, expert_groups, experts

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    known = dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    experts.register()
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.clear()
    ALL_EXPERTS_FUNCTIONS._global_mapping.update(known)


@pytest.fixture(params=["slices", "grouped_mm"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The products that a GPU uses run here too."""
    grouped = request.param == "grouped_mm"
    monkeypatch.setattr(
        expert_groups, "_has_grouped_mm", lambda device, dtype: grouped and dtype.itemsize < 8
    )
    return request.param


def module(config: KimiK2Config, dtype: torch.dtype) -> nn.Module:
    made = DeepseekV3Experts(config).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made


def routes(tokens: int, num_experts: int, k: int, unused: int | None) -> Tensor:
    scores = torch.rand(tokens, num_experts)
    if unused is not None:
        scores[:, unused] = -1
    return scores.topk(k).indices


def run(
    made: nn.Module, name: str, hidden: Tensor, index: Tensor, weights: Tensor, upstream: Tensor
) -> list[Tensor]:
    """The output and the gradients of everything."""
    made.config._experts_implementation = name
    leaves = [hidden.clone().requires_grad_(), weights.clone().requires_grad_(), *made.parameters()]
    output = made(leaves[0], index, leaves[1])
    return [output, *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_equals_the_loop(
    tokens: int, dtype: torch.dtype, kernel: str, tiny_config: Callable[..., KimiK2Config]
) -> None:
    made = module(tiny_config(), dtype)
    hidden, upstream = torch.randn(2, tokens, 72, dtype=dtype)
    args = hidden, routes(tokens, 6, 2, unused=4), torch.rand(tokens, 2, dtype=dtype), upstream
    names = ("output", "hidden", "weights", "gate_up_proj", "down_proj")
    for name, got, wanted in zip(names, run(made, "k2", *args), run(made, "eager", *args), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE[dtype], msg=lambda text, name=name: f"{name}: {text}")
        assert wanted.abs().sum() > 0
    assert run(made, "k2", *args)[3][4].count_nonzero() == 0


def test_routes_to_other_ranks_are_skipped(kernel: str, tiny_config: Callable[..., KimiK2Config]) -> None:
    """Expert parallelism marks them with an id behind the last and weight zero; whole tokens may be marked."""
    made = module(tiny_config(), torch.float32)
    made._is_expert_parallel = True
    hidden, upstream = torch.randn(2, 23, 72)
    index, weights = routes(23, 9, 2, None).clamp(max=6), torch.rand(23, 2)
    index[5] = 6
    weights = weights.masked_fill(index == 6, 0)
    args = hidden, index, weights, upstream
    assert (index == 6).sum() > 5
    got, wanted = run(made, "k2", *args), run(made, "eager", *args)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE[torch.float32])
    everything_elsewhere = hidden, torch.full_like(index, 6), torch.zeros_like(weights), upstream
    assert all(value.count_nonzero() == 0 for value in run(made, "k2", *everything_elsewhere))


def test_no_tokens(tiny_config: Callable[..., KimiK2Config]) -> None:
    made = module(tiny_config(), torch.float32)
    hidden = torch.empty(0, 72)
    empty = torch.empty(0, 2)
    values = run(made, "k2", hidden, empty.long(), empty, hidden)
    assert [value.shape[0] for value in values] == [0, 0, 0, 6, 6]
    assert all(value.count_nonzero() == 0 for value in values)


def test_only_what_is_asked_for_gets_a_gradient(tiny_config: Callable[..., KimiK2Config]) -> None:
    """Frozen experts, as under LoRA elsewhere; and frozen inputs."""
    made = module(tiny_config(), torch.float64)
    hidden, upstream = torch.randn(2, 7, 72, dtype=torch.float64)
    index, weights = routes(7, 6, 2, None), torch.rand(7, 2, dtype=torch.float64)
    whole = run(made, "k2", hidden, index, weights, upstream)
    for place, parameter in enumerate(made.parameters()):
        made.requires_grad_(False)
        parameter.requires_grad_(True)
        (gradient,) = torch.autograd.grad(made(hidden, index, weights), parameter, upstream)
        assert torch.equal(gradient, whole[3 + place])
    made.requires_grad_(False)
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(made(hidden, index, weights), hidden, upstream)
    assert torch.equal(gradient, whole[1])


def test_bfloat16_is_as_good_as_the_stock_kernel(tiny_config: Callable[..., KimiK2Config]) -> None:
    """Errors against double precision, in output and gradients, no more than 1.5 times grouped_mm's."""
    made = module(tiny_config(num_experts_per_tok=4), torch.bfloat16)
    hidden, upstream = torch.randn(2, 29, 72).bfloat16()
    index, weights = routes(29, 6, 4, None), torch.rand(29, 4)
    exact = module(tiny_config(), torch.float64)
    exact.load_state_dict(made.state_dict())
    truth = run(exact, "eager", hidden.double(), index, weights.double(), upstream.double())
    ours = run(made, "k2", hidden, index, weights, upstream)
    stock = run(made, "grouped_mm", hidden, index, weights, upstream)
    for got, theirs, wanted in zip(ours, stock, truth, strict=True):
        assert got.dtype == theirs.dtype
        assert (got - wanted).norm() < 1.5 * (theirs - wanted).norm()
        assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_autocast_computes_as_linear_layers_do(tiny_config: Callable[..., KimiK2Config]) -> None:
    made = module(tiny_config(), torch.float32)
    hidden, upstream = torch.randn(2, 11, 72)
    args = hidden, routes(11, 6, 2, None), torch.rand(11, 2), upstream
    plain = run(made, "k2", *args)
    with torch.autocast("cpu", torch.bfloat16):
        cast, loop = run(made, "k2", *args), run(made, "eager", *args)
    for ours, theirs, wanted in zip(cast, loop, plain, strict=True):
        assert ours.dtype == torch.float32
        assert (
            1e-4 < (ours - wanted).norm() / wanted.norm() < 0.01
        )  # bfloat16 was used, and is all that was lost
        assert (ours - theirs).norm() < 0.01 * wanted.norm()


def test_a_model_trains_with_it(tiny_model: KimiK2ForCausalLM) -> None:
    ids = torch.randint(3, 331, (2, 11))
    gradients = []
    for name in ("eager", "k2"):
        tiny_model.set_experts_implementation(name)
        tiny_model.zero_grad()
        tiny_model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in tiny_model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_other_activations_are_refused(tiny_config: Callable[..., KimiK2Config]) -> None:
    made = module(tiny_config(hidden_act="gelu"), torch.float32)
    with pytest.raises(ValueError, match="knows the activation 'silu', the configuration says 'gelu'"):
        run(made, "k2", torch.randn(3, 72), routes(3, 6, 2, None), torch.rand(3, 2), torch.randn(3, 72))
