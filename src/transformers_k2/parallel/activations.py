"""What autograd keeps of a decoder layer between forward and backward, by tracing the real layer on the meta device.

Saved tensors are caught by torch's own hooks and counted by storage, each with the recomputation choice that would drop
it (`norms`, `swiglu`, `mla_up`, `moe_down`: the K2 report, section 2.4). Two things are replaced, for they ask for values:
attention by a kernel that saves what FlashAttention saves, and the routed experts by the same operations on as many rows
as a balanced router sends. What it gives up: memory that lives only inside an operation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

RECOMPUTE = ("norms", "swiglu", "mla_up", "moe_down", "full")
EXPERTS = ("k2", "grouped_mm")


@dataclass(frozen=True)
class Saved:
    """Bytes kept per micro-batch: by recomputation choice, "" for what none of them drops; and the layer's input."""

    by_choice: dict[str, int] = field(default_factory=dict)
    input: int = 0

    def kept(self, recompute: Sequence[str]) -> int:
        """Bytes that stay under these choices."""
        if "full" in recompute:
            return self.input
        return sum(size for choice, size in self.by_choice.items() if choice not in recompute)


def layer_activations(
    config: Any,
    micro_batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    expert_parallel: bool,
    imbalance: float = 1.0,
    experts: str = "k2",
) -> dict[str, Saved]:
    """What a layer of each kind keeps for one micro-batch: "dense" and "moe", as far as the model has them.

    Args:
        config: a KimiK2Config.
        expert_parallel: tokens travel to their experts, so that a rank computes what others send.
        imbalance: rows that the rank's experts get, relative to an even share.
        experts: the implementation of the routed experts, `k2` or `grouped_mm`.

    Raises:
        ValueError: no such implementation.
    """
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}: expected one of {', '.join(EXPERTS)}.")
    small = copy.deepcopy(config)
    num_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    small.num_hidden_layers = min(num_dense + 1, config.num_hidden_layers)
    small._attn_implementation = "sdpa"
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(small, dtype=dtype).model
        hidden = torch.empty(micro_batch_size, sequence_length, config.hidden_size, dtype=dtype)
        table = torch.empty(1, sequence_length, config.qk_rope_head_dim, dtype=dtype)
    layers = {"dense": decoder.layers[0]} if num_dense else {}
    if num_dense < config.num_hidden_layers:
        layers["moe"] = decoder.layers[-1]
        block = layers["moe"].mlp
        rows = micro_batch_size * sequence_length * config.num_experts_per_tok
        block.experts.forward = _Experts(block.experts, round(rows * imbalance), experts, expert_parallel)
    return {kind: _trace(layer.train(), hidden, (table, table)) for kind, layer in layers.items()}


def _trace(layer: nn.Module, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> Saved:
    ledger = _Ledger(layer, [hidden, *tables])
    if isinstance(experts := getattr(getattr(layer.mlp, "experts", None), "forward", None), _Experts):
        experts.label = ledger.label
    hidden = hidden.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda tensor: tensor), ledger:
        output = layer(hidden, position_embeddings=tables, attention_mask=None)
    ledger.pack(hidden)  # the residual stream: kept by the layer before, or the pipeline's buffer
    sizes: dict[str, int] = {}
    for key, tensor in ledger.saved.items():
        choice = ledger.labels.get(key, "")
        sizes[choice] = sizes.get(choice, 0) + tensor.untyped_storage().nbytes()
    assert output.shape == hidden.shape
    return Saved(sizes, hidden.nbytes)


class _Ledger(TorchFunctionMode):
    """Which storages autograd saves, and which recomputation choice each belongs to."""

    def __init__(self, layer: nn.Module, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.saved: dict[int, Tensor] = {}
        self.labels: dict[int, str] = {}
        self.region = ""
        self._weights = {_key(tensor) for tensor in (*layer.parameters(), *layer.buffers(), *given[1:])}
        self._alive: list[Tensor] = []  # so that no address is given twice
        self._entered: set[int] = {_key(given[0])}
        for name, module in layer.named_modules():
            leaf = name.rpartition(".")[2]
            if type(module).__name__.endswith("RMSNorm"):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)
            elif leaf == "act_fn":
                module.register_forward_hook(lambda _, args, output: self.label(output, "swiglu"))
            elif leaf in ("q_proj", "q_b_proj", "kv_b_proj"):
                module.register_forward_hook(lambda _, args, output: self.label(output, "mla_up"))

    def label(self, tensor: Tensor, choice: str) -> None:
        self._alive.append(tensor)
        self.labels[_key(tensor)] = choice

    def pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._weights:
            self.saved.setdefault(key, tensor)
            if self.region and key not in self._entered:
                self.labels[key] = self.region
        return tensor

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._alive.append(args[0])
        self._entered.add(_key(args[0]))
        self.region = "norms"

    def _leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.region = ""
        self.label(output, "norms")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attention saves what a fused kernel saves; a product with an activation is SwiGLU's."""
        if func is F.scaled_dot_product_attention:
            for tensor in args[:3]:
                self.label(tensor, "mla_up")
            return _Attention.apply(*args[:3])
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.mul, Tensor.__mul__, torch.mul) and any(
            isinstance(arg, Tensor) and self.labels.get(_key(arg)) == "swiglu" for arg in args
        ):
            self.label(result, "swiglu")
        return result


class _Attention(torch.autograd.Function):
    """Saves queries, keys, values, output and the float32 log-sum-exp, as FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Kernels want [b, L, heads, d]: the output is stored so, whatever view of it is given back.
        b, heads, length = query.shape[:3]
        output = query.new_empty(b, length, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("A traced layer has no backward pass.")


class _Keep(torch.autograd.Function):
    """New rows that come from tensors which are saved."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], source: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return source.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("A traced layer has no backward pass.")


class _Experts:
    """The routed experts on `num_rows` (token, expert) pairs: what experts.py, or transformers' grouped_mm, saves."""

    def __init__(self, module: Any, num_rows: int, implementation: str, travels: bool) -> None:
        self.width = int(module.gate_up_proj.shape[1]) // 2
        self.act_fn, self.num_rows = module.act_fn, num_rows
        self.implementation, self.travels = implementation, travels
        self.label: Callable[[Tensor, str], None]

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        pairs, size = index.numel(), hidden.shape[-1]
        if not self.travels:
            return self._compute(hidden, index, weights, pairs)
        arrived = _Keep.apply((self.num_rows, size), hidden, index)
        unit = weights.detach().new_empty(self.num_rows, 1)
        output = self._compute(arrived, index.new_empty(self.num_rows, 1), unit, self.num_rows)
        back = _Keep.apply((*index.shape, size), output)
        return (back * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    def _compute(self, hidden: Tensor, index: Tensor, weights: Tensor, pairs: int) -> Tensor:
        if self.implementation == "k2":
            gate_up = hidden.new_empty(pairs, 2 * self.width)
            return _Keep.apply(hidden.shape, hidden, hidden, weights, gate_up, index)
        rows = hidden[index.flatten() // index.shape[-1]]
        gate, up = _Keep.apply((pairs, 2 * self.width), rows, rows).chunk(2, dim=-1)
        product = self.act_fn(gate) * up
        down = _Keep.apply((pairs, hidden.shape[-1]), product, product)
        self.label(down, "moe_down")
        weighted = down * weights.reshape(-1, 1)
        return weighted.view(*index.shape, -1).sum(1).to(hidden.dtype)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
