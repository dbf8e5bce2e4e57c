"""What a row of a layout's table does to tensors, both ways: the hub's beside each other, above each other, or by heads.

`forward` makes the layout's tensors from the hub's, `backward` one of the hub's from the layout's. Neither reads a byte:
they return trees of lazy_tensors.py. Parts of quantised weights go the same way as weights, because putting rows together
moves no number within a row; what does (`op`) has no quantised form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..lazy_tensors import Cat, Entry, LazyTensor, Narrow, Stack, Transposed
from .layout import Group


class Heads(NamedTuple):
    """Rows of kv_b_proj: `num` times `nope` rows of keys and `value` rows of values."""

    num: int
    nope: int
    value: int

    @classmethod
    def of(cls, text: Mapping[str, Any]) -> Heads:
        """Of the text part of a config.json."""
        return cls(text["num_attention_heads"], text["qk_nope_head_dim"], text["v_head_dim"])


def forward(group: Group, members: Sequence[LazyTensor], heads: Heads) -> list[LazyTensor]:
    """The layout's tensors, in the order of `group.here`, from those of the hub, in the order of `group.members`."""
    row, num = group.row, len(group.row.hub)
    if row.op == "split_heads":
        (weight,) = members
        each = heads.nope + heads.value
        starts = [head * each for head in range(heads.num)]
        keys = [Transposed(Narrow(weight, 0, start, start + heads.nope)) for start in starts]
        values = [Narrow(weight, 0, start + heads.nope, start + each) for start in starts]
        return [Stack(group.here[0], keys), Stack(group.here[1], values)]
    if not row.stacked:
        return [members[0] if num == 1 else Cat(members)]
    experts = [members[first : first + num] for first in range(0, len(members), num)]
    return [Stack(group.here[0], [parts[0] if num == 1 else Cat(parts) for parts in experts])]


def backward(group: Group, here: Sequence[LazyTensor], member: int, heads: Heads) -> LazyTensor:
    """Number `member` of the hub's tensors, from the layout's in the order of `group.here`."""
    row, num = group.row, len(group.row.hub)
    if row.op == "split_heads":
        keys, values = here
        return Cat(
            [
                part
                for head in range(heads.num)
                for part in (Transposed(Entry(keys, head)), Entry(values, head))
            ]
        )
    tensor = Entry(here[0], member // num) if row.stacked else here[0]
    if num == 1:
        return tensor
    # Tensors above each other are of one kind (gate and up), so each has as many rows.
    rows = tensor.shape[0] // num
    return Narrow(tensor, 0, member % num * rows, (member % num + 1) * rows)
