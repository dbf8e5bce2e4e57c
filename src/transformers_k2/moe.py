"""Keep the experts of a DeepSeek-V3-style mixture evenly loaded while it trains, and count what each of them gets.

transformers' class routes tokens but has no balance loss, never moves the routers' bias and keeps no statistics.
`RouterBalance` adds the three through forward hooks, so that the model's own forward and loss stay as they are under
DDP, FSDP2, expert parallelism, pipeline stages and gradient checkpointing. What it gives up: the hooks break a compiled
graph at every router, and reentrant checkpointing cannot carry the balance loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

BIAS = "e_score_correction_bias"
_TINY = 1e-20  # what upstream, too, keeps a sum of scores away from zero with


@dataclass(frozen=True)
class RouterLoad:
    """What one router did between two updates, summed over the ranks of the process group."""

    loads: Tensor  # int64 [experts] on the CPU: how many (token, choice) pairs each expert got
    balance_loss: float  # alpha and sequence weights included

    @property
    def max_over_mean(self) -> float:
        """The fullest expert's load relative to an even one; NaN if no token was seen."""
        total = int(self.loads.sum())
        return int(self.loads.max()) * len(self.loads) / total if total else math.nan

    @property
    def num_dead(self) -> int:
        """How many experts got no token."""
        return int((self.loads == 0).sum())


@dataclass
class _Tally:
    """What a router's hook gathers, on its device: reading it is what would make the host wait."""

    loads: Tensor | None = None  # int64 [experts]
    balance_loss: Tensor | None = None  # float32 []
    has_graph: bool = False  # the last forward pass was recorded by autograd


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of the model by module name, in its order; none on a pipeline stage of dense layers."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, DeepseekV3TopkRouter)
    }


