"""Routed experts whose weights stay INT4 in memory: 0.56 bytes a weight as stored, 0.63 in the order of the CPU's kernel.

The module takes the place of transformers' experts and computes what those would with the dequantised weights. Weights are
frozen; gradients reach the hidden states, the routing weights and low-rank adapters (packed_ops.py), and the backward
pass dequantises again what it needs, band by band, so that the output of the gate and up projections is nearly all that
a layer keeps.

Parameters have the hub's form, which our own CPU kernel reads, or, on a CPU without a compiler and after
`use_kernel_form`, that of ATen's kernel; which of them is told by their dtype. State dicts, other devices and other
processes see the hub's form only. Given up: kernels for other devices (they dequantise band by band), and training of the
weights themselves (qat.py has that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .codecs.int4_pack import PER_INT32
from .int4 import GROUP_SIZE, count_groups
from .kernel_layout import from_kernel, from_kernel_, hub_scales, kernel_available, kernel_scales, to_kernel_
from .packed_ops import STACKS, Adapter, Stack, packed_experts


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

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *adapters: Adapter
    ) -> Tensor:
        """What the chosen experts make of each token, weighted and summed, as `experts.experts_forward`.

        torch.compile takes it whole, for inference and for training.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], int64; ids that are not below the number of experts are skipped.
            top_k_weights: [tokens, k].
            adapters: LoRA on either stack, any number; see packed_ops.py.

        Returns:
            [tokens, hidden] in the dtype of `hidden_states`.

        Raises:
            ValueError: an adapter's shapes do not fit.
        """
        stacks = self.stack("gate_up_proj"), self.stack("down_proj")
        return packed_experts(hidden_states, top_k_weights, top_k_index, *stacks, adapters)

    def stack(self, name: str) -> Stack:
        """The matrices called `name`, of STACKS."""
        return Stack(self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale"))

    def unpacked(self, name: str) -> Tensor:
        """What the matrices called `name` would be without packing: [experts, out, in] on the meta device."""
        sizes = {stack: (self.num_experts, *size) for stack, *size in self.shapes()}
        return torch.empty(sizes[name], dtype=torch.bfloat16, device="meta")

    @torch.no_grad()
    def restore_scales(self) -> None:
        """Undo a cast of all parameters one by one, as `prepare_model_for_kbit_training` does it; nothing is lost.

        Products with scales in another dtype are the same; they are only larger. `_apply` never casts them.
        """
        for name in STACKS:
            scale = self.get_parameter(f"{name}_scale")
            if scale.dtype != torch.bfloat16:
                scale.data = scale.data.to(torch.bfloat16)

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
        """Undo `use_kernel_form`, in place."""
        for name in STACKS:
            packed, scale = self.get_parameter(f"{name}_packed"), self.get_parameter(f"{name}_scale")
            if packed.dtype == torch.uint8:
                self._set(name, from_kernel_(packed.data), hub_scales(scale.data))

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
            scale = scale if scale.dtype == torch.bfloat16 else scale.to(torch.bfloat16)
            for key, value in ((f"{prefix}{name}_packed", packed), (f"{prefix}{name}_scale", scale)):
                destination[key] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.use_hub_form()
        super()._load_from_state_dict(*args, **kwargs)


@contextmanager
def hub_form(model: nn.Module) -> Iterator[None]:
    """Packed experts in a model have the hub's form for as long; their state dict is then no copy."""
    found = [module for module in model.modules() if isinstance(module, PackedExperts)]
    changed = [module for module in found if module.gate_up_proj_packed.dtype == torch.uint8]
    for module in changed:
        module.use_hub_form()
    try:
        yield
    finally:
        for module in changed:
            module.use_kernel_form()
