"""Watch attention modules while a model trains, and keep the largest logit of every head for QK-Clip.

A watched module needs no change and no attention function of its own: while its forward runs, a call of
F.scaled_dot_product_attention is answered by the kernel that would have run anyway, asked for its log-sum-exp too
(max_logits.py makes the maximum of it), and a softmax over four dimensions shows the logits themselves, which is how
eager attention works. Attention functions that go neither way call `record`.

On the CPU the fused kernel wants equal head dims, so multi-head latent attention (values narrower than keys) falls back
to the slow composed form in plain PyTorch; here the narrower side is padded with zeros, which is exact and faster.

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
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from .max_logits import MaskMod, max_logits, max_of_logits

_SDPA = F.scaled_dot_product_attention
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
            if func is _SDPA:
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
        return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    kernel = _on_cpu if query.device.type == "cpu" else _on_cuda
    output, lse = kernel(query, key, value, attn_mask, dropout_p, is_causal, scaling, enable_gqa)
    record(query, key, lse, scaling=scaling, is_causal=is_causal, mask=attn_mask)
    return output


def _autocast(query: Tensor, *others: Tensor | None) -> list[Any]:
    """What autocast does to the arguments of F.scaled_dot_product_attention, but not to those of the kernels."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return [query, *others]
    dtype = torch.get_autocast_dtype(device)
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (query, *others)
    ]


_Answer = tuple[Tensor, Tensor | None]


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> _Answer:
    """The fused CPU kernel on zero-padded head dims; where it cannot run, the original call and no log-sum-exp."""
    missing = query.shape[-1] - value.shape[-1]
    q, k = (F.pad(x, (0, max(-missing, 0))) if missing < 0 else x for x in (query, key))
    v = F.pad(value, (0, missing)) if missing > 0 else value
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)
    if choice != SDPBackend.FLASH_ATTENTION.value or (missing and _has_blind_rows(mask)):
        return _SDPA(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa), None
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    return output[..., : value.shape[-1]], lse


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> _Answer:
    """The kernel that F.scaled_dot_product_attention would choose, prepared as it does, with its log-sum-exp.

    Written from PyTorch's sources and operator schemas; not yet run on a GPU.
    """
    choice = torch._fused_sdp_choice(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if choice == SDPBackend.FLASH_ATTENTION.value:
        # The kernel takes head dims that are multiples of 8, and no mask.
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (query, key, value))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout, is_causal, False, scale=scale
        )[:2]
        return output[..., : value.shape[-1]], lse
    if choice == SDPBackend.EFFICIENT_ATTENTION.value:
        bias = _additive(mask, query.dtype)
        if bias is not None:
            # Rows of the bias have to start at multiples of 16 elements.
            num_keys = bias.shape[-1]
            if num_keys % 16:
                bias = F.pad(bias, (0, -num_keys % 16))[..., :num_keys]
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout, is_causal, scale=scale
        )[:2]
        return output, lse[..., : query.shape[2]]  # padded to a multiple of 32 rows
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, _additive(mask, query.dtype), True, dropout, is_causal, False, scale=scale
        )[:2]
        return output, lse.reshape(query.shape[:3])
    return _SDPA(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa), None


def _has_blind_rows(mask: Tensor | None) -> bool:
    """Does an additive mask hide all keys of a row by a finite value?

    Such a row averages all values. The composed form derives that correctly; the fused kernel's gradient does not: its
    log-sum-exp has lost log(n).
    """
    if mask is None or mask.dtype == torch.bool:
        return False
    best = mask.amax(-1)
    return bool(((best <= torch.finfo(mask.dtype).min / 2) & (best > -math.inf)).any())


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
