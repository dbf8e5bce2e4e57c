"""Dequantise published FP8 and INT4 checkpoints while transformers loads them.

Registered under a method name of our own (registration.py), to which loading.py routes a K2 configuration. transformers'
own quantizers cannot do it: the FP8 one rejects or misreads partial blocks, both leave a model that cannot be saved.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .codecs import fp8_block, int4_pack

METHOD = "kimi_k2_checkpoint"


class CheckpointConfig(QuantizationConfigMixin):
    """The checkpoint on disk is quantised; the model in memory will not be.

    Args:
        block: rows and columns of an FP8 block.
    """

    def __init__(self, block: tuple[int, int] = (128, 128), **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.block: tuple[int, int] = (block[0], block[1])
        self.dequantize = True  # tells transformers that no trace of the method stays on the loaded model


class Dequantize(ConversionOps):
    """Decode the stored tensors of each weight; runs before the model's own merge of experts."""

    def __init__(self, hf_quantizer: CheckpointQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def _decode(self, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """`stored` maps local names ("weight", "weight_scale_inv", ...) to the tensors of one weight."""
        if "weight_packed" in stored:
            shape = stored.get("weight_shape")
            return int4_pack.decode(stored["weight_packed"], stored["weight_scale"], dtype, shape)
        if "weight_scale_inv" in stored:
            block = self.hf_quantizer.quantization_config.block
            return fp8_block.decode(stored["weight"], stored["weight_scale_inv"], dtype, block)
        if not (weight := stored["weight"]).dtype.itemsize > 1:
            raise ValueError(f"A {weight.dtype} weight has no scale beside it; the checkpoint is incomplete.")
        return weight.to(dtype)

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> dict[str, Any]:
        dtype = model.get_parameter(full_layer_name).dtype
        columns: dict[
            str, dict[str, list[torch.Tensor]]
        ] = {}  # weight pattern -> local name -> one tensor per expert
        for pattern, tensors in input_dict.items():
            prefix, _, local = pattern.rpartition(".")
            column = columns.setdefault(f"{prefix}.weight" if prefix else full_layer_name, {})
            column[local] = tensors if isinstance(tensors, list) else [tensors]
        decoded: dict[str, Any] = {}
        for name, column in columns.items():
            count = len(next(iter(column.values())))
            if any(len(tensors) != count for tensors in column.values()):
                counts = ", ".join(f"{len(tensors)} {local}" for local, tensors in column.items())
                raise ValueError(f"{full_layer_name}: {name} has {counts}; expected as many of each.")
            weights = None
            for index in range(count):
                # Popped, not indexed: each packed tensor is freed as soon as it is decoded.
                weight = self._decode({local: tensors.pop(0) for local, tensors in column.items()}, dtype)
                if name == full_layer_name:  # a single matrix, no merge follows
                    weights = weight
                    continue
                if weights is None:  # the merge takes a stacked tensor as it is: no second copy
                    weights = torch.empty(count, *weight.shape, dtype=dtype, device=weight.device)
                weights[index] = weight
            decoded[name] = weights
        return decoded

    @property
    def reverse_op(self) -> ConversionOps:
        raise ValueError("Dequantize is not undone on save: loading.py drops it from the model.")


class CheckpointQuantizer(HfQuantizer):
    """Load-time only: the model comes out dense, trainable, saveable and without a quantization_config."""

    quantization_config: CheckpointConfig
    # Every name that a stored weight can have: which of them a weight has tells its format.
    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": list(dict.fromkeys((*fp8_block.NAMES, *int4_pack.NAMES)))
    }

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Dequantize}
