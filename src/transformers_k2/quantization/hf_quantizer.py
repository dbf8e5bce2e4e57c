"""Routed experts that stay in INT4, or come to it, while transformers loads a model; and how they are saved.

Registered under a method name of our own (registration.py), to which loading.py routes a K2 configuration. transformers'
own quantizer for these checkpoints expands every expert and cannot save what it has loaded; its quantizers for linear
layers leave fused experts in float without a word. Here the experts are INT4, and another quantizer of transformers' can
have the linear layers.

Given up: saving a model whose linear layers are quantised too; no reader knows such files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import cpu_kernel
from .codecs import int4_pack
from .int4 import CONVENTIONS, GROUP_SIZE, dequantize, unpack
from .packed_experts import STACKS, PackedExperts

METHOD = "kimi_k2_int4"
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Int4Config(QuantizationConfigMixin):
    """Routed experts in INT4: `from_pretrained(..., quantization_config=Int4Config())` for bf16 and FP8 checkpoints.

    INT4 checkpoints need none. A model saved with it has the hub's form, and its quantization_config.

    Args:
        group_size: consecutive inputs that share a scale.
        convention: of quantization/int4.py, for weights that are not INT4 yet.
        linear: how transformers quantises the linear layers beside the experts, such as a `BitsAndBytesConfig`; None
            leaves them in the model's dtype.
        stored: the quantization_config of an INT4 checkpoint, which is saved again as it was.

    Raises:
        ValueError: an unknown convention, or a group size that is no positive integer.
    """

    def __init__(
        self,
        group_size: int = GROUP_SIZE,
        convention: str = "kimi",
        linear: QuantizationConfigMixin | None = None,
        stored: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        if type(group_size) is not int or group_size < 1:
            raise ValueError(
                f"INT4 group_size is {group_size!r}: expected a positive integer, such as {GROUP_SIZE}."
            )
        if convention not in CONVENTIONS:
            raise ValueError(f"INT4 convention is {convention!r}: expected one of {', '.join(CONVENTIONS)}.")
        self.group_size, self.convention = group_size, convention
        self.linear, self.stored = linear, stored

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of the saved model."""
        return copy.deepcopy(self.stored or int4_pack.hub_config(self.group_size))


class _Stacked(ConversionOps):
    """The hub's tensors of a stack were read into their places by lazy_weights.py; undone when they are saved."""

    def __init__(self, stack: str, suffix: str, shape_dtype: torch.dtype) -> None:
        self.stack, self.suffix, self.shape_dtype = stack, suffix, shape_dtype

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise AssertionError("the reader gives whole stacks")

    @property
    def reverse_op(self) -> ConversionOps:
        return _ByExpert(self.stack, self.suffix, self.shape_dtype)


class _ByExpert(ConversionOps):
    """A stack as the hub has it: views, one for each expert and projection, and the `weight_shape` beside the codes."""

    def __init__(self, stack: str, suffix: str, shape_dtype: torch.dtype) -> None:
        self.stack, self.suffix, self.shape_dtype = stack, suffix, shape_dtype

    def convert(self, input_dict: dict[str, Any], *args: Any, config: Any, **kwargs: Any) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        num_in = config.moe_intermediate_size if self.stack == "down_proj" else config.hidden_size
        found = {}
        for expert, matrices in enumerate(tensors[0]):
            for part, matrix in zip(_PARTS[self.stack], matrices.chunk(len(_PARTS[self.stack])), strict=True):
                name = f"mlp.experts.{expert}.{part}.weight"
                found[name + self.suffix] = matrix
                if self.suffix == "_packed":
                    found[f"{name}_shape"] = torch.tensor([len(matrix), num_in], dtype=self.shape_dtype)
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        return _Stacked(self.stack, self.suffix, self.shape_dtype)


