"""Routed experts for training: transformers' experts interface under the name `k2`, with a backward pass of its own.

Tokens are sorted by expert once; every expert then multiplies one contiguous slice. Of the activations only the output of
the gate and up projections is kept for the backward pass (expert_groups.py), and the tokens are gathered again. So the
recomputation choices `swiglu` and `moe_down` of the K2 report hold for routed experts without a matrix product computed
twice.

On GPUs from compute capability 8.0 the products are torch's grouped_mm, elsewhere one product per expert, which reads the
slices' lengths on the host once a pass. Given up: biases, transposed or ungated experts (no K2 layout has them; an
error), and double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import expert_groups
from .expert_groups import Groups

NAME = "k2"


def register() -> None:
    """Make `experts_implementation="k2"` known to transformers. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the chosen experts make of each token, weighted and summed; the signature is transformers' interface.

    Under autocast the products are computed in its dtype, as a linear layer's are; the weighted sum is float32 at least.

    Args:
        self: the module with gate_up_proj [experts, 2 * intermediate, hidden] and down_proj [experts, hidden,
            intermediate]; under expert parallelism these are a rank's own experts.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k], int64; ids that are not below the number of experts are skipped.
        top_k_weights: [tokens, k].

    Returns:
        [tokens, hidden] in the dtype of `hidden_states`.

    Raises:
        ValueError: experts with biases, without gates, transposed, or with an activation other than SiLU.
    """
    if self.has_bias or not self.has_gate or self.is_transposed or not self.is_concatenated:
        raise ValueError(
            f"experts_implementation={NAME!r} computes gated experts without biases, stored [experts, out, in]; "
            f"{type(self).__name__} is none: choose 'eager' or 'grouped_mm'."
        )
    if self.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"experts_implementation={NAME!r} knows the activation 'silu', the configuration says "
            f"{self.config.hidden_act!r}: choose 'eager' or 'grouped_mm'."
        )
    return _Experts.apply(hidden_states, self.gate_up_proj, self.down_proj, top_k_weights, top_k_index)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, index: Tensor
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype
        with torch.autocast(device, enabled=False):
            groups = Groups(index, gate_up.shape[0], hidden.device, dtype)
            matrices = _Stack(gate_up, dtype), _Stack(down, dtype)
            output, gate_up_out = expert_groups.forward(groups, hidden.to(dtype), weights, *matrices)
            ctx.save_for_backward(hidden, gate_up, down, weights, gate_up_out)
            ctx.groups, ctx.dtype = groups, dtype
            return output.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate_up, down, weights, gate_up_out = ctx.saved_tensors
        needs_hidden, needs_gate_up, needs_down, needs_weights, _ = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden, grad_weights, of_gate_up, of_down = expert_groups.backward(
                ctx.groups,
                grads[0],
                hidden,
                weights,
                gate_up_out,
                _Stack(gate_up, ctx.dtype),
                _Stack(down, ctx.dtype),
                needs_hidden,
                needs_weights,
                needs_gate_up,
                needs_down,
            )
            grad_gate_up = of_gate_up[0].to(gate_up.dtype) if needs_gate_up else None
            grad_down = of_down[0].to(down.dtype) if needs_down else None
        return grad_hidden, grad_gate_up, grad_down, grad_weights, None


class _Stack:
    """[experts, out, in], cast for as long as a product takes."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def product(self, groups: Groups, rows: Tensor) -> Tensor:
        return groups.linear(rows, self.weight.to(self.dtype))

    def transposed_product(self, groups: Groups, grads: Tensor) -> Tensor:
        return groups.linear(grads, self.weight.to(self.dtype).transpose(1, 2))

    def gradients(self, groups: Groups, grads: Tensor, rows: Tensor) -> list[Tensor]:
        return [groups.outer(grads, rows, self.weight.shape)]
