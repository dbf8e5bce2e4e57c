"""Routed experts whose weights stay INT4 in memory: 0.56 bytes a weight as stored, 0.63 in the order of the CPU's kernel.

The module takes the place of transformers' experts and computes what those would with the dequantised weights. Weights are
frozen; gradients reach the hidden states and the routing weights, and the backward pass dequantises again what it needs,
band by band, so that the output of the gate and up projections is all that a layer keeps.

Parameters have the hub's form, or, on a CPU and after `use_kernel_form`, the form that ATen's kernel reads; which of them
is told by their dtype. State dicts, other devices and other processes see the hub's form only. Given up: kernels for other
devices (they dequantise band by band), and training of the weights themselves (qat.py has that).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..expert_groups import Groups
from .codecs.int4_pack import PER_INT32
from .int4 import GROUP_SIZE, count_groups
from .kernel_layout import from_kernel, kernel_available, kernel_scales, to_kernel_
from .packed_linear import linear, linear_dequantized, linear_transposed, threshold

STACKS = ("gate_up_proj", "down_proj")


class PackedExperts(nn.Module):
    """Gated experts without biases on INT4 weights, in transformers' interface.

    Args:
        num_experts: of this module; under expert parallelism a rank's own.
        hidden_size, intermediate_size: of an expert.
        group_size: consecutive inputs that share a scale.

    Attributes:
        gate_up_proj_packed: int32 [experts, 2 * intermediate, hidden / 8].
        gate_up_proj_scale: bfloat16 [experts, 2 * intermediate, hidden / group size].
        down_proj_packed: int32 [experts, hidden, intermediate / 8].
        down_proj_scale: bfloat16 [experts, hidden, intermediate / group size].

    Raises:
        ValueError: the groups do not divide the sizes.
    """

    gate_up_proj_packed: nn.Parameter
    gate_up_proj_scale: nn.Parameter
    down_proj_packed: nn.Parameter
    down_proj_scale: nn.Parameter

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, group_size: int = GROUP_SIZE
    ) -> None:
        super().__init__()
        self.num_experts, self.group_size = num_experts, group_size
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        for name, num_out, num_in in self.shapes():
            count_groups(num_in, group_size)
            packed = torch.zeros(num_experts, num_out, -(-num_in // PER_INT32), dtype=torch.int32)
            scale = torch.zeros(num_experts, num_out, num_in // group_size, dtype=torch.bfloat16)
            self.register_parameter(f"{name}_packed", nn.Parameter(packed, requires_grad=False))
            self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the chosen experts make of each token, weighted and summed, as `experts.experts_forward`.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], int64; ids that are not below the number of experts are skipped.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, hidden] in the dtype of `hidden_states`.
        """
        return _PackedExperts.apply(hidden_states, top_k_weights, top_k_index, *map(self.stack, STACKS))

    def stack(self, name: str) -> Stack:
        """The matrices called `name`, of STACKS."""
        return Stack(self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale"))

    @torch.no_grad()
    def use_kernel_form(self) -> bool:
        """Reorder the weights for ATen's kernel, in place; whether they are so afterwards.

        False, and nothing happens, on another device than a CPU or where the kernel does not take the shapes.
        """
        for name, num_out, num_in in self.shapes():
            available = kernel_available(num_out, num_in, self.group_size, torch.bfloat16)
            if self.get_parameter(f"{name}_packed").device.type != "cpu" or not available:
                return False
        for name in STACKS:
            packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
            if packed.dtype == torch.int32:
                self._set(name, to_kernel_(packed.data.contiguous()), kernel_scales(scale.data))
        return True

    @torch.no_grad()
    def use_hub_form(self) -> None:
        """Undo `use_kernel_form`."""
        for name in STACKS:
            packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
            if packed.dtype == torch.uint8:
                self._set(name, *from_kernel(packed.data, scale.data))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, group_size={self.group_size}"
        )

    def shapes(self) -> list[tuple[str, int, int]]:
        """Name, outputs, inputs."""
        sizes = (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        return [(name, *size) for name, size in zip(STACKS, sizes, strict=True)]

    def _set(self, name: str, packed: Tensor, scale: Tensor) -> None:
        self._parameters[f"{name}_packed"] = nn.Parameter(packed, requires_grad=False)
        self._parameters[f"{name}_scale"] = nn.Parameter(scale, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        """Move, but never cast: scales are bfloat16 whatever the model computes in."""
        was_in_kernel_form = self.gate_up_proj_packed.dtype == torch.uint8
        self.use_hub_form()
        for name in STACKS:
            packed, scale = (
                self.get_parameter(f"{name}_packed").data,
                self.get_parameter(f"{name}_scale").data,
            )
            self._set(name, fn(packed), fn(scale.view(torch.int16)).view(torch.bfloat16))
        if was_in_kernel_form:
            self.use_kernel_form()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in STACKS:
            packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
            if packed.dtype == torch.uint8:
                packed, scale = from_kernel(packed.data, scale.data)
            for key, value in ((f"{prefix}{name}_packed", packed), (f"{prefix}{name}_scale", scale)):
                destination[key] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.use_hub_form()
        super()._load_from_state_dict(*args, **kwargs)


class Stack:
    """Products with one expert's matrix [out, in] out of a stack, by the way that is faster for that many rows."""

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.packed, self.scale = packed, scale

    @property
    def num_out(self) -> int:
        """Rows of a matrix."""
        return self.packed.shape[1]

    @property
    def num_in(self) -> int:
        """Columns of a matrix; inputs that fill up the last int32 aside, which K2's sizes do not have."""
        return self.packed.shape[2] * (2 if self.packed.dtype == torch.uint8 else PER_INT32)

    def product(self, expert: int, rows: Tensor, out: Tensor) -> None:
        """out = rows @ W.T: [rows, in] -> [rows, out]."""
        packed, scale = self.packed[expert], self.scale[expert]
        if packed.dtype == torch.uint8 and len(rows) < threshold(rows.dtype):
            out.copy_(linear(rows, packed, scale))
        else:
            linear_dequantized(rows, packed, scale, out)

    def transposed_product(self, expert: int, rows: Tensor, out: Tensor) -> None:
        """out = rows @ W: [rows, out] -> [rows, in]."""
        linear_transposed(rows, self.packed[expert], self.scale[expert], out)


class _PackedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, index: Tensor, gate_up: Stack, down: Stack
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            groups = Groups(index, len(gate_up.packed), hidden.device, dtype, slices=True)
            gate_up_out = groups.each(groups.gather(hidden.to(dtype)), gate_up.num_out, gate_up.product)
            gate, up = gate_up_out.chunk(2, dim=-1)
            output = groups.each(F.silu(gate).mul_(up), down.num_out, down.product)
            ctx.save_for_backward(weights, gate_up_out)
            ctx.groups, ctx.dtype, ctx.stacks, ctx.hidden_dtype = groups, dtype, (gate_up, down), hidden.dtype
            return groups.scatter(output, weights).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, gate_up_out = ctx.saved_tensors
        groups, dtype, (gate_up, down) = ctx.groups, ctx.dtype, ctx.stacks
        needs_hidden, needs_weights = ctx.needs_input_grad[:2]
        grad_hidden = grad_weights = None
        with torch.autocast(grads[0].device.type, enabled=False):
            gate, up = gate_up_out.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            grad = groups.gather(grads[0].to(dtype))
            # Of the down projection's input, without the routing weight.
            grad_activation = groups.each(grad, down.num_in, down.transposed_product)
            if needs_weights:
                wide = torch.promote_types(dtype, torch.float32)
                products = (grad_activation.to(wide) * (silu * up)).sum(-1)
                grad_weights = groups.unsort(products).view_as(weights).to(weights.dtype)
            if needs_hidden:
                grad_activation.mul_(groups.rows(weights))
                # silu'(x) = s + silu (1 - s)
                slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
                grad_out = torch.cat((grad_activation * up * slope, grad_activation * silu), -1)
                grad_rows = groups.each(grad_out, gate_up.num_in, gate_up.transposed_product)
                grad_hidden = groups.scatter(grad_rows, None).to(ctx.hidden_dtype)
        return grad_hidden, grad_weights, None, None, None