class PackedQuantizer(HfQuantizer):
    """Swaps transformers' experts for packed ones before their weights are loaded; hands the rest to another quantizer."""

    quantization_config: Int4Config
    # The names of a stack's parts, for the parallel plans.
    serialized_names = {"": ["_packed", "_scale"]}  # noqa: RUF012 - as upstream has it

    def __init__(self, quantization_config: Int4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        linear = quantization_config.linear
        # The experts come packed from the files (lazy_weights.py); linear layers are quantised as they are loaded.
        self.linear: Any = (
            None if linear is None else AutoHfQuantizer.from_config(linear, pre_quantized=False)
        )
        self.pre_quantized = linear is None
        self.shape_dtype = torch.int32  # of weight_shape: the hub's, or that of the files that were loaded

    def is_serializable(self) -> bool:
        if self.linear is not None:
            raise ValueError(
                f"INT4 experts beside linear layers in {_name(self.quantization_config.linear)} have no published form: "
                "save the adapter alone, or load the checkpoint without quantising its linear layers and save that."
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # what is not quantised

    @property
    def is_compileable(self) -> bool:
        return self.linear is None or self.linear.is_compileable

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.linear is not None:
            self.linear.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self.linear is None else self.linear.update_device_map(device_map)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.linear is not None and self.linear.param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return self.linear.get_quantize_ops()

    def get_weight_conversions(self) -> list[Any]:
        return []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return weight_conversions

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        for name in [name for name in plan if name.endswith(tuple(f".experts.{stack}" for stack in STACKS))]:
            del plan[name]  # its parts have taken its place

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        swap_experts(model, self.quantization_config.group_size)
        if self.linear is not None:
            self.linear._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in packed_experts(model).values():
            # Our own kernel reads the hub's form. Other ranks, and what gathers from them, know no other.
            if not cpu_kernel.available() and not any(
                isinstance(value, DTensor) for value in module.parameters()
            ):
                module.use_kernel_form()
        model._weight_conversions = [
            WeightConverter(
                [f"mlp.experts.*.{part}.weight{suffix}" for part in parts],
                f"mlp.experts.{stack}{suffix}",
                [_Stacked(stack, suffix, self.shape_dtype)],
            )
            for stack, parts in _PARTS.items()
            for suffix in ("_packed", "_scale")
        ]
        if self.linear is not None:
            self.linear._process_model_after_weight_loading(model, **kwargs)
            for module in model.modules():
                if getattr(module, "support_avx512bf16_for_cpu", False):
                    # bitsandbytes repacks 4-bit layers at their first forward, and stops at sizes that do not fill blocks.
                    whole = module.out_features % 32 == 0 and module.in_features % 64 == 0
                    module.support_avx512bf16_for_cpu = whole
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if self.linear is not None:
            self.linear._dequantize(model, dtype=dtype)
        # transformers gives the configuration's, which is a name once the model was saved.
        return dequantize_experts(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)


def packed_experts(model: nn.Module) -> dict[str, PackedExperts]:
    """The packed experts in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def swap_experts(model: Any, group_size: int = GROUP_SIZE) -> None:
    """Put packed experts without values (on the meta device) where a model has transformers' own.

    Raises:
        ValueError: the groups do not divide an expert's inputs; the error names the module.
    """
    for name, experts in list(_stacked_experts(model)):
        num_experts, num_out, hidden_size = experts.gate_up_proj.shape
        try:
            with torch.device("meta"):
                packed = PackedExperts(num_experts, hidden_size, num_out // 2, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, packed)


@torch.no_grad()
def dequantize_experts(model: Any, dtype: torch.dtype) -> Any:
    """Put transformers' own experts, with the same weights in `dtype`, where a model has packed ones."""
    for name, packed in packed_experts(model).items():
        with torch.device("meta"):
            experts: Any = DeepseekV3Experts(model.config)
        stored = packed.state_dict()
        for stack, _, num_in in packed.shapes():
            codes, scale = stored[f"{stack}_packed"], stored[f"{stack}_scale"]
            weight = torch.empty(*codes.shape[:2], num_in, dtype=dtype, device=codes.device)
            for place, matrix, its_scale in zip(weight, codes, scale, strict=True):
                place.copy_(dequantize(unpack(matrix, num_in), its_scale, dtype))
            setattr(experts, stack, nn.Parameter(weight))
        model.set_submodule(name, experts.train(packed.training))
    model.__dict__.pop("_weight_conversions", None)
    return model


def _stacked_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, DeepseekV3Experts):
            yield name, module


def _name(config: Any) -> str:
    return str(getattr(config.quant_method, "value", config.quant_method))
