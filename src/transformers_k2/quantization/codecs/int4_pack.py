"""INT4 weights in compressed-tensors' `pack-quantized` form: K2-Thinking's and K2.5's routed experts.

`weight_packed` int32 [out, ceil(in/8)], `weight_scale` bf16 [out, in/group], `weight_shape` int [2]. Codes -8..7 are stored
offset-binary (code + 8), eight per int32, the first in the low nibble; w = code * scale. Oracle: compressed_tensors'
`pack_to_int32` and `unpack_from_int32`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

NAMES = ("weight_packed", "weight_scale", "weight_shape")
PER_INT32 = 8
# Every linear layer that is no routed expert, as K2-Thinking's config.json has it.
_IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")
_BAND = 1 << 19  # weights decoded at a time: 3 MB with the intermediate copies


def unpack(packed: Int[Tensor, "out packed_in"], in_features: int) -> Int8[Tensor, "out in"]:
    """The codes -8..7 as int8 [out, in_features]; `packed` is int32 [out, ceil(in_features/8)]."""
    pairs = (
        packed.contiguous().view(torch.uint8).to(torch.int16)
    )  # one byte holds two codes, the first in its low half
    spread = (
        pairs.bitwise_left_shift(4).bitwise_or_(pairs).bitwise_and_(0x0F0F)
    )  # ... and now each has its own byte
    return spread.view(torch.int8).sub_(8)[:, :in_features]


def decode(
    packed: Int[Tensor, "out packed_in"],
    scale: Float[Tensor, "out groups"],
    dtype: torch.dtype,
    shape: Int[Tensor, 2] | None = None,
    out: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """The weight in `dtype` [out, in], code * scale in float32 and rounded once: for bf16, its own multiply; into `out`.

    Raises:
        ValueError: `shape` does not fit `packed`, or the groups do not divide the input width.
    """
    rows, packed_cols = packed.shape
    out_features, in_features = (rows, packed_cols * PER_INT32) if shape is None else (int(n) for n in shape)
    if out_features != rows or -(-in_features // PER_INT32) != packed_cols:
        raise ValueError(
            f"INT4 weight_shape [{out_features}, {in_features}] does not fit weight_packed [{rows}, {packed_cols}]: "
            f"expected [{out_features}, {-(-in_features // PER_INT32)}]."
        )
    groups = scale.shape[1]
    if scale.shape[0] != rows or in_features % groups:
        raise ValueError(
            f"INT4 weight_scale {list(scale.shape)} does not divide a [{out_features}, {in_features}] weight into groups."
        )
    if out is None:
        out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    num_rows = max(32, _BAND // in_features)
    for start in range(0, rows, num_rows):  # a band of rows at a time: the intermediate copies stay in cache
        band = slice(start, start + num_rows)
        # float32 holds the product of a code and a bf16 scale exactly, and is converted to faster than bf16.
        codes = unpack(packed[band], in_features).to(torch.float32).unflatten(1, (groups, -1))
        scales, place = scale[band].to(torch.float32).unsqueeze(-1), out[band].unflatten(1, (groups, -1))
        if dtype is torch.float32:
            torch.mul(codes, scales, out=place)
        else:
            place.copy_(codes.mul_(scales))
    return out


def hub_config(group_size: int = 32) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose routed experts alone are INT4: K2-Thinking's, but for the group size."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": list(_IGNORE),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def layout(out_features: int, in_features: int, group_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Local name -> (dtype as safetensors spells it, shape) of the tensors that store a weight, as on the hub.

    Raises:
        ValueError: groups or int32 words do not fill the inputs.
    """
    if group_size < 1 or in_features % group_size or in_features % PER_INT32:
        raise ValueError(
            f"INT4 group_size is {group_size}, but rows have {in_features} weights: expected a multiple of the group size "
            f"and of {PER_INT32}."
        )
    groups = in_features // group_size
    shapes = ((out_features, in_features // PER_INT32), (out_features, groups), (2,))
    return dict(zip(NAMES, zip(("I32", "BF16", "I32"), shapes, strict=True), strict=True))
