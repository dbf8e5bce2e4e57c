"""Experts on packed INT4 weights against transformers' own experts on the dequantised ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_k2 import KimiK2Config, KimiK2Model
from transformers_k2.quantization import packed_experts, packed_ops
from transformers_k2.quantization.int4 import dequantize, pack, quantize
from transformers_k2.quantization.packed_experts import STACKS, PackedExperts
from transformers_k2.quantization.packed_linear import threshold
from transformers_k2.quantization.packed_ops import Adapter, Stack

HIDDEN, WIDTH, EXPERTS, CHOSEN = 96, 64, 6, 3


def pair(tiny_config: Callable[..., KimiK2Config]) -> tuple[torch.nn.Module, PackedExperts]:
    """transformers' experts with weights on the grid, in float64, and ours with the same weights packed."""
    config = tiny_config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    stock: Any = KimiK2Model(config).layers[-1].mlp.experts
    packed = PackedExperts(EXPERTS, HIDDEN, WIDTH)
    with torch.no_grad():
        for name in STACKS:
            weight = stock.get_parameter(name)
            codes, scale = quantize(weight.normal_(std=0.2))
            weight.copy_(dequantize(codes, scale, torch.float32))
            packed.get_parameter(f"{name}_packed").copy_(pack(codes))
            packed.get_parameter(f"{name}_scale").copy_(scale)
    stock.config._experts_implementation = "eager"
    return stock.double(), packed


def inputs(num_tokens: int, dtype: torch.dtype, skew: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_tokens, HIDDEN).to(dtype)
    # Expert 4 gets nothing; with `skew` expert 0 gets a row of every token, others few.
    scores = torch.rand(num_tokens, EXPERTS)
    scores[:, 4] = -1
    scores[:, 0] += 2 * skew
    weights, index = scores.topk(CHOSEN, dim=-1)
    return hidden, index, weights.to(dtype)


@pytest.mark.parametrize("form", ["hub", "kernel"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_tokens", [1, 7, 70])
def test_equals_transformers_experts(
    tiny_config: Callable[..., KimiK2Config], form: str, dtype: torch.dtype, close: float, num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    stock, packed = pair(tiny_config)
    assert (form == "hub") or packed.use_kernel_form()
    hidden, index, weights = inputs(num_tokens, dtype, skew=num_tokens > 7)
    ours, theirs = (values.clone().requires_grad_() for values in (hidden, hidden.double()))
    our_weights, their_weights = (values.clone().requires_grad_() for values in (weights, weights.double()))
    output = packed(ours, index, our_weights)
    expected = stock(theirs, index, their_weights)
    assert output.dtype == dtype
    direction = torch.randn_like(expected)
    output.backward(direction.to(dtype))
    expected.backward(direction.to(dtype).double())
    for mine, its in (
        (output, expected),
        (ours.grad, theirs.grad),
        (our_weights.grad, their_weights.grad),
    ):
        assert mine is not None
        assert its is not None
        assert (mine.double() - its).norm() <= close * its.norm()


def test_both_ways_were_taken() -> None:
    """Skewed tokens give one expert more rows than the threshold, and others fewer."""
    torch.manual_seed(0)
    _, index, _ = inputs(70, torch.bfloat16, skew=True)
    counts = index.flatten().bincount(minlength=EXPERTS)
    assert counts[0] == 70 > threshold(torch.bfloat16)
    assert counts[4] == 0


def test_a_rank_skips_the_experts_of_others(tiny_config: Callable[..., KimiK2Config]) -> None:
    stock, packed = pair(tiny_config)
    hidden, index, weights = inputs(9, torch.float32)
    index[index == 2] = EXPERTS  # elsewhere
    kept = torch.where(index == EXPERTS, 0, weights)
    expected = stock(hidden.double(), index.clamp(max=EXPERTS - 1), kept.double())
    torch.testing.assert_close(packed(hidden, index, weights).double(), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens(tiny_config: Callable[..., KimiK2Config]) -> None:
    _, packed = pair(tiny_config)
    hidden, index, weights = inputs(0, torch.float32)
    assert packed(hidden, index, weights).shape == (0, HIDDEN)


def test_the_state_dict_has_the_hubs_form(tiny_config: Callable[..., KimiK2Config]) -> None:
    _, packed = pair(tiny_config)
    before = copy.deepcopy(packed.state_dict())
    assert sum(value.nbytes for value in before.values()) / (3 * EXPERTS * HIDDEN * WIDTH) == 0.5625
    assert packed.use_kernel_form()
    assert packed.gate_up_proj_packed.dtype == torch.uint8
    resident = sum(value.nbytes for value in packed.parameters())
    assert resident / (3 * EXPERTS * HIDDEN * WIDTH) == 0.625
    again = packed.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], value) for name, value in before.items())

    other = PackedExperts(EXPERTS, HIDDEN, WIDTH)
    assert other.use_kernel_form()
    other.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_casts_leave_scales_alone(tiny_config: Callable[..., KimiK2Config]) -> None:
    _, packed = pair(tiny_config)
    before = copy.deepcopy(packed.state_dict())
    packed.use_kernel_form()
    for cast in (packed.half, packed.float, packed.bfloat16, packed.double, packed.to):
        cast()
        assert packed.gate_up_proj_packed.dtype == torch.uint8
        assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())
    meta = packed.to("meta")
    assert meta.gate_up_proj_packed.dtype == torch.int32
    assert meta.gate_up_proj_packed.is_meta