class RouterBalance:
    """Counts expert loads, adds the sequence-wise balance loss, and moves the routers' bias after each step.

    The loss is DeepSeek-V3's (arXiv 2412.19437, equations 17-20): for each sequence of T tokens and each layer
    `alpha * sum_i f_i P_i` with `f_i = N / (K T) * #{t: s_ti among the K largest of s_t}`, without the bias, and
    `P_i = mean_t s_ti / sum_j s_tj`. Only its gradient enters the backward pass, beside that of the model's loss and
    scaled by nothing but `sequence_weight`: with a loss scaler, multiply that by the scale.

    The bias rule is Moonlight's (arXiv 2502.16982, appendix C): `b_i += u * (sign(e_i) - mean_j sign(e_j))`, e_i being
    the mean load minus that of expert i. It is centred: a common shift changes no choice but eats float32's digits.

    A forward pass counts when its router is in training mode and it is not the recomputation of a checkpoint.

    Args:
        model: any module that holds routers; their bias is made float32.
        bias_update_speed: u; 0 leaves the bias alone.
        balance_loss: alpha; 0 adds nothing to the graph.
        process_group: the ranks whose tokens count together: those that hold the same layers and see different tokens.
            Default: all, if torch.distributed is initialised.

    Attributes:
        sequence_weight: what each sequence's loss is multiplied by. For the mean over a global batch under gradients
            that are averaged over ranks: data-parallel size / sequences in the global batch, accumulation steps
            included. None: 1 / batch size of that forward pass.
        token_mask: bool [batch, sequence] of the current forward pass, False where a token is padding; None: all count.
        frozen: statistics and loss go on, the bias stays.

    Raises:
        ValueError: a speed or a coefficient is negative or not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bias_update_speed: float,
        balance_loss: float,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, value in (("bias_update_speed", bias_update_speed), ("balance_loss", balance_loss)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: expected a finite number >= 0.")
        self.bias_update_speed = bias_update_speed
        self.balance_loss = balance_loss
        self.process_group = process_group
        self.sequence_weight: float | None = None
        self.token_mask: Tensor | None = None
        self.frozen = False
        self.routers = routers(model)
        self._tallies = {name: _Tally() for name in self.routers}
        self._hooks = []
        for name, router in self.routers.items():
            bias = router.get_buffer(BIAS)
            bias.data = bias.data.float()  # bfloat16 would lose steps of 1e-3 from 0.25 on
            self._hooks.append(router.register_forward_hook(partial(self._observe, self._tallies[name])))

    @contextmanager
    def tokens(self, mask: Tensor | None) -> Iterator[None]:
        """Within it, forward passes leave out the tokens where `mask` (bool [batch, sequence]) is False."""
        before, self.token_mask = self.token_mask, mask
        try:
            yield
        finally:
            self.token_mask = before

    @torch.no_grad()
    def update(self) -> dict[str, RouterLoad]:
        """Sum the loads over ranks, move the bias, start to count afresh: after each optimizer step, on every rank.

        Routers that saw no token keep their bias. Collective: one reduction of the loads of all layers, and one of the
        losses if there is a balance loss.

        Returns:
            By router name what was counted since the update before.

        Raises:
            ValueError: the model was cast, and a bias is not float32 any more.
        """
        if not self.routers:
            return {}
        biases = [router.get_buffer(BIAS) for router in self.routers.values()]
        for name, bias in zip(self.routers, biases, strict=True):
            if bias.dtype != torch.float32:
                raise ValueError(
                    f"{name}.{BIAS} is {bias.dtype}: expected torch.float32; keep it out of casts."
                )
        device = biases[0].device
        no_load, no_loss = torch.zeros_like(biases[0], dtype=torch.int64), biases[0].new_zeros(())
        seen = [(tally.loads, tally.balance_loss) for tally in self._tallies.values()]
        loads = torch.stack([no_load if load is None else load.to(device) for load, _ in seen])
        losses = torch.stack([no_loss if loss is None else loss.to(device) for _, loss in seen])
        self.reset()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads, group=self.process_group)
            if self.balance_loss:
                dist.all_reduce(losses, group=self.process_group)
                losses /= dist.get_world_size(self.process_group)
        if self.bias_update_speed and not self.frozen:
            for bias, step in zip(biases, bias_step(loads) * self.bias_update_speed, strict=True):
                bias += step.to(bias.device)
        stats = zip(self.routers, loads.cpu(), losses.tolist(), strict=True)
        return {name: RouterLoad(load, loss) for name, load, loss in stats}

    def reset(self) -> None:
        """Forget what was counted since the last update, for a step that was skipped."""
        for tally in self._tallies.values():
            tally.loads = tally.balance_loss = None

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.compiler.disable
    def _observe(self, tally: _Tally, router: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        if not router.training:
            return None
        logits, weights, indices = output
        if torch._C._current_graph_task_id() != -1:  # inside backward: the recomputation of a checkpoint
            if not self.balance_loss:
                return None
            if not tally.has_graph:
                raise ValueError(
                    "The balance loss cannot pass through reentrant checkpoints: expected "
                    "activation_checkpointing_kwargs={'use_reentrant': False}, or balance_loss 0."
                )
            # The node of the first pass is the one that runs; this one shows autograd the same saved tensors.
            return logits, _AddBalanceGradient.apply(weights, logits, None, None), indices
        tally.has_graph = torch.is_grad_enabled()
        batch, length = args[0].shape[:2] if args[0].ndim == 3 else (1, len(args[0]))
        mask = self.token_mask
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=logits.device)
        elif mask.shape != (batch, length) or mask.dtype != torch.bool:
            raise ValueError(
                f"token_mask is {mask.dtype} {list(mask.shape)}: expected torch.bool [{batch}, {length}], as the tokens."
            )
        mask = mask.to(logits.device)
        with torch.no_grad():
            loads = count(indices.view(batch, length, -1), mask, router.num_experts).sum(0)
            tally.loads = loads if tally.loads is None else tally.loads + loads
            if not self.balance_loss:
                return None
            scale = self.balance_loss * (1 / batch if self.sequence_weight is None else self.sequence_weight)
            fractions, losses = sequence_losses(logits.view(batch, length, -1), mask, router.top_k)
            loss = scale * losses.sum()
            tally.balance_loss = loss if tally.balance_loss is None else tally.balance_loss + loss
            per_token = scale * mask / mask.sum(1, keepdim=True).clamp_min(1)
        return logits, _AddBalanceGradient.apply(weights, logits, fractions, per_token), indices


def bias_step(loads: Tensor) -> Tensor:
    """The direction of the bias update, float32 [..., experts] in [-2, 2], from integer loads [..., experts]."""
    signs = (loads.sum(-1, keepdim=True) - loads.shape[-1] * loads).sign().float()
    return signs - signs.mean(-1, keepdim=True)


def count(indices: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """How often each expert is chosen, int64 [batch, experts]; indices [batch, sequence, k], mask [batch, sequence]."""
    batch = len(indices)
    first = torch.arange(batch, device=indices.device)[:, None, None] * num_experts
    ones = mask[..., None].expand_as(indices).long().flatten()
    counts = torch.zeros(batch * num_experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, (indices + first).flatten(), ones).view(batch, num_experts)


def sequence_losses(logits: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """f [batch, experts] and sum_i f_i P_i [batch] of logits [batch, sequence, experts]; no alpha.

    A sequence without a token has 0 for both.
    """
    num_experts = logits.shape[-1]
    num_tokens = mask.sum(1, keepdim=True).clamp_min(1)
    # The sigmoid is monotone; of the logits, fewer are equal.
    chosen = count(logits.topk(top_k, dim=-1, sorted=False).indices, mask, num_experts)
    fractions = chosen * (num_experts / top_k) / num_tokens
    scores = logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True).clamp_min(_TINY)
    mean_shares = (shares * mask[..., None]).sum(1) / num_tokens
    return fractions, (fractions * mean_shares).sum(-1)


class _AddBalanceGradient(torch.autograd.Function):
    """The routing weights unchanged; backward adds the balance loss's gradient to the logits.

    Besides the logits, which autograd would not keep, it holds a row of numbers per sequence. Those are no saved
    tensors: a checkpoint would ask for them again when the mask is gone.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, logits: Tensor, fractions: Any, per_token: Any) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.fractions, ctx.per_token = fractions, per_token
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return grads[0], None, None, None
        (logits,) = ctx.saved_tensors
        scores = logits.view(*ctx.per_token.shape, -1).sigmoid()
        total = scores.sum(-1, keepdim=True).clamp_min(_TINY)
        fractions = ctx.fractions[:, None]
        centred = fractions - (fractions * scores).sum(-1, keepdim=True) / total
        gradient = ctx.per_token[..., None] * centred * scores * (1 - scores) / total
        return grads[0], gradient.view_as(logits), None, None
