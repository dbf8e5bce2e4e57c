"""Cross-entropy over a large vocabulary without its logits: the head's matrix product and the loss, chunk by chunk.

K2's vocabulary has 163,840 entries: the logits of 4,096 tokens are 2.7 GB in float32, and a training step holds them some
four times. Here one chunk of tokens exists at a time, and its gradients are computed in the forward pass, while its
probabilities are there, so that nothing is computed twice. Tokens without a label are left out from the start.

Given up: double backward, and heads whose weight is split over tensor-parallel ranks. The gradient of the weight exists
from the forward pass on, in float32 until the last chunk, instead of from the backward pass on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    num_items: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """F.cross_entropy(F.linear(hidden, weight), labels), with logits for `chunk_tokens` tokens at a time.

    Products are computed in the dtype of `weight`, or of autocast; everything after them in float32 (float64 inputs stay
    float64). The backward pass scales what is there, in place unless the graph is retained.

    Args:
        hidden: [tokens, hidden].
        weight: [vocabulary, hidden].
        labels: [tokens], int64; already shifted.
        chunk_tokens: how many rows of logits are held at once.
        num_items: what the sum is divided by; the number of labels if None.
        ignore_index: the label of tokens that do not count.

    Returns:
        The loss, a scalar. With no label at all, as in torch: NaN if `num_items` is None, zero otherwise, and gradients of
        zero.

    Raises:
        ValueError: `chunk_tokens` is not positive, or the shapes do not fit.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected a number of tokens from 1 on.")
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not fit: "
            "expected [tokens, hidden], [vocabulary, hidden] and [tokens]."
        )
    total, count = _SumOfLosses.apply(
        hidden, weight, labels, chunk_tokens, ignore_index, torch.is_grad_enabled()
    )
    return total / (count if num_items is None else num_items)


class _SumOfLosses(torch.autograd.Function):
    """The sum over all labels, and their number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        ignore_index: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        needs_hidden = with_gradients and hidden.requires_grad
        needs_weight = with_gradients and weight.requires_grad
        labels = labels.to(hidden.device)
        tokens = (labels != ignore_index).nonzero().squeeze(1)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for chunk in tokens.split(chunk_tokens):
                rows, targets = hidden[chunk].to(dtype), labels[chunk, None]
                logits = (rows @ matrix.T).to(wide)
                highest = logits.amax(1, keepdim=True)
                total -= (logits.gather(1, targets) - highest).sum()
                sums = logits.sub_(highest).exp_().sum(1, keepdim=True)
                total += sums.log().sum()
                if not needs_hidden and not needs_weight:
                    continue
                grads = logits.div_(sums)  # probabilities; less one at the label, the gradient
                grads.scatter_add_(1, targets, torch.full_like(sums, -1.0))
                grads = grads.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grads @ matrix).to(hidden.dtype)
                if grad_weight is not None and dtype is wide:
                    grad_weight.addmm_(grads.T, rows)
                elif grad_weight is not None:
                    grad_weight += grads.T @ rows
                del logits, grads
        # Not among the saved tensors: hooks on those have nothing to gain from what the backward pass needs at once.
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.nothing = tokens.shape[0] == 0
        count = torch.tensor(tokens.shape[0], device=hidden.device)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of linear_cross_entropy were handed out: to go backward a second time, pass "
                "retain_graph=True the first time."
            )
        if ctx.nothing:
            grad = torch.zeros_like(grad)  # the mean over no labels divides by zero: infinite
        grad_hidden, grad_weight = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return _scaled(grad_hidden, grad), _scaled(grad_weight, grad), None, None, None, None
        ctx.gradients = None
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(grad)
        return grad_hidden, grad_weight, None, None, None, None


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else (gradient * factor).to(gradient.dtype)


class LanguageModelHead(nn.Linear):
    """A linear layer without bias that returns the loss when it is given labels.

    The loss is computed inside this module's forward, where hooks that gather a sharded weight have done so.
    """

    def forward(
        self,
        input: Tensor,
        labels: Tensor | None = None,
        chunk_tokens: int | None = None,
        num_items: int | Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor:
        """[..., hidden] -> logits [..., vocabulary]; with `labels` [...], the loss. See linear_cross_entropy.

        Raises:
            ValueError: labels with a weight that tensor parallelism has split.
        """
        if labels is None:
            return super().forward(input)
        if isinstance(self.weight, DTensor):
            raise ValueError(
                "loss_chunk_tokens is set, but the head's weight is split over tensor-parallel ranks: set it to None, or "
                "use tp_size=1."
            )
        assert chunk_tokens is not None, "labels come with chunk_tokens"
        assert self.bias is None
        return linear_cross_entropy(
            input.flatten(0, -2), self.weight, labels.flatten(), chunk_tokens, num_items, ignore_index
        )
