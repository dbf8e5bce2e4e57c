"""Gated experts on packed INT4 weights, with low-rank adapters beside them, as operations that torch.compile calls whole.

An expert's matrix W stays packed, and an adapter acts on what W is multiplied by: y = W x + scaling * B (A drop(x)). So
there is never a matrix W + B A, and what a layer keeps for its backward pass is the output of the gate and up
projections, the hidden states if an adapter's gradients need them, and the routing weights. Packed weights are
dequantised again band by band, and the products with A and B, a few columns wide, are computed again.

Dropout masks are drawn again too, expert by expert, from a seed which is drawn before the operation from torch's global
generator: a layer that is checkpointed gets the same one when it is computed again.

Products with W have the dtype of the hidden states (autocast's, if it is on). Those with A and B have that of the
parameters if it is wider, and float32 where the CPU has no bfloat16 instructions. Given up: double backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import expert_groups
from ..expert_groups import Groups
from . import cpu_kernel
from .codecs.int4_pack import PER_INT32
from .packed_linear import has_bfloat16_instructions, linear, linear_dequantized, linear_transposed, threshold

STACKS = ("gate_up_proj", "down_proj")
_AT_ONCE = 1 << 26  # inputs of a call to the CPU kernel, which takes a few bytes for each beside them


class Adapter(NamedTuple):
    """LoRA (arXiv 2106.09685) on one stack of matrices.

    Attributes:
        stack: of STACKS.
        a: [experts, rank, in], or [1, rank, in] if all experts share it.
        b: [experts, out, rank].
        scaling: of the product.
        dropout: share of the inputs of A that are zero, drawn for each pair of token and expert. 0 outside of training.
    """

    stack: str
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0


class Stack:
    """Products with the matrices [out, in] of a stack, for each expert by the way that is faster for its number of rows."""

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

    def products(self, groups: Groups, rows: Tensor) -> Tensor:
        """Each row times its expert's matrix: [pairs, in] -> [pairs, out]."""
        if rows.numel() <= _AT_ONCE and cpu_kernel.takes(rows, self.packed, self.scale):
            longest = max((end - start for _, start, end in groups.slices()), default=0)
            if longest < cpu_kernel.threshold(rows.dtype):
                return cpu_kernel.grouped_linear(rows, groups.ends, self.packed, self.scale)
        return groups.each(rows, self.num_out, self.product)

    def product(self, expert: int, rows: Tensor, out: Tensor) -> None:
        """out = rows @ W.T: [rows, in] -> [rows, out]."""
        packed, scale = self.packed[expert], self.scale[expert]
        if cpu_kernel.takes(rows, packed, scale) and len(rows) < cpu_kernel.threshold(rows.dtype):
            cpu_kernel.linear(rows, packed, scale, out)
        elif packed.dtype == torch.uint8 and len(rows) < threshold(rows.dtype):
            out.copy_(linear(rows, packed, scale))
        else:
            linear_dequantized(rows, packed, scale, out)

    def transposed_product(self, expert: int, rows: Tensor, out: Tensor) -> None:
        """out = rows @ W: [rows, out] -> [rows, in]."""
        linear_transposed(rows, self.packed[expert], self.scale[expert], out)


def packed_experts(
    hidden: Tensor,
    weights: Tensor,
    index: Tensor,
    gate_up: Stack,
    down: Stack,
    adapters: Sequence[Adapter] = (),
) -> Tensor:
    """What the chosen experts make of each token, weighted and summed.

    Args:
        hidden: [tokens, hidden].
        weights: [tokens, k].
        index: [tokens, k], int64; ids that are not below the number of experts are skipped.
        gate_up, down: the experts' matrices [2 * intermediate, hidden] and [hidden, intermediate].
        adapters: on them, any number on each.

    Returns:
        [tokens, hidden] in the dtype of `hidden`.

    Raises:
        ValueError: an adapter's stack is unknown, or its shapes do not fit.
    """
    for adapter in adapters:
        _check(adapter, gate_up, down)
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    seed = None
    if any(adapter.dropout > 0 for adapter in adapters):
        seed = torch.randint(1 << 62, (), device="cpu")  # read by the host
    output, _ = torch.ops.transformers_k2.packed_experts(
        hidden,
        weights,
        index,
        gate_up.packed,
        gate_up.scale,
        down.packed,
        down.scale,
        [adapter.a for adapter in adapters],
        [adapter.b for adapter in adapters],
        [STACKS.index(adapter.stack) for adapter in adapters],
        [float(adapter.scaling) for adapter in adapters],
        [float(adapter.dropout) for adapter in adapters],
        seed,
        dtype,
        autocast,
    )
    return output


