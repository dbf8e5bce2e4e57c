"""Routed experts for training: transformers' experts interface under the name `k2`, with a backward pass of its own.

Tokens are sorted by expert once; every expert then multiplies one contiguous slice. Of the activations only the output of
the gate and up projections is kept for the backward pass: the tokens are gathered again, SwiGLU is computed again, and
the output of the down projection is not needed at all, because the gradient of a routing weight,
<down(a), g>, equals <a, g down>, whose right side is computed anyhow. So the recomputation choices `swiglu` and
`moe_down` of the K2 report hold for routed experts without a matrix product computed twice.

On GPUs from compute capability 8.0 the products are torch's grouped_mm, elsewhere one product per expert, which reads the
slices' lengths on the host once a pass. Given up: biases, transposed or ungated experts (no K2 layout has them; an
error), and double backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

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
            gate_up_out = groups.linear(groups.gather(hidden.to(dtype)), gate_up.to(dtype))
            gate, up = gate_up_out.chunk(2, dim=-1)
            output = groups.linear(F.silu(gate).mul_(up), down.to(dtype))
            ctx.save_for_backward(hidden, gate_up, down, weights, gate_up_out)
            ctx.groups, ctx.dtype = groups, dtype
            return groups.scatter(output, weights).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate_up, down, weights, gate_up_out = ctx.saved_tensors
        groups, dtype = ctx.groups, ctx.dtype
        needs_hidden, needs_gate_up, needs_down, needs_weights, _ = ctx.needs_input_grad
        grad_hidden = grad_gate_up = grad_down = grad_weights = None
        with torch.autocast(hidden.device.type, enabled=False):
            scale = groups.rows(weights)  # (pairs, 1)
            gate, up = gate_up_out.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            activation = silu * up
            grad = groups.gather(grad.to(dtype))
            # Of the down projection's input, without the routing weight.
            grad_activation = groups.linear(grad, down.to(dtype).transpose(1, 2))
            if needs_weights:
                wide = torch.promote_types(dtype, torch.float32)
                products = (grad_activation.to(wide) * activation).sum(-1)
                grad_weights = groups.unsort(products).view_as(weights).to(weights.dtype)
            if needs_down:
                grad_down = groups.outer(grad, activation.mul_(scale), down.shape).to(down.dtype)
            del grad, activation
            if needs_hidden or needs_gate_up:
                grad_activation.mul_(scale)
                grad_out = torch.empty_like(gate_up_out)
                grad_gate, grad_up = grad_out.chunk(2, dim=-1)
                torch.mul(grad_activation, silu, out=grad_up)
                # silu'(x) = s (1 + x (1 - s)) = s + silu (1 - s)
                slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
                torch.mul(grad_activation.mul_(up), slope, out=grad_gate)
                del sigmoid, silu, slope, grad_activation
                if needs_gate_up:
                    rows = groups.gather(hidden.to(dtype))
                    grad_gate_up = groups.outer(grad_out, rows, gate_up.shape).to(gate_up.dtype)
                    del rows
                if needs_hidden:
                    grad_rows = groups.linear(grad_out, gate_up.to(dtype).transpose(1, 2))
                    grad_hidden = groups.scatter(grad_rows, None).to(hidden.dtype)
        return grad_hidden, grad_gate_up, grad_down, grad_weights, None
