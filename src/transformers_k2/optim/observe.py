"""Watch attention modules while a model trains, and keep the largest logit of every head for QK-Clip.

A watched module needs no change and no attention function of its own: while its forward runs, a call of
F.scaled_dot_product_attention is answered by the kernel that would have run anyway, asked for its log-sum-exp too
(sdpa.py; max_logits.py makes the maximum of it), and a softmax over four dimensions shows the logits themselves, which
is how eager attention works. Attention functions that go neither way call `record`.

Given up: attention that computes its softmax out of sight (the flash-attn packages) is an error, and so are shards of a
tensor-parallel module, which hold fewer heads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .max_logits import MaskMod, max_logits, max_of_logits
from .sdpa import SDPA, attend_with_lse, autocast

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class LogitObserver:
    """The largest attention logits of the watched modules over all forwards since the last `reset`.

    A forward counts when its module is in training mode or gradients are enabled. Recomputation under gradient
    checkpointing is harmless: the same maximum twice is the maximum once.

    Args:
        tau: heads whose largest log-sum-exp is not above it keep a bracket instead of the exact maximum.
    """

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self.names: list[str] = []
        self.num_heads: list[int] = []
        self._watches: list[_Watch] = []
        self._handles: list[Any] = []

    def watch(self, name: str, module: nn.Module, num_heads: int) -> None:
        """Record the attention inside `module`, which has `num_heads` query heads, under `name`.

        From now on a forward of it that counts raises RuntimeError when it shows no attention, and ValueError when the
        attention has another number of heads. Copies of the module (deepcopy, pickle) are not watched.
        """
        watch = _Watch(name, num_heads, self.tau)
        self.names.append(name)
        self.num_heads.append(num_heads)
        self._watches.append(watch)
        self._handles.append(module.register_forward_pre_hook(watch.enter))
        # In front of earlier ones: who entered last leaves first.
        self._handles.append(module.register_forward_hook(watch.leave, prepend=True, always_call=True))

    def packed(self, device: torch.device | str) -> Float[Tensor, "3 total_heads"]:
        """Rows exact, upper, lower of max_logits(), for the heads of all modules in the order of watching; float32.

        -inf where nothing was seen. Micro-batches and ranks merge by elementwise maximum; the value of a head is
        max(exact, upper), and it is exact where exact >= upper.
        """
        parts = [torch.empty(3, 0, device=device)]
        for watch in self._watches:
            seen = watch.seen
            parts.append(
                torch.full((3, watch.num_heads), -math.inf, device=device)
                if seen is None
                else seen.to(device)
            )
        return torch.cat(parts, 1)

    def reset(self) -> None:
        """Forget what was seen."""
        for watch in self._watches:
            watch.seen = None
        # A forward that Ctrl-C interrupted has left no hook the time to tidy up.
        while _local.stack and _local.stack[-1].watch in self._watches:
            _local.stack.pop().__exit__(None, None, None)

    def close(self) -> None:
        """Stop watching. What was seen stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def recording() -> bool:
    """Is a watched attention module being executed, in a forward that counts?"""
    return bool(_local.stack)


@torch.compiler.disable()
def record(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    lse: Float[Tensor, "batch heads rows"] | None,
    *,
    scaling: float,
    is_causal: bool = False,
    mask: Tensor | MaskMod | None = None,
) -> None:
    """Tell the innermost watched module about its attention; does nothing when there is none. See max_logits()."""
    for watch in _watching():
        _record(watch, query, key, lse, scaling, is_causal, mask)


def _record(
    watch: _Watch,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    scaling: float,
    is_causal: bool,
    mask: Tensor | MaskMod | None,
) -> None:
    one_row = query.shape[1] * query.shape[2] == watch.num_heads and query.shape[1] == key.shape[1]
    if one_row and query.shape[1] != watch.num_heads:
        # transformers turns the groups of one query row into rows, because all of them see the same keys.
        query, lse = query.flatten(1, 2)[:, :, None], None if lse is None else lse.flatten(1, 2)[:, :, None]
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.flatten(1, 2)[:, :, None]
        is_causal = False
    if query.shape[1] != watch.num_heads:
        raise ValueError(
            f"{watch.name}: attention over {query.shape[1]} heads was observed, expected {watch.num_heads}; "
            "a tensor-parallel shard cannot be watched"
        )
    watch.add(max_logits(query, key, lse, scaling=scaling, tau=watch.tau, is_causal=is_causal, mask=mask))


@torch.compiler.disable()
def _record_logits(logits: Tensor) -> None:
    for watch in _watching():
        if logits.dim() == 4 and logits.shape[1] == watch.num_heads:
            watch.add(max_of_logits(logits))


def _watching() -> list[_Watch]:
    """Who watches the module that is being executed: more than one if it has had several optimizers."""
    stack = _local.stack
    return [frame.watch for frame in stack if frame.module is stack[-1].module]


class _Watch:
    """The hooks of one module, and what they saw."""

    def __init__(self, name: str, num_heads: int, tau: float, active: bool = True) -> None:
        self.name, self.num_heads, self.tau, self.active = name, num_heads, tau, active
        self.seen: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The hooks travel with copies of the module; no observer reads a copy, so it is put to sleep.
        return _Watch, (self.name, self.num_heads, self.tau, False)

    def add(self, maxima: Float[Tensor, "3 heads"]) -> None:
        self.seen = maxima if self.seen is None else torch.maximum(self.seen.to(maxima.device), maxima)
        for frame in _local.stack:
            frame.recorded = frame.recorded or frame.watch is self

    @torch.compiler.disable()
    def enter(self, module: nn.Module, args: Any) -> None:
        if self.active and (module.training or torch.is_grad_enabled()):
            frame = _Frame(self, module)
            _local.stack.append(frame)
            frame.__enter__()

    @torch.compiler.disable()
    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Also called, with no output, when the forward raised."""
        if not _local.stack or _local.stack[-1].watch is not self:
            return
        frame = _local.stack.pop()
        frame.__exit__(None, None, None)
        if output is not None and not frame.recorded:
            raise RuntimeError(
                f"{self.name}: its attention implementation shows neither logits nor their log-sum-exp, so that the "
                "largest logit is unknown; choose attn_implementation sdpa, eager or flex_attention"
            )


class _Frame(TorchFunctionMode):
    """One forward of a watched module. PyTorch switches a mode off while it answers a call."""

    def __init__(self, watch: _Watch, module: nn.Module) -> None:
        super().__init__()
        self.watch, self.module = watch, module
        self.recorded = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A frame that is not the innermost only passes calls on.
        if _local.stack and _local.stack[-1] is self:
            if func is SDPA:
                return _attend(*args, **kwargs)
            if func in _SOFTMAX:
                _record_logits(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


class _Local(threading.local):
    """Gradient checkpointing runs forwards in the threads of the backward pass."""

    def __init__(self) -> None:
        self.stack: list[_Frame] = []


_local = _Local()


@torch.compiler.disable()
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention, recorded."""
    if query.dim() != 4:
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    output, lse = attend_with_lse(query, key, value, attn_mask, dropout_p, is_causal, scaling, enable_gqa)
    record(query, key, lse, scaling=scaling, is_causal=is_causal, mask=attn_mask)
    return output