def _check(adapter: Adapter, gate_up: Stack, down: Stack) -> None:
    if adapter.stack not in STACKS:
        raise ValueError(f"LoRA stack is {adapter.stack!r}: expected one of {', '.join(STACKS)}.")
    stack = gate_up if adapter.stack == STACKS[0] else down
    num_experts, rank = stack.packed.shape[0], adapter.b.shape[-1]
    if adapter.b.shape != (num_experts, stack.num_out, rank):
        raise ValueError(
            f"LoRA B of {adapter.stack} is {list(adapter.b.shape)}: expected [{num_experts}, {stack.num_out}, rank]."
        )
    # Inputs that fill up the last int32 are in the packed size, and not in that of A.
    num_in = adapter.a.shape[-1]
    if (
        adapter.a.shape != (adapter.a.shape[0], rank, num_in)
        or adapter.a.shape[0] not in (1, num_experts)
        or not stack.num_in - PER_INT32 < num_in <= stack.num_in
    ):
        raise ValueError(
            f"LoRA A of {adapter.stack} is {list(adapter.a.shape)}: expected [{num_experts}, {rank}, {stack.num_in}], or "
            f"[1, {rank}, {stack.num_in}] for all experts."
        )


class _Factors:
    """One adapter in one pass over the experts, in their order."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dropout: float, seed: int, dtype: torch.dtype):
        self.a, self.b, self.scaling, self.dropout, self.seed = a, b, scaling, dropout, seed
        self.dtype = dtype
        self.generator = torch.Generator(a.device)

    def begin(self) -> None:
        """Masks are those of the first pass again."""
        self.generator.manual_seed(self.seed)

    def add(self, expert: int, rows: Tensor, out: Tensor) -> None:
        """out += scaling * drop(rows) @ A.T @ B.T."""
        a, b = self._of(expert)
        _add_product(out, (self._masked(rows.to(self.dtype)) @ a.T).mul_(self.scaling), b.T)

    def add_transposed(self, expert: int, grads: Tensor, out: Tensor) -> None:
        """out += scaling * drop(grads @ B @ A): the gradient of the rows."""
        a, b = self._of(expert)
        narrow = (grads.to(self.dtype) @ b).mul_(self.scaling)
        if self.dropout == 0:
            _add_product(out, narrow, a)
        else:
            out.add_(self._masked(narrow @ a))

    def add_gradients(self, expert: int, grads: Tensor, rows: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
        """Those of A and B of one expert, into the stacks of all; a shared A has their sum."""
        a, b = self._of(expert)
        grads, rows = grads.to(self.dtype), self._masked(rows.to(self.dtype))
        grad_a[0 if len(grad_a) == 1 else expert].addmm_((grads @ b).mul_(self.scaling).T, rows)
        grad_b[expert].addmm_(grads.T, (rows @ a.T).mul_(self.scaling))

    def _of(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.a[0 if len(self.a) == 1 else expert].to(self.dtype), self.b[expert].to(self.dtype)

    def _masked(self, values: Tensor) -> Tensor:
        if self.dropout == 0:
            return values
        kept = torch.empty_like(values).bernoulli_(1 - self.dropout, generator=self.generator)
        return kept.mul_(values).div_(max(1 - self.dropout, torch.finfo(values.dtype).tiny))


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)  # summed in the wider dtype, rounded once


class _Adapted:
    """A stack and its adapters, as `expert_groups` wants it."""

    def __init__(self, stack: Stack, adapters: list[_Factors]) -> None:
        self.stack, self.adapters = stack, adapters

    def product(self, groups: Groups, rows: Tensor) -> Tensor:
        output = self.stack.products(groups, rows)
        self._begin()
        for expert, start, end in groups.slices() if self.adapters else ():
            for adapter in self.adapters:
                adapter.add(expert, rows[start:end], output[start:end])
        return output

    def transposed_product(self, groups: Groups, grads: Tensor) -> Tensor:
        def product(expert: int, rows: Tensor, out: Tensor) -> None:
            self.stack.transposed_product(expert, rows, out)
            for adapter in self.adapters:
                adapter.add_transposed(expert, rows, out)

        self._begin()
        return groups.each(grads, self.stack.num_in, product)

    def gradients(self, groups: Groups, grads: Tensor, rows: Tensor) -> list[Tensor]:
        """Of A and B of the first adapter, of the second, ..., in the dtype of the products with them."""
        found = [
            torch.zeros(factor.shape, dtype=adapter.dtype, device=factor.device)
            for adapter in self.adapters
            for factor in (adapter.a, adapter.b)
        ]
        self._begin()
        for expert, start, end in groups.slices():
            for number, adapter in enumerate(self.adapters):
                place = slice(2 * number, 2 * number + 2)
                adapter.add_gradients(expert, grads[start:end], rows[start:end], *found[place])
        return found

    def _begin(self) -> None:
        for adapter in self.adapters:
            adapter.begin()


def _adapted(
    stacks: tuple[Stack, Stack],
    a: list[Tensor],
    b: list[Tensor],
    numbers: list[int],
    scalings: list[float],
    dropouts: list[float],
    seed: Tensor | None,
    dtype: torch.dtype,
    autocast: bool,
    num_pairs: int,
) -> tuple[_Adapted, _Adapted]:
    adapters: tuple[list[_Factors], list[_Factors]] = [], []
    first = 0 if seed is None else int(seed)
    for place, (number, one_a, one_b) in enumerate(zip(numbers, a, b, strict=True)):
        wide = dtype
        if not autocast:
            wide = torch.promote_types(dtype, torch.promote_types(one_a.dtype, one_b.dtype))
        if wide.itemsize < 4 and one_a.device.type == "cpu" and not has_bfloat16_instructions():
            wide = torch.float32
        if num_pairs >= len(one_b):
            # PEFT stores B with the expert running fastest. To put it right at once is cheaper than expert by expert,
            # unless only a few experts have tokens.
            one_b = one_b.to(wide).contiguous()
        factors = _Factors(one_a, one_b, scalings[place], dropouts[place], first + place, wide)
        adapters[number].append(factors)
    return _Adapted(stacks[0], adapters[0]), _Adapted(stacks[1], adapters[1])


@torch.library.custom_op(
    "transformers_k2::packed_experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weights, Tensor index, Tensor gate_up_packed, Tensor gate_up_scale, "
    "Tensor down_packed, Tensor down_scale, Tensor[] a, Tensor[] b, int[] stacks, float[] scalings, float[] dropouts, "
    "Tensor? seed, ScalarType dtype, bool autocast) -> (Tensor, Tensor)",
)
def _forward(
    hidden: Tensor,
    weights: Tensor,
    index: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    stacks: list[int],
    scalings: list[float],
    dropouts: list[float],
    seed: Tensor | None,
    dtype: torch.dtype,
    autocast: bool,
) -> tuple[Tensor, Tensor]:
    """The output, [tokens, hidden], and that of the gate and up projections, [pairs, 2 * intermediate] in `dtype`."""
    pair = Stack(gate_up_packed, gate_up_scale), Stack(down_packed, down_scale)
    matrices = _adapted(pair, a, b, stacks, scalings, dropouts, seed, dtype, autocast, index.numel())
    with torch.autocast(hidden.device.type, enabled=False):
        groups = Groups(index, len(gate_up_packed), hidden.device, dtype, slices=True)
        output, gate_up_out = expert_groups.forward(groups, hidden.to(dtype), weights, *matrices)
        return output.to(hidden.dtype), gate_up_out


@_forward.register_fake
def _(hidden: Tensor, weights: Tensor, index: Tensor, gate_up_packed: Tensor, *others: Any) -> Any:
    dtype = others[-2]
    pairs = index.shape[0] * index.shape[1]
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return output, hidden.new_empty(pairs, gate_up_packed.shape[1], dtype=dtype)


@torch.library.custom_op(
    "transformers_k2::packed_experts_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? hidden, Tensor weights, Tensor index, Tensor gate_up_out, Tensor gate_up_packed, "
    "Tensor gate_up_scale, Tensor down_packed, Tensor down_scale, Tensor[] a, Tensor[] b, int[] stacks, "
    "float[] scalings, float[] dropouts, Tensor? seed, bool autocast, bool needs_hidden, bool needs_weights, "
    "bool[] needs) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    hidden: Tensor | None,
    weights: Tensor,
    index: Tensor,
    gate_up_out: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    stacks: list[int],
    scalings: list[float],
    dropouts: list[float],
    seed: Tensor | None,
    autocast: bool,
    needs_hidden: bool,
    needs_weights: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden states and routing weights, if needed, and of A and B of each adapter on a stack in need.

    Args:
        needs: for each stack of STACKS.
    """
    pair = Stack(gate_up_packed, gate_up_scale), Stack(down_packed, down_scale)
    dtype = gate_up_out.dtype
    gate_up, down = _adapted(pair, a, b, stacks, scalings, dropouts, seed, dtype, autocast, index.numel())
    with torch.autocast(grad.device.type, enabled=False):
        groups = Groups(index, len(gate_up_packed), grad.device, dtype, slices=True)
        grad_hidden, grad_weights, *found = expert_groups.backward(
            groups, grad, hidden, weights, gate_up_out, gate_up, down, needs_hidden, needs_weights, *needs
        )
        grads = [value for value in (grad_hidden, grad_weights) if value is not None]
        queues = [iter(values) for values in found]
        for place, number in enumerate(stacks):
            if needs[number]:
                grads += [next(queues[number]).to(factor[place].dtype) for factor in (a, b)]
        return grads


