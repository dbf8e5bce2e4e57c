"""A dense model seen as a mixture of experts: its MLPs, whole or in slices, are the experts (see upcycle.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..lazy_tensors import DTYPES, Constant, LazyTensor, Narrow, Region
from ..manifest import base_dtype
from .opened import Model
from .surgery import IN_LAYER, OF_EXPERT, ROUTER, resized
from .weights import BIAS, Weight

SHARED = ("zero", "dense")
_SCALE = {"bf16": "weight", "fp8": "weight_scale_inv"}  # the part that scales a weight


def drawn(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 values that depend on these alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(*shape, generator=generator)


def from_dense(
    model: Model,
    num_experts: int,
    num_experts_per_tok: int | None,
    granularity: int,
    shared: str,
    first_dense: int,
    seed: int,
) -> Model:
    """A dense model as a mixture; the arguments are those of `upcycle`.

    Raises:
        ValueError: sizes that do not divide, a choice that does not exist, a source in INT4.
    """
    width, num = model.text["intermediate_size"], model.shape.num_layers
    chosen = 2 * granularity if num_experts_per_tok is None else num_experts_per_tok
    if type(granularity) is not int or granularity < 1 or width % granularity:
        raise ValueError(
            f"granularity is {granularity!r}: expected a divisor of the dense MLP's width {width} (intermediate_size)."
        )
    for name, value in (("num_experts", num_experts), ("num_experts_per_tok", chosen)):
        if type(value) is not int or value < 1 or value % granularity:
            raise ValueError(f"{name} is {value!r}: expected a multiple of granularity, {granularity}.")
    if chosen > num_experts:
        raise ValueError(
            f"num_experts_per_tok is {chosen}: expected no more than num_experts, {num_experts}."
        )
    if shared not in SHARED:
        raise ValueError(f"shared is {shared!r}: expected one of {', '.join(SHARED)}.")
    if type(first_dense) is not int or not 0 <= first_dense < num:
        raise ValueError(
            f"first_k_dense_replace is {first_dense!r}: expected 0 to {num - 1}, of {num} layers."
        )
    if model.codec not in _SCALE:
        raise ValueError(
            f"{model.folder} is {model.codec}: expected a dense model in bf16, fp32 or FP8 blocks."
        )
    changes = {
        "n_routed_experts": num_experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width // granularity,
        "n_shared_experts": 1 if shared == "zero" else granularity,
        "first_k_dense_replace": first_dense,
        "moe_layer_freq": 1,
        "routed_scaling_factor": float(granularity) if shared == "zero" else granularity / 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }
    make = _Experts(model, granularity, num_experts, shared, seed)
    return resized(model, changes, make.origin, make.read)


class _Experts:
    """The tensors of a mixture, from those of a dense model."""

    def __init__(self, model: Model, granularity: int, num_experts: int, shared: str, seed: int) -> None:
        self.model, self.granularity, self.num_experts = model, granularity, num_experts
        self.shared, self.seed = shared, seed
        self.width = model.text["intermediate_size"] // granularity

    def origin(self, name: str) -> str | None:
        if name.endswith((ROUTER, BIAS)):
            return None
        layer, expert, rest = _parsed(name)
        return name if expert is None else f"model.layers.{layer}.mlp.{rest}"

    def read(self, name: str) -> Weight:
        hidden = self.model.text["hidden_size"]
        if name.endswith(BIAS):
            return Weight(name, "bf16", {"weight": Constant(torch.zeros(self.num_experts))})
        if (there := self.origin(name)) is None:
            dtype = DTYPES[base_dtype(self.model.text)]
            deviation = self.model.text.get("initializer_range") or 0.02
            num_groups = self.num_experts // self.granularity
            rows = _Drawn(name, num_groups, self.granularity, hidden, deviation, dtype, self.seed)
            return Weight(name, "bf16", {"weight": rows})
        weight = replace(self.model.read(there), name=name)
        _, expert, rest = _parsed(name)
        if expert is None:
            return weight
        down = rest.startswith("down_proj")
        if expert < 0 and self.shared == "dense":
            return _scaled(weight, 0.5) if down else weight
        if expert < 0 and down:
            zeros = torch.zeros((), dtype=DTYPES[weight.dtype]).expand(hidden, self.width)
            return Weight(name, "bf16", {"weight": Constant(zeros)})
        start = max(expert, 0) % self.granularity * self.width
        return _narrowed(weight, 1 if down else 0, start, start + self.width)


def _parsed(name: str) -> tuple[int, int | None, str]:
    """The layer, the expert (-1: the shared one; None: of no expert) and the rest of a tensor's name."""
    if (match := IN_LAYER.fullmatch(name)) is None:
        return -1, None, name
    layer, rest = int(match[1]), match[2]
    if expert := OF_EXPERT.fullmatch(rest):
        return layer, int(expert[1]), expert[2]
    if rest.startswith("mlp.shared_experts."):
        return layer, -1, rest.removeprefix("mlp.shared_experts.")
    return layer, None, rest


def _narrowed(weight: Weight, dim: int, start: int, stop: int) -> Weight:
    """Rows (dim 0) or columns (dim 1) of a weight, with its bits."""
    whole = weight.values().shape
    if (start, stop) == (0, whole[dim]):
        return weight
    parts = {}
    for local, part in weight.parts.items():
        unit = weight.block[dim] if local == "weight_scale_inv" else 1
        if start % unit or (stop % unit and stop < whole[dim]):
            raise ValueError(
                f"{weight.name} would be {'columns' if dim else 'rows'} {start} to {stop - 1} of an FP8 weight: expected "
                f"multiples of {unit}, whole blocks; `k2 convert --to hub_bf16` decodes them."
            )
        parts[local] = Narrow(part, dim, start // unit, -(-stop // unit))
    return replace(weight, parts=parts)


def _scaled(weight: Weight, factor: float) -> Weight:
    """The weight times a power of two, exactly: of FP8 the scales."""
    local = _SCALE[weight.codec]
    return replace(weight, parts={**weight.parts, local: _Times(weight.parts[local], factor)})


class _Times(LazyTensor):
    """A tensor times a number."""

    def __init__(self, source: LazyTensor, factor: float) -> None:
        self.source, self.factor, self.shape, self.dtype = source, factor, source.shape, source.dtype

    def fill(self, place: Tensor, region: Region) -> None:
        self.source.fill(place, region)
        place.mul_(self.factor)


class _Drawn(LazyTensor):
    """A router that is drawn, each of its rows standing as often as a group has experts."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        times: int,
        hidden: int,
        deviation: float,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.name, self.num_rows, self.times, self.deviation, self.seed = (
            name,
            num_rows,
            times,
            deviation,
            seed,
        )
        self.shape, self.dtype = (num_rows * times, hidden), dtype

    def fill(self, place: Tensor, region: Region) -> None:
        rows = drawn(self.seed, self.name, (self.num_rows, self.shape[1])) * self.deviation
        place.copy_(rows.repeat_interleave(self.times, 0)[region])