def test_only_the_gate_and_up_outputs_are_kept(tiny_config: Callable[..., KimiK2Config]) -> None:
    _, packed = pair(tiny_config)
    hidden, index, weights = inputs(50, torch.float32)
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
    ):
        output = packed(hidden.requires_grad_(), index, weights.requires_grad_())
    resident = sum(value.nbytes for value in packed.parameters())
    ids = 8
    assert sum(saved.values()) - resident == 50 * CHOSEN * ((2 * WIDTH + 1) * 4 + ids)
    assert output.shape == hidden.shape


# --- Adapters ---------------------------------------------------------------------------------------------

RANK = 5


def adapters(packed: PackedExperts, dtype: torch.dtype, dropout: float = 0.0) -> list[Adapter]:
    """Two on each stack, one of them with an A that all experts share; B as PEFT stores it, transposed."""
    made = []
    for name, num_out, num_in in packed.shapes():
        for num_a in (EXPERTS, 1):
            a = torch.randn(num_a, RANK, num_in, dtype=dtype) * 0.2
            b = (torch.randn(num_out, RANK, EXPERTS, dtype=dtype) * 0.2).permute(2, 0, 1)
            made.append(Adapter(name, a, b, 0.7, dropout))
    return made


def textbook(
    weight: dict[str, Tensor], adapters: list[Adapter], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Token by token."""

    def apply(name: str, expert: int, x: Tensor) -> Tensor:
        y = weight[name][expert] @ x
        for each in adapters:
            if each.stack == name:
                y = y + each.scaling * each.b[expert] @ (each.a[expert % len(each.a)] @ x)
        return y

    rows = []
    for x, chosen, scores in zip(hidden, index.tolist(), weights, strict=True):
        total = torch.zeros_like(x)
        for expert, score in zip(chosen, scores, strict=True):
            if expert < EXPERTS:
                gate, up = apply("gate_up_proj", expert, x).chunk(2)
                total = total + score * apply("down_proj", expert, F.silu(gate) * up)
        rows.append(total)
    return torch.stack(rows)


def leaves(hidden: Tensor, weights: Tensor, made: list[Adapter]) -> list[Tensor]:
    return [hidden, weights, *(factor for each in made for factor in (each.a, each.b))]


def with_factors(made: list[Adapter], factors: Sequence[Tensor]) -> list[Adapter]:
    return [each._replace(a=a, b=b) for each, a, b in zip(made, factors[::2], factors[1::2], strict=True)]


@pytest.mark.parametrize("form", ["hub", "kernel"])
@pytest.mark.parametrize(
    ("dtype", "factors", "close"),
    [
        (torch.float32, torch.float32, 1e-5),
        # A rounding to bfloat16 is at most 4e-3; there are three in a row.
        (torch.bfloat16, torch.float32, 1.2e-2),
        (torch.float32, torch.bfloat16, 1.2e-2),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 7, 60])
def test_adapters_against_a_loop_in_float64(
    tiny_config: Callable[..., KimiK2Config],
    form: str,
    dtype: torch.dtype,
    factors: torch.dtype,
    close: float,
    num_tokens: int,
) -> None:
    torch.manual_seed(num_tokens)
    stock, packed = pair(tiny_config)
    assert (form == "hub") or packed.use_kernel_form()
    hidden, index, weights = inputs(num_tokens, dtype, skew=num_tokens > 7)
    index[index == 2] = EXPERTS  # elsewhere
    made = adapters(packed, factors)
    ours = [value.clone().requires_grad_() for value in leaves(hidden, weights, made)]
    theirs = [value.double().requires_grad_() for value in leaves(hidden, weights, made)]
    output = packed(ours[0], index, ours[1], *with_factors(made, ours[2:]))
    weight = {name: stock.get_parameter(name).detach() for name in STACKS}
    expected = textbook(weight, with_factors(made, theirs[2:]), theirs[0], index, theirs[1])
    direction = torch.randn_like(expected)
    output.backward(direction.to(dtype))
    expected.backward(direction.to(dtype).double())
    assert output.dtype == dtype
    assert (output.double() - expected).norm() <= close * expected.norm()
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert mine.grad.dtype == mine.dtype
        assert (mine.grad.double() - its.grad).norm() <= close * its.grad.norm()
    for mine in ours[2::2]:  # experts without a token: 4, and 2, which is elsewhere
        if len(mine) == EXPERTS:
            assert mine.grad is not None
            assert not mine.grad[[2, 4]].any()


def test_adapters_under_autocast(tiny_config: Callable[..., KimiK2Config]) -> None:
    """Everything is float32 but the products: as with bfloat16 hidden states, and gradients of float32."""
    _, packed = pair(tiny_config)
    hidden, index, weights = inputs(9, torch.float32)
    made = adapters(packed, torch.float32)
    results = []
    for narrow in (True, False):
        values = [value.clone().requires_grad_() for value in leaves(hidden, weights, made)]
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            output = packed(values[0], index, values[1], *with_factors(made, values[2:]))
        grads = torch.autograd.grad(output.square().sum(), values)
        assert all(value.dtype == torch.float32 for value in (output, *grads))
        results.append([output, *grads])
    for mine, its in zip(*results, strict=True):
        assert 1e-4 * its.norm() < (mine - its).norm() < 1.5e-2 * its.norm()


def test_gradients_of_dropout_in_float64(tiny_config: Callable[..., KimiK2Config]) -> None:
    """Against finite differences: the backward pass has the masks of the forward pass."""
    _, packed = pair(tiny_config)
    hidden, index, weights = inputs(3, torch.float64)
    made = adapters(packed, torch.float64, dropout=0.4)

    def forward(*values: Tensor) -> Tensor:
        torch.manual_seed(8)  # from which the seed of the masks is drawn
        return packed(values[0], index, values[1], *with_factors(made, values[2:]))

    values = [value.clone().requires_grad_() for value in leaves(hidden, weights, made)]
    assert torch.autograd.gradcheck(forward, values, fast_mode=True)
    plain = packed(hidden, index, weights, *(each._replace(dropout=0.0) for each in made))
    assert not torch.allclose(forward(*values), plain)


def test_dropout_is_drawn_for_each_input(tiny_config: Callable[..., KimiK2Config]) -> None:
    """Weights of zero, A and B of ones: an output is the sum of the inputs that were kept, over their share."""
    packed = PackedExperts(EXPERTS, HIDDEN, WIDTH)
    gate_up = Adapter("gate_up_proj", torch.zeros(1, 1, HIDDEN), torch.ones(EXPERTS, 2 * WIDTH, 1), 1.0)
    gate_up.a[:, :, 0] = 1.0  # the activation is silu(x0) x0 everywhere
    down = Adapter("down_proj", torch.ones(1, 1, WIDTH), torch.ones(EXPERTS, HIDDEN, 1), 1.0, 0.25)
    hidden = torch.ones(500, HIDDEN)
    index, weights = torch.arange(500)[:, None] % EXPERTS, torch.ones(500, 1)
    activation = F.silu(torch.ones(())).item()
    counts = packed(hidden, index, weights, gate_up, down)[:, 0] * 0.75 / activation
    torch.testing.assert_close(counts, counts.round(), rtol=1e-4, atol=1e-4)
    # Binomial: 64 draws of 0.75 have the mean 48 and the standard deviation 3.46; five errors of the mean.
    assert abs(counts.mean() - 48) < 5 * 3.46 / 500**0.5
    assert 3.46 * 0.8 < counts.std() < 3.46 * 1.2
    everything = packed(hidden, index, weights, gate_up, down._replace(dropout=1.0))
    assert not everything.any()


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the checks of types that only tests have, which it cannot trace."""
    for owner in (packed_ops, packed_experts, Stack, PackedExperts):
        for name, value in list(vars(owner).items()):
            if isinstance(value, FunctionType):
                monkeypatch.setattr(owner, name, inspect.unwrap(value))
            elif isinstance(value, property) and value.fget is not None:
                monkeypatch.setattr(owner, name, property(inspect.unwrap(value.fget)))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(("form", "dynamic"), [("hub", False), ("kernel", True)])
def test_compiled(tiny_config: Callable[..., KimiK2Config], dynamic: bool, form: str) -> None:
    """One graph, forward and backward, and the same operations in it: the same numbers."""
    _, packed = pair(tiny_config)
    assert (form == "hub") or packed.use_kernel_form()
    made = adapters(packed, torch.float32)[1:3]  # a shared A, and one that is not
    compiled: Any = torch.compile(packed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (5, 9) if dynamic else (5,):
        hidden, index, weights = inputs(num_tokens, torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(compiled(hidden, index, weights), packed(hidden, index, weights))
        results = []
        for module in (packed, compiled):
            values = [value.clone().requires_grad_() for value in leaves(hidden, weights, made)]
            output = module(values[0], index, values[1], *with_factors(made, values[2:]))
            results.append([output, *torch.autograd.grad(output.float().square().sum(), values)])
        assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_operations_follow_their_declarations(tiny_config: Callable[..., KimiK2Config]) -> None:
    """torch's own checks of schemas, shapes without data, and gradients under dynamic shapes."""
    _, packed = pair(tiny_config)
    hidden, index, weights = inputs(4, torch.float32)
    made = adapters(packed, torch.float32)[:1]
    stacks = [value for name in STACKS for value in vars(packed.stack(name)).values()]
    hidden.requires_grad_()
    weights.requires_grad_()
    factors = [each.requires_grad_() for each in (made[0].a, made[0].b)]
    options = ([factors[0]], [factors[1]], [0], [0.7], [0.0], None, torch.float32, False)
    operation = torch.ops.transformers_k2.packed_experts.default
    torch.library.opcheck(operation, (hidden, weights, index, *stacks, *options))


def test_adapters_that_do_not_fit_are_refused(tiny_config: Callable[..., KimiK2Config]) -> None:
    _, packed = pair(tiny_config)
    hidden, index, weights = inputs(2, torch.float32)
    good = adapters(packed, torch.float32)[0]
    for bad, message in (
        (good._replace(stack="up_proj"), "stack is 'up_proj': expected one of gate_up_proj, down_proj"),
        (good._replace(b=good.b[:-1]), r"LoRA B of gate_up_proj is \[5, 128, 5\]: expected \[6, 128, rank\]"),
        (good._replace(a=good.a[:3]), r"LoRA A of gate_up_proj is \[3, 5, 96\]: expected \[6, 5, 96\]"),
        (good._replace(stack="down_proj"), "LoRA B of down_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            packed(hidden, index, weights, bad)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size is 32, but rows have 40 weights"):
        PackedExperts(2, 64, 40)
