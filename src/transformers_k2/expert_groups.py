"""Pairs of token and expert, sorted by expert: gathered, multiplied slice by slice, and summed again by token.

And what a layer of gated experts makes of them, forward and backward, whatever its matrices are: those of experts.py are
parameters, those of quantization/packed_ops.py four bits a weight with adapters beside them. Of the activations only the
output of the gate and up projections is kept: SwiGLU is computed again, and the output of the down projection is not
needed at all, because the gradient of a routing weight, <down(a), g>, equals <a, g down>, whose right side is computed
anyhow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups:
    """Pairs of token and expert, sorted by expert: where they come from, and products over each expert's slice."""

    def __init__(
        self,
        index: Tensor,
        num_experts: int,
        device: torch.device,
        dtype: torch.dtype,
        slices: bool = False,
    ) -> None:
        """`slices`: one product per expert, whatever the device; `each` needs it."""
        self.num_experts, self.shape = num_experts, index.shape  # (tokens, k)
        experts, order = index.reshape(-1).sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=device)
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=device), right=True)
        self.order, self.inverse, self.offsets = order, inverse, ends.int()
        self.tokens = order // index.shape[1]
        self.grouped = not slices and _has_grouped_mm(device, dtype)
        self.ends = [] if self.grouped else ends.tolist()

    def gather(self, values: Tensor) -> Tensor:
        """[tokens, n] -> [pairs, n]: each pair's token."""
        return self._clean(values.index_select(0, self.tokens))

    def rows(self, weights: Tensor) -> Tensor:
        """[tokens, k] -> [pairs, 1]."""
        return self._clean(weights.reshape(-1)[self.order, None])

    def unsort(self, values: Tensor) -> Tensor:
        """[pairs] in the order of experts -> [pairs] in the order of tokens."""
        return self._clean(values)[self.inverse]

    def scatter(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """[pairs, n] -> [tokens, n]: the sum over each token's experts, weighted by [tokens, k] if given, as float32."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        if values.device.type == "cpu" and values.dtype == dtype:
            # One pass, where the code below writes the rows in the order of tokens first.
            weights = None if weights is None else weights.to(dtype)
            places = self.inverse.view(self.shape)
            return F.embedding_bag(places, values, mode="sum", per_sample_weights=weights)
        values = values[self.inverse].view(*self.shape, values.shape[1])
        if weights is None:
            return values.sum(1, dtype=dtype)
        return torch.bmm(weights[:, None].to(dtype), values.to(dtype)).squeeze(1)

    def linear(self, values: Tensor, matrices: Tensor) -> Tensor:
        """[pairs, in] by [experts, out, in] -> [pairs, out]; rows without an expert are zero."""
        if self.grouped:
            return self._clean(F.grouped_mm(values, matrices.transpose(1, 2), offs=self.offsets))

        def product(expert: int, rows: Tensor, out: Tensor) -> None:
            torch.mm(rows, matrices[expert].T, out=out)

        return self.each(values, matrices.shape[1], product)

    def each(self, values: Tensor, num_out: int, product: Callable[[int, Tensor, Tensor], object]) -> Tensor:
        """[pairs, in] -> [pairs, num_out]: `product(expert, rows, out)` for each expert's slice; other rows are zero."""
        output = values.new_empty(values.shape[0], num_out)
        for expert, start, end in self.slices():
            product(expert, values[start:end], output[start:end])
        output[self.ends[-1] :] = 0
        return output

    def outer(self, left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
        """[pairs, out] and [pairs, in] -> [experts, out, in]: the gradient of `linear` for its matrices."""
        if self.grouped:
            return F.grouped_mm(left.T, right, offs=self.offsets)
        output = left.new_empty(shape)
        for expert, start, end in self.slices(empty=True):
            if start == end:
                output[expert] = 0
            else:
                torch.mm(left[start:end].T, right[start:end], out=output[expert])
        return output

    def slices(self, empty: bool = False) -> list[tuple[int, int, int]]:
        """Expert, start and end of its pairs, in ascending order; `empty`: of experts without pairs too."""
        starts = [0, *self.ends[:-1]]
        slices = zip(range(self.num_experts), starts, self.ends, strict=True)
        return [entry for entry in slices if empty or entry[1] < entry[2]]

    def _clean(self, values: Tensor) -> Tensor:
        """Zero the rows behind the last expert's, which grouped_mm leaves as they were in memory."""
        if self.grouped:
            behind = torch.arange(values.shape[0], device=values.device) >= self.offsets[-1]
            return values.masked_fill(behind.view(-1, *[1] * (values.dim() - 1)), 0)
        return values


class Matrices(Protocol):
    """One matrix [out, in] for each expert, however it is stored."""

    def product(self, groups: Groups, rows: Tensor) -> Tensor:
        """[pairs, in] -> [pairs, out]."""
        ...

    def transposed_product(self, groups: Groups, grads: Tensor) -> Tensor:
        """[pairs, out] -> [pairs, in]: the gradient of the rows."""
        ...

    def gradients(self, groups: Groups, grads: Tensor, rows: Tensor) -> list[Tensor]:
        """[pairs, out] and [pairs, in] -> the gradients of what is trained."""
        ...


def forward(
    groups: Groups, hidden: Tensor, weights: Tensor, gate_up: Matrices, down: Matrices
) -> tuple[Tensor, Tensor]:
    """[tokens, hidden] -> [tokens, hidden], float32 at least, and what `backward` needs: [pairs, 2 * intermediate].

    `hidden` has the dtype of the products.
    """
    gate_up_out = gate_up.product(groups, groups.gather(hidden))
    gate, up = gate_up_out.chunk(2, dim=-1)
    output = down.product(groups, F.silu(gate).mul_(up))
    return groups.scatter(output, weights), gate_up_out


def backward(
    groups: Groups,
    grad: Tensor,
    hidden: Tensor | None,
    weights: Tensor,
    gate_up_out: Tensor,
    gate_up: Matrices,
    down: Matrices,
    needs_hidden: bool,
    needs_weights: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor]]:
    """The gradients of hidden states, routing weights, and of what is trained in `gate_up` and in `down`.

    Args:
        grad: of the output, [tokens, hidden]; that of the hidden states is returned in its dtype.
        hidden: [tokens, hidden], if `needs_gate_up`.
    """
    grad_hidden = grad_weights = None
    gate_up_grads: list[Tensor] = []
    down_grads: list[Tensor] = []
    dtype = gate_up_out.dtype
    scale = groups.rows(weights)  # (pairs, 1)
    gate, up = gate_up_out.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    activation = silu * up
    rows = groups.gather(grad.to(dtype))
    # Of the down projection's input, without the routing weight.
    grad_activation = down.transposed_product(groups, rows)
    if needs_weights:
        wide = torch.promote_types(dtype, torch.float32)
        products = (grad_activation.to(wide) * activation).sum(-1)
        grad_weights = groups.unsort(products).view_as(weights).to(weights.dtype)
    if needs_down:
        down_grads = down.gradients(groups, rows, activation.mul_(scale))
    del rows, activation
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
            assert hidden is not None
            gate_up_grads = gate_up.gradients(groups, grad_out, groups.gather(hidden.to(dtype)))
        if needs_hidden:
            grad_rows = gate_up.transposed_product(groups, grad_out)
            grad_hidden = groups.scatter(grad_rows, None).to(grad.dtype)
    return grad_hidden, grad_weights, gate_up_grads, down_grads


def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype == torch.float64 or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
