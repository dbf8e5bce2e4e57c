"""LoRA on routed experts that stay INT4, through PEFT's API and in PEFT's files.

PEFT adapts fused experts by wrapping a parameter and adding B A to all of it in each forward. `PackedExperts` has no such
parameter, and needs none: here the same two wrappers, nested in the same order, hand their factors down to the experts,
where they act on activations (quantization/packed_ops.py). Names, shapes and configuration are PEFT's own for
`target_parameters` on the bf16 model, so an adapter moves between both, in either direction.

`lora_dropout` works here, but PEFT refuses it on fused parameters even to load an adapter. What is written is therefore
`lora_dropout: 0`, and what was trained with stands in `auto_mapping`, a mapping that PEFT keeps and, where a task type is
given, does not read: training that is resumed on packed experts has its dropout back, as has a shared A.

PEFT finds parameters by name in `LoraModel._inject_parameters` and asks `LoraModel._check_merge_allowed` before it merges;
`prepare` wraps both, and other models pass through them. Given up: what PEFT has for modules alone (DoRA and its kin,
biases, batches with mixed adapters), and merging into INT4, which would round: each is an error. Import this file only
where PEFT is wanted: it imports PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora import ParamWrapper as _ParamWrapper
from torch import Tensor, nn

from .quantization.packed_experts import PackedExperts
from .quantization.packed_ops import STACKS, Adapter

KEY = "transformers_k2"  # in a saved configuration's auto_mapping


@dataclass
class PackedLoraConfig(LoraConfig):
    """A `LoraConfig` for models with packed experts. A plain one becomes one when it is applied to such a model.

    Args:
        shared_a: one A for all experts of a layer and projection. The adapter is saved with a copy for each expert, which
            is PEFT's form, and loads so into models whose experts are not packed. Into packed ones `PeftModel` loads it;
            transformers' own `load_adapter` finds other shapes, and raises.
    """

    shared_a: bool = field(
        default=False, metadata={"help": "One A for all experts of a layer and projection."}
    )

    def to_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` says: a plain `LoraConfig` that PEFT loads, and beside it what it would refuse."""
        values = super().to_dict()
        refused = {"shared_a": values.pop("shared_a")}
        if self.target_parameters:
            refused["lora_dropout"], values["lora_dropout"] = values["lora_dropout"], 0.0
        if refused := {name: value for name, value in refused.items() if value}:
            values["auto_mapping"] = (values["auto_mapping"] or {}) | {KEY: refused}
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, which replaces `auto_mapping` where there is no task type."""
        mapping = kwargs.get("auto_mapping_dict")
        if mapping is not None:
            kwargs["auto_mapping_dict"] = (self.to_dict()["auto_mapping"] or {}) | mapping
        super().save_pretrained(save_directory, **kwargs)


def trained_with(config: LoraConfig) -> dict[str, Any]:
    """Options of a configuration that only packed experts have, also those that a saved one keeps in `auto_mapping`."""
    saved = (config.auto_mapping or {}).get(KEY, {})
    return saved | ({"shared_a": True} if isinstance(config, PackedLoraConfig) and config.shared_a else {})


def prepare(config: LoraConfig, model: nn.Module) -> None:
    """Make PEFT adapt the packed experts of `model` when it next applies `config`. Idempotent."""
    if type(config) is LoraConfig:
        config.__class__ = PackedLoraConfig  # the caller's object, as PEFT changes it too
    if not isinstance(config, PackedLoraConfig):
        raise ValueError(
            f"LoRA on packed INT4 experts is configured by a {type(config).__name__}: expected a LoraConfig or a "
            "PackedLoraConfig."
        )
    for name, value in trained_with(config).items():
        setattr(config, name, value)
    if config.auto_mapping is not None:
        rest = {key: value for key, value in config.auto_mapping.items() if key != KEY}
        config.auto_mapping = rest or None
    config._register_custom_module({PackedExperts: ParamWrapper})
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.restore_scales()
    if LoraModel._inject_parameters is not _inject_parameters:
        LoraModel._inject_parameters = _inject_parameters
        LoraModel._check_merge_allowed = _check_merge_allowed


# PEFT tells its wrappers for parameters by the name of their class.
class ParamWrapper(_ParamWrapper):
    """LoRA on one stack of packed matrices, of which it hands its active factors to the module that it wraps."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: Any, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config.lora_dropout)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config.lora_dropout)
        if config.shared_a:
            stacked: Any = self.lora_A[adapter_name].weight
            self.lora_A[adapter_name] = _SharedFactor(stacked, self.num_experts)

    def _set_dropout(self, adapter_name: str, share: float) -> None:
        self.lora_dropout[adapter_name] = nn.Dropout(share) if share else nn.Identity()

    def get_param(self) -> Tensor:
        """The shape of the parameter that the packed matrices stand for, on the meta device."""
        experts: Any = self.get_base_layer()
        return experts.unpacked(self.parameter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Like every adapter on integers, this one is as it was made, in float32."""
        experts: Any = self.get_base_layer()
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and not factors[adapter_name].weight.is_meta:
                factors[adapter_name].to(device or experts.gate_up_proj_packed.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        names = (
            [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        )
        return self.base_layer(x, *args, *map(self._adapter, names), **kwargs)

    def _adapter(self, name: str) -> Adapter:
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        dropout = self.lora_dropout[name]
        return Adapter(
            self.parameter_name,
            a.view(-1, self.r[name], self.in_features),
            b.view(self.out_features, self.r[name], self.num_experts).permute(2, 0, 1),
            self.scaling[name],
            dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        raise _cannot_merge()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise _cannot_merge()


class _SharedFactor(nn.Linear):
    """One A, [rank, in], for all experts: [experts * rank, in] in state dicts, as PEFT has it."""

    def __init__(self, stacked: nn.Parameter, num_experts: int) -> None:
        rows, columns = len(stacked) // num_experts, stacked.shape[1]
        super().__init__(columns, rows, bias=False, device="meta")
        values = stacked.detach()[:rows].clone()
        self.weight = nn.Parameter(values, requires_grad=stacked.requires_grad)
        self.num_experts = num_experts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight if keep_vars else self.weight.detach()
        destination[f"{prefix}weight"] = weight.repeat(self.num_experts, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            first, *others = state_dict[name].chunk(self.num_experts)
            if any(not torch.equal(first, other) for other in others):
                raise ValueError(
                    f"LoRA shared_a is True, but in {name} the experts' A differ: expected {self.num_experts} equal ones, "
                    "or a configuration without shared_a."
                )
            state_dict = state_dict | {name: first.clone()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_dropout(config: Any) -> Any:
    """PEFT's wrapper refuses dropout: it has no input of its own. This one has."""
    plain = copy.copy(config)
    plain.lora_dropout = 0.0
    return plain


def _cannot_merge() -> ValueError:
    return ValueError(
        "LoRA on packed INT4 experts cannot be merged in memory, because the sum is not on the INT4 grid: load the base "
        "with dequantize=True and the adapter on it, then merge, or keep the adapter beside the model."
    )


@contextmanager
def _unpacked_names(model: nn.Module) -> Iterator[None]:
    """While PEFT looks for parameters by name, packed experts have those that they stand for."""
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    for module in experts:
        for name in STACKS:
            module.register_parameter(name, nn.Parameter(module.unpacked(name), requires_grad=False))
    try:
        yield
    finally:
        for module in experts:
            for name in STACKS:
                del module._parameters[name]


_upstream_inject_parameters = LoraModel._inject_parameters
_upstream_check_merge_allowed = LoraModel._check_merge_allowed


def _inject_parameters(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    with _unpacked_names(model):
        return _upstream_inject_parameters(self, peft_config, model, *args, **kwargs)


def _check_merge_allowed(self: Any) -> None:
    """Before the first layer is merged, not between two."""
    if any(isinstance(module, ParamWrapper) for module in self.model.modules()):
        raise _cannot_merge()
    _upstream_check_merge_allowed(self)
