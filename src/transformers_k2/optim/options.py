"""Whether options and parameters make sense to MuonClip, told before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .groups import ALGORITHMS
from .newton_schulz import SCHEDULES

DTYPES = ("auto", "bfloat16", "float16", "float32")
ITERATIONS = ("auto", "standard", "gram")
STATE_DTYPES = ("bfloat16", "float32")


def check_options(group: Mapping[str, Any]) -> None:
    """Whether a group's options make sense.

    Raises:
        ValueError: the first that does not, with its value and the choices.
    """
    choices = {
        "algorithm": ALGORITHMS,
        "ns_schedule": tuple(SCHEDULES),
        "ns_dtype": DTYPES,
        "ns_iteration": ITERATIONS,
        "state_dtype": STATE_DTYPES,
        "nesterov": (True, False),
        "master_weights": (True, False),
    }
    for key, allowed in choices.items():
        if group[key] not in allowed:
            raise ValueError(f"{key} is {group[key]!r}: expected one of {', '.join(map(str, allowed))}.")
    ranges: dict[str, tuple[float, float]] = {
        "lr": (0, math.inf),
        "weight_decay": (0, math.inf),
        "momentum": (0, 1),
        "ns_eps": (1e-30, 1),
        "update_rms": (0, math.inf),
        "eps": (0, math.inf),
    }
    for key, (low, high) in ranges.items():
        value = float(group[key]) if isinstance(group[key], Tensor) else group[key]
        if not is_number(value) or not low <= value < high:
            raise ValueError(f"{key} is {group[key]!r}: expected a number >= {low:g} and < {high:g}.")
    if not isinstance(group["ns_steps"], int) or isinstance(group["ns_steps"], bool) or group["ns_steps"] < 1:
        raise ValueError(f"ns_steps is {group['ns_steps']!r}: expected an integer >= 1.")
    betas = group["betas"]
    if len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas!r}: expected two numbers >= 0 and < 1.")


def check_parameter(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Whether a parameter can be updated as its group says.

    Raises:
        ValueError: its dtype, its shape or the group's row blocks do not fit.
    """
    shape = list(param.shape)
    if not param.is_floating_point():
        raise ValueError(f"{name} {shape} is {param.dtype}: expected floating point.")
    if group["algorithm"] == "adamw":
        return
    if param.ndim not in (2, 3):
        hint = " FSDP1 flattens parameters: use FSDP2." if param.ndim == 1 else ""
        raise ValueError(
            f"{name} {shape} is in a muon group: expected a matrix or a stack of matrices; put it into a group with "
            f"algorithm 'adamw', or let MuonClip.for_model make the groups.{hint}"
        )
    blocks = group["row_blocks"]
    if blocks is not None and (min(blocks, default=0) < 1 or shape[-2] % sum(blocks)):
        raise ValueError(
            f"{name} {shape}: row_blocks {blocks} must be sizes >= 1 whose sum divides the {shape[-2]} rows."
        )


def is_number(value: Any) -> bool:
    """An int or float, but no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
