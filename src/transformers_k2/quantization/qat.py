"""Quantisation-aware training of routed experts: forward passes compute with the INT4 weights that will be stored.

The parameters stay what they are, under their names, in the dtype that the optimizer updates; each forward of an experts
module rounds them to the grid (int4.py) for its own duration, in training and in evaluation, and the gradient goes straight
through. It works with every experts implementation of transformers, with "k2", with FSDP2 and with expert parallelism,
because only what the module's own forward reads is exchanged.

Given up: memory. From a layer's forward to its backward the rounded experts exist beside the parameters; recomputation
(`full`) limits that to one layer. And LoRA on the same experts, whose sum with the rounded weight is on no grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .int4 import GROUP_SIZE, count_groups, fake_quantize

TARGETS = ("gate_up_proj", "down_proj")


def prepare_qat(
    model: nn.Module,
    group_size: int = GROUP_SIZE,
    targets: Sequence[str] = TARGETS,
    convention: str = "kimi",
) -> None:
    """Compute with INT4 experts from the next forward on, in place; once more changes the settings.

    Apply it after sharding. Parameters, their names and the state dict stay as they are.

    Args:
        model: any module with stacked experts [experts, out, in] inside.
        group_size: consecutive inputs that share a scale.
        targets: which of the stacks, of TARGETS.
        convention: see int4.py.

    Raises:
        ValueError: unknown targets or convention, no such experts, inputs that the groups do not divide or that are split
            over ranks.
    """
    if not targets or not set(targets) <= set(TARGETS):
        raise ValueError(f"targets are {list(targets)}: expected some of {', '.join(TARGETS)}.")
    fake_quantize(torch.zeros(1, group_size), group_size, convention)  # the settings, before anything changes
    found = list(_experts(model, targets))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no stacked experts ({', '.join(targets)}, [experts, out, in]): INT4 training has "
            "nothing to quantise."
        )
    for name, module in found:
        for target in targets:
            try:
                count_groups(module._parameters[target].shape[-1], group_size)  # type: ignore[union-attr]
            except ValueError as error:
                raise ValueError(f"{name}.{target}: {error}") from None
    remove_qat(model)
    for _, module in found:
        module.forward = _OnGrid(module, tuple(targets), group_size, convention)


def remove_qat(model: nn.Module) -> None:
    """Compute with the parameters themselves again. Nothing happens to a model that was not prepared."""
    for module, on_grid in _prepared(model):
        if on_grid.inner is None:
            del module.forward
        else:
            module.forward = on_grid.inner


def is_prepared(model: nn.Module) -> bool:
    """Whether some module of the model computes with INT4 experts."""
    return any(True for _ in _prepared(model))


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Put the parameters themselves on the grid. What forward passes compute stays the same.

    The masters are lost. Another `prepare_qat` finds parameters in float32 on the grid already, and those in bfloat16
    if they were trained in bfloat16.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else a gathered copy might be changed in their place
    for module, on_grid in _prepared(model):
        for name in on_grid.targets:
            parameter = module.get_parameter(name)
            parameter.copy_(on_grid.quantised(name))


class _OnGrid:
    """An experts module's forward, with its stacks exchanged for rounded ones while it runs."""

    def __init__(self, module: nn.Module, targets: tuple[str, ...], group_size: int, convention: str) -> None:
        self.module, self.targets = module, targets
        self.group_size, self.convention = group_size, convention
        # Expert parallelism has put a forward of its own on the module.
        self.inner = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        forward = self.inner or type(module).forward.__get__(module)
        parameters = {name: module._parameters[name] for name in self.targets if name in module._parameters}
        if len(parameters) < len(self.targets):
            raise ValueError(
                f"{type(module).__name__}: {', '.join(self.targets)} are trained for INT4 and adapted by LoRA: leave the "
                "routed experts out of one of them."
            )
        module._parameters.update({name: self.quantised(name) for name in parameters})  # type: ignore[dict-item]
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(parameters)

    def quantised(self, name: str) -> Tensor:
        parameter = self.module._parameters[name]
        assert parameter is not None
        if not isinstance(parameter, DTensor):
            return fake_quantize(parameter, self.group_size, self.convention)
        local = parameter.to_local()
        if local.shape[-1] != parameter.shape[-1]:
            raise ValueError(
                f"{name} {list(parameter.shape)} is split over ranks along its inputs ({parameter.placements}): expected "
                "whole groups on each, so shard experts or outputs."
            )
        return DTensor.from_local(
            fake_quantize(local, self.group_size, self.convention),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def _experts(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        stacks = [module._parameters.get(target) for target in targets]
        if all(stack is not None and stack.dim() == 3 for stack in stacks):
            yield name, module


def _prepared(model: nn.Module) -> Iterator[tuple[nn.Module, _OnGrid]]:
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, _OnGrid):
            yield module, forward
