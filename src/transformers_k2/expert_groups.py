"""Pairs of token and expert, sorted by expert: gathered, multiplied slice by slice, and summed again by token."""

from __future__ import annotations

from collections.abc import Callable

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
        for expert, start, end in self._slices():
            product(expert, values[start:end], output[start:end])
        output[self.ends[-1] :] = 0
        return output

    def outer(self, left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
        """[pairs, out] and [pairs, in] -> [experts, out, in]: the gradient of `linear` for its matrices."""
        if self.grouped:
            return F.grouped_mm(left.T, right, offs=self.offsets)
        output = left.new_empty(shape)
        for expert, start, end in self._slices(empty=True):
            if start == end:
                output[expert] = 0
            else:
                torch.mm(left[start:end].T, right[start:end], out=output[expert])
        return output

    def _slices(self, empty: bool = False) -> list[tuple[int, int, int]]:
        starts = [0, *self.ends[:-1]]
        slices = zip(range(self.num_experts), starts, self.ends, strict=True)
        return [entry for entry in slices if empty or entry[1] < entry[2]]

    def _clean(self, values: Tensor) -> Tensor:
        """Zero the rows behind the last expert's, which grouped_mm leaves as they were in memory."""
        if self.grouped:
            behind = torch.arange(values.shape[0], device=values.device) >= self.offsets[-1]
            return values.masked_fill(behind.view(-1, *[1] * (values.dim() - 1)), 0)
        return values


def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype == torch.float64 or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