@_backward.register_fake
def _(grad: Tensor, hidden: Tensor | None, weights: Tensor, *others: Any) -> list[Tensor]:
    a, b, stacks = others[6:9]
    needs_hidden, needs_weights, needs = others[-3:]
    likes = [grad] * needs_hidden + [weights] * needs_weights
    likes += [factor[place] for place, number in enumerate(stacks) if needs[number] for factor in (a, b)]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weights, index, *packed = inputs[:7]
    a, b, ctx.stacks, ctx.scalings, ctx.dropouts, seed, _, ctx.autocast = inputs[7:]
    trained = [a.requires_grad or b.requires_grad for a, b in zip(a, b, strict=True)]
    ctx.needs = [
        any(place == number and is_trained for place, is_trained in zip(ctx.stacks, trained, strict=True))
        for number in range(len(STACKS))
    ]
    ctx.num_adapters = len(a)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden if ctx.needs[0] else None, weights, index, output[1], *packed, *a, *b, seed)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    count = ctx.num_adapters
    fixed, a, b = tensors[:8], tensors[8 : 8 + count], tensors[8 + count :]
    needs_hidden, needs_weights = ctx.needs_input_grad[:2]
    lists = ctx.stacks, ctx.scalings, ctx.dropouts
    grads = iter(
        torch.ops.transformers_k2.packed_experts_backward(
            grad, *fixed, a, b, *lists, seed, ctx.autocast, needs_hidden, needs_weights, ctx.needs
        )
    )
    grad_hidden = next(grads) if needs_hidden else None
    grad_weights = next(grads) if needs_weights else None
    of_factors = [(next(grads), next(grads)) if ctx.needs[number] else (None, None) for number in ctx.stacks]
    grad_a, grad_b = ([pair[side] for pair in of_factors] for side in (0, 1))
    # In the structure of the inputs: a list of no tensors is one.
    nothing = [None if values else [] for values in lists]
    return grad_hidden, grad_weights, *[None] * 5, grad_a, grad_b, *nothing, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
