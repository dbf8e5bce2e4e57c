"""Quantisation-aware training: forward passes compute with the INT4 weights that will be stored.

The parameters stay what they are, under their names, in the dtype that the optimizer updates; each forward of a chosen
module rounds them to the grid (int4.py) for its own duration, in training and in evaluation, and the gradient goes straight
through. It works with every experts implementation of transformers, with "k2", with FSDP2, with expert parallelism and
compiled, because only what the module's own forward reads is exchanged.

What is rounded is the weight in the dtype in which the forward reads it, once: to a code and a bfloat16 scale, whose product
is the weight in that dtype.
  bfloat16 weights (with float32 masters in the optimizer, too)   the bfloat16 weight
  float32 weights, also under autocast                            the float32 weight; autocast rounds the dequantised one,
                                                                  as it would a file's (transformers' grouped_mm does not)
  float32 shards that FSDP2 gathers as bfloat16                   the weight after its cast to bfloat16
`settings` says which, and what is exported (training/export.py) is quantised from the same values: the file dequantises to
what training computed with.

Given up: memory. From a module's forward to its backward the rounded weights exist beside the parameters; recomputation
(`full`) limits that to one layer. And LoRA on the same weights, whose sum with the rounded weight is on no grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .int4 import GROUP_SIZE, count_groups, fake_quantize
from .targets import ROUTED_EXPERTS, find_targets


class Int4Weight(NamedTuple):
    """How a weight is rounded: `dtype` is that in which the forward reads it."""

    group_size: int
    convention: str
    dtype: torch.dtype


@dataclass(frozen=True)
class QATSchedule:
    """When training computes on the grid, and when the weights on it stay: a function of the step, so there is no state.

    Warm-up is a switch, not a blend: at 4 bits rounding costs a trained model so little that there is nothing to
    approach slowly; the delay is for runs whose first steps are rough for another reason (torchtune has it as
    `fake_quant_after_n_steps`). Freezing keeps whole weights, because codes at a rounding threshold otherwise flip until
    the last step (arXiv 2203.08940); what is not quantised settles on the weights that will be stored.

    Args:
        warmup: this many first steps compute without rounding.
        freeze: in this many last steps the optimizer leaves quantised weights alone. QK-Clip does not.
    """

    warmup: int = 0
    freeze: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.freeze < 0:
            raise ValueError(f"QAT warmup is {self.warmup}, freeze {self.freeze}: expected steps, 0 or more.")

    def rounds(self, step: int) -> bool:
        """Whether `step`, from 0, computes on the grid."""
        return step >= self.warmup

    def freezes(self, step: int, num_steps: int) -> bool:
        """Whether `step`, from 0, of `num_steps` leaves the quantised weights as they are."""
        return step >= num_steps - self.freeze


def prepare_qat(
    model: nn.Module,
    group_size: int = GROUP_SIZE,
    targets: Sequence[str] = ROUTED_EXPERTS,
    convention: str = "kimi",
    ignore: Sequence[str] = (),
) -> None:
    """Compute with INT4 weights from the next forward on, in place; once more changes the settings.

    Apply it after sharding. Parameters, their names and the state dict stay as they are.

    Args:
        model: any module with linear layers, or stacked experts [experts, out, in], inside.
        group_size: consecutive inputs that share a scale.
        targets, ignore: which, as in compressed-tensors' configurations; see targets.py. Default: all routed experts, as
            in the published checkpoints, so no router, embedding or head.
        convention: see int4.py.

    Raises:
        ValueError: a target without a match, an unknown convention, inputs that the groups do not divide or that are
            split over ranks.
    """
    if isinstance(targets, str) or isinstance(ignore, str):
        raise ValueError(f"INT4 targets are {targets!r}, ignore is {ignore!r}: expected lists of patterns.")
    fake_quantize(torch.zeros(1, group_size), group_size, convention)  # the settings, before anything changes
    modules: dict[nn.Module, list[str]] = {}
    for target in find_targets(model, targets, ignore):
        weight = target.module._parameters[target.parameter]
        assert weight is not None
        try:
            count_groups(weight.shape[-1], group_size)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        last = weight.dim() - 1
        if isinstance(weight, DTensor) and any(place.is_shard(last) for place in weight.placements):
            raise ValueError(
                f"{target.name} {list(weight.shape)} is split over ranks along its inputs ({weight.placements}): expected "
                "whole groups on each, so shard experts or outputs."
            )
        modules.setdefault(target.module, []).append(target.parameter)
    remove_qat(model)
    for module, names in modules.items():
        module.forward = _OnGrid(module, tuple(names), group_size, convention)


def remove_qat(model: nn.Module) -> None:
    """Compute with the parameters themselves again. Nothing happens to a model that was not prepared."""
    for _, module, on_grid in _prepared(model):
        if on_grid.inner is None:
            del module.forward
        else:
            module.forward = on_grid.inner


def is_prepared(model: nn.Module) -> bool:
    """Whether some module of the model computes with INT4 weights."""
    return any(True for _ in _prepared(model))


def set_rounding(model: nn.Module, on: bool) -> None:
    """Switch the rounding of a prepared model off, and on again."""
    for _, _, on_grid in _prepared(model):
        on_grid.rounds = on


def settings(model: nn.Module) -> dict[str, Int4Weight]:
    """The prepared weights by their names in the model, and how each is rounded; those of this rank's modules.

    The shards of a model that FSDP2 has gathered go back to their places.
    """
    gathered: dict[int, torch.dtype] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else the parameters are copies, in the dtype of the computation
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if group.mp_policy.param_dtype is not None:
                    gathered |= {
                        id(item.sharded_param): group.mp_policy.param_dtype for item in group.fsdp_params
                    }
    found: dict[str, Int4Weight] = {}
    for path, module, on_grid in _prepared(model):
        for name in on_grid.names:
            parameter = module.get_parameter(name)
            dtype = gathered.get(id(parameter), parameter.dtype)
            found[f"{path}.{name}" if path else name] = Int4Weight(
                on_grid.group_size, on_grid.convention, dtype
            )
    return found


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Put the parameters themselves on the grid. What forward passes compute stays the same.

    The masters are lost. Another `prepare_qat` finds parameters in float32 on the grid already, and those in bfloat16
    if they were trained in bfloat16.
    """
    for name, how in settings(model).items():
        parameter = model.get_parameter(name)
        parameter.copy_(_rounded(parameter.to(how.dtype), how.group_size, how.convention))


