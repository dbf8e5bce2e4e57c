"""A decoder layer's other parts for inference on a CPU: upstream's modules, by the kernels of cpu/few_rows.py and small.py.

One token's step reads each active weight once, and the rest of its time goes to small operations: a norm is six of them,
the choice of experts twenty. These classes take the place of upstream's in our model (same parameters, same names), and
use the kernels while `kernels` says so: for tokens that follow cached ones, and for long inputs. Elsewhere they are
upstream's, bit for bit: short inputs without a past, gradients, autocast, other devices, no compiler.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)
from transformers.utils.generic import maybe_autocast

from .cpu import few_rows, small
from .linear_cross_entropy import LanguageModelHead

_MANY_TOKENS = 512  # from here on speed matters more than upstream's last bits


class kernels:  # noqa: N801
    """A context in which this thread's modules use the kernels, if the inputs are worth it.

    Args:
        inputs: ids [b, q] or embeddings [b, q, hidden].
        cache: what the inputs follow.
    """

    def __init__(self, inputs: Tensor | None, cache: Cache | None) -> None:
        self.on = inputs is not None and not torch.is_grad_enabled() and _is_worth(inputs, cache)

    def __enter__(self) -> None:
        state = _state()
        self.before, state.on = state.on, state.on or self.on

    def __exit__(self, *_: object) -> None:
        _state().on = self.before


def _is_worth(inputs: Tensor, cache: Cache | None) -> bool:
    batch, num_queries = inputs.shape[:2]
    if batch * num_queries > _MANY_TOKENS:
        return True
    if cache is None:
        return False
    # The length of a static cache is a tensor, which may be on another device.
    return num_queries == 1 if cache.is_compileable else cache.get_seq_length() > 0


class _Flag:
    on = False


class _LocalFlag(threading.local):
    on = False


_TRACED, _LOCAL = _Flag(), _LocalFlag()


def _state() -> _Flag | _LocalFlag:
    """torch.compile cannot trace a thread's own variable."""
    return _TRACED if torch.compiler.is_compiling() else _LOCAL


def plain_weight(module: nn.Module, like: Tensor) -> Tensor | None:
    """The matrix [out, in] that the module multiplies with and does nothing else, or None.

    None for adapters, quantised and biased layers, hooks (which may bring the weight from elsewhere), another dtype.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    parameters = module._parameters  # the module's own attributes take ten times as long
    weight = parameters.get("weight")
    if (
        parameters.get("bias", weight) is not None
        or type(weight) is not nn.Parameter
        or weight.dtype != like.dtype
        or weight.device != like.device
        or module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
    ):
        return None
    return weight


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), by the kernel for few rows if the module is plain."""
    return project(module, x)[0]


def project(module: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """`linear`, and whether the kernel did it: then nobody else holds the result, which may be changed in place."""
    if _runs():
        weight = plain_weight(module, x)
        if weight is not None and few_rows.takes(x, weight):
            return few_rows.linear(x, weight), True
    return module(x), False


class KimiK2RMSNorm(DeepseekV3RMSNorm):
    """Upstream's norm in one call; the same roundings."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if _runs():
            weight = self.weight
            if small.takes_norm(hidden_states, weight):
                return small.rms_norm(hidden_states, weight, self.variance_epsilon)
        return super().forward(hidden_states)


class KimiK2MLP(DeepseekV3MLP):
    """Upstream's gated layer: the dense one, and the shared expert."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if not _runs() or not _is_silu(self.config):
            return super().forward(x)
        gate, up, down = (plain_weight(m, x) for m in (self.gate_proj, self.up_proj, self.down_proj))
        if gate is not None and up is not None and down is not None and few_rows.takes(x, gate, up, down):
            return few_rows.gated_mlp(x, gate, up, down)
        return super().forward(x)


class KimiK2Experts(DeepseekV3Experts):
    """Upstream's experts; for a few tokens each chosen matrix is read once, whatever the experts' implementation is."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k], [tokens, k] -> [tokens, hidden]."""
        gate_up, down = cast(Tensor, self.gate_up_proj), cast(Tensor, self.down_proj)
        if (
            _runs()
            and _is_silu(self.config)
            and few_rows.takes_experts(hidden_states, gate_up, down, top_k_weights)
        ):
            return few_rows.experts(hidden_states, top_k_index, top_k_weights, gate_up, down)
        return super().forward(hidden_states, top_k_index, top_k_weights)


class KimiK2Head(LanguageModelHead):
    """The language-model head."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., hidden] -> logits [..., vocabulary], or a loss as LanguageModelHead.forward."""
        plain = not args and not kwargs and self.bias is None and input.dtype == self.weight.dtype
        if plain and _runs() and few_rows.takes(input, self.weight):
            return few_rows.linear(input, self.weight)
        return super().forward(input, *args, **kwargs)


class KimiK2TopkRouter(DeepseekV3TopkRouter):
    """Upstream's router, in float32 under autocast too, and without the choice among groups where there is one group.

    Upstream casts its operands to float32, but autocast casts a linear layer's operands again: in bfloat16 the scores of
    hundreds of experts tie, and the experts chosen are not those that the weights ask for.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, sequence, hidden] -> logits [tokens, experts], weights and indices of the chosen [tokens, top k]."""
        with maybe_autocast(hidden_states.device.type, enabled=False):
            if self.num_group != 1:
                return super().forward(hidden_states)
            x, weight, top_k = hidden_states.view(-1, self.hidden_dim), self.weight, cast(int, self.top_k)
            if _state().on and few_rows.takes(x, weight):
                logits = few_rows.linear(x, weight, torch.float32)
                bias = self.e_score_correction_bias.float()
                if small.takes_routing(logits, bias):
                    normalise, factor = bool(self.norm_topk_prob), float(self.routed_scaling_factor)
                    return logits, *small.route(logits, bias, top_k, normalise, factor)
            else:
                logits = F.linear(x.float(), weight.float())
            scores = logits.sigmoid()
            index = torch.topk(scores + self.e_score_correction_bias, k=top_k, dim=-1, sorted=False)[1]
            weights = scores.gather(1, index)
            if self.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return logits, weights * self.routed_scaling_factor, index


def install(model: nn.Module) -> None:
    """Give upstream's modules in the model these classes. New ones would draw their weights again."""
    for module in model.modules():
        module.__class__ = _CLASSES.get(type(module), type(module))


def _is_silu(config: Any) -> bool:
    return config.hidden_act in ("silu", "swish")


def _runs() -> bool:
    """Kernels know nothing of autocast."""
    return _state().on and not torch.is_autocast_enabled("cpu")


_CLASSES: dict[type, type] = {
    DeepseekV3RMSNorm: KimiK2RMSNorm,
    DeepseekV3MLP: KimiK2MLP,
    DeepseekV3Experts: KimiK2Experts,
    DeepseekV3TopkRouter: KimiK2TopkRouter,
}
