"""Experts on packed INT4 weights against transformers' own experts on the dequantised ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transformers_k2 import KimiK2Config, KimiK2Model
from transformers_k2.quantization.int4 import dequantize, pack, quantize
from transformers_k2.quantization.packed_experts import STACKS, PackedExperts
from transformers_k2.quantization.packed_linear import threshold

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
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed(hidden.requires_grad_(), index, weights.requires_grad_())
    kept = sum(value.nbytes for value in saved)
    assert kept == 50 * CHOSEN * (2 * WIDTH + 1) * 4


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size is 32, but rows have 40 weights"):
        PackedExperts(2, 64, 40)