class _OnGrid:
    """A module's forward, with its weights exchanged for rounded ones while it runs."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], group_size: int, convention: str) -> None:
        self.module, self.names = module, names
        self.group_size, self.convention = group_size, convention
        self.rounds = True
        # Expert parallelism has put a forward of its own on the module.
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        forward = self.inner or type(module).forward.__get__(module)
        if not self.rounds:
            return forward(*args, **kwargs)
        parameters = {name: module._parameters[name] for name in self.names if name in module._parameters}
        if len(parameters) < len(self.names):
            raise ValueError(
                f"{type(module).__name__}: {', '.join(self.names)} are trained for INT4 and adapted by LoRA: leave them out "
                "of one of both."
            )
        for name, parameter in parameters.items():
            assert parameter is not None
            module._parameters[name] = _rounded(parameter, self.group_size, self.convention)  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(parameters)


def _rounded(weight: Tensor, group_size: int, convention: str) -> Tensor:
    if not isinstance(weight, DTensor):
        return fake_quantize(weight, group_size, convention)
    return DTensor.from_local(
        fake_quantize(weight.to_local(), group_size, convention),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _prepared(model: nn.Module) -> Iterator[tuple[str, nn.Module, _OnGrid]]:
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, _OnGrid):
            yield path, module, forward
