"""What becomes of a checkpoint's quantised weights: what the files say, what the caller asks, and what can run here.

| files | asked | in memory |
|---|---|---|
| INT4 | nothing, or INT4 | routed experts in INT4, the rest in `dtype` |
| bf16, FP8 | INT4 (`Int4Config`, or the hub's quantization_config) | the same, quantised while it is loaded |
| any | a quantiser of linear layers (bitsandbytes, quanto) | routed experts in INT4, linear layers by that quantiser |
| FP8, INT4 | `dequantize=True` | everything in `dtype` |
| FP8 | nothing | FP8 where transformers' kernels run, else everything in `dtype` |

Everything else is transformers' business, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_kimi_k2 import KimiK2Config
from .lazy_weights import Packing
from .manifest import Quantization, quantization_of
from .quantization.hf_quantizer import METHOD, Int4Config

# They see nn.Linear, and would leave fused experts in float without a word.
LINEAR_QUANTIZERS = ("bitsandbytes", "quanto")


class Reading(NamedTuple):
    """How lazy_weights.py reads the files.

    Attributes:
        packing: keeps or brings routed experts in INT4; None multiplies everything out.
        block: rows and columns of an FP8 block.
    """

    packing: Packing | None
    block: tuple[int, int]


# For the one step of transformers' from_pretrained that reads files and takes no such argument.
reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


def choose(config: KimiK2Config, kwargs: dict[str, Any]) -> Reading | None:
    """How the files are read; None leaves them to transformers. `config` and `kwargs` then say the rest.

    Args:
        config: of the checkpoint; its quantization_config is replaced.
        kwargs: of `from_pretrained`; `dequantize` is taken out, `quantization_config` and `dtype` are settled.

    Raises:
        ValueError: INT4 that is not K2's, a checkpoint that is asked to be quantised in yet another way, or a layout that
            would cut groups.
    """
    stored = _stored(config)
    method = None if stored is None else _method(stored["quant_method"])
    asked = kwargs.get("quantization_config")
    asked: Any = AutoQuantizationConfig.from_dict(asked) if isinstance(asked, dict) else asked
    wanted = None if asked is None else _method(asked.quant_method)
    dequantize = kwargs.pop("dequantize", False)
    dequantize |= getattr(asked, "dequantize", False) or getattr(asked, "run_compressed", None) is False
    if _is_upstreams(stored, method, wanted, dequantize):
        return None
    source = quantization_of({"quantization_config": stored})
    if stored is not None and wanted not in (None, method, METHOD, "compressed-tensors", *LINEAR_QUANTIZERS):
        raise ValueError(
            f"The checkpoint is quantised with {method!r}, but quantization_config asks for {wanted!r}: expected none, "
            f"{method!r}, Int4Config, or one of {', '.join(LINEAR_QUANTIZERS)} for the linear layers; to quantise it anew, "
            "load it with dequantize=True and save it (that writes bf16)."
        )
    linear = asked if wanted in LINEAR_QUANTIZERS else getattr(asked, "linear", None)
    experts = None if dequantize else _experts(asked, wanted, source, stored)
    kwargs.pop("quantization_config", None)
    if stored is not None:
        del config.quantization_config
    is_auto = kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto") and config.dtype is None
    if is_auto and (stored is not None or experts is not None):
        kwargs["dtype"] = torch.bfloat16  # transformers would read float8 or int32 from the first tensor
    if experts is None:
        if linear is not None:
            kwargs["quantization_config"] = linear
        return Reading(None, source.block)
    packing = Packing(experts.group_size, experts.convention)
    _check_split(config, packing, kwargs)
    if linear is None:  # as of a checkpoint that is quantised already, whatever its files hold
        config.quantization_config = {"quant_method": METHOD, **packing._asdict(), "stored": experts.stored}
    else:
        experts.linear = linear
        kwargs["quantization_config"] = experts
    return Reading(packing, source.block)


def _is_upstreams(stored: Any, method: str | None, wanted: str | None, dequantize: bool) -> bool:
    if stored is None:
        return wanted not in (None, METHOD, "compressed-tensors", *LINEAR_QUANTIZERS)
    if method == "fp8":
        if len(stored.get("weight_block_size") or ()) != 2:
            return True
        return wanted in (None, "fp8") and not dequantize and _fp8_kernels_run()
    return method != "compressed-tensors"


def _experts(asked: Any, wanted: str | None, source: Quantization, stored: Any) -> Int4Config | None:
    """What routed experts become; None if they stay float."""
    if source.method == "int4":
        if wanted == METHOD and asked.group_size != source.group:
            raise ValueError(
                f"The checkpoint's INT4 groups are {source.group} weights, but quantization_config asks for "
                f"{asked.group_size}: expected {source.group}; load it with dequantize=True and save it to quantise it anew."
            )
        return Int4Config(source.group, stored=stored)
    if wanted == METHOD:
        return asked
    if wanted == "compressed-tensors":  # the hub's words for Int4Config
        return Int4Config(quantization_of({"quantization_config": asked.to_dict()}).group)
    return Int4Config() if wanted in LINEAR_QUANTIZERS else None


def _stored(config: KimiK2Config) -> dict[str, Any] | None:
    """The quantization_config of the checkpoint; an empty one is taken away."""
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, QuantizationConfigMixin):
        stored = stored.to_dict()
    if stored is not None and not stored:
        del config.quantization_config
    return stored or None


def _method(name: Any) -> str:
    return str(getattr(name, "value", name))


def _check_split(config: KimiK2Config, packing: Packing, kwargs: Mapping[str, Any]) -> None:
    """Raises: ValueError: tensor parallelism would cut an expert inside a group."""
    layout = kwargs.get("distributed_config")
    tp_size, ep_size = (getattr(layout, name, None) or 1 for name in ("tp_size", "ep_size"))
    num_groups = config.moe_intermediate_size // packing.group_size
    if tp_size > 1 and ep_size == 1 and num_groups % tp_size:
        raise ValueError(
            f"Experts of width {config.moe_intermediate_size} have {num_groups} INT4 groups of {packing.group_size}, which "
            f"tp_size {tp_size} does not divide: expected a divisor of {num_groups}, or ep_size {tp_size} beside it, which "
            "keeps experts whole."
        )


def _fp8_kernels_run() -> bool:
    """Where transformers' finegrained-FP8 quantizer would not fall back to dequantising (read, not tried here)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 9)
    return torch.xpu.is_available()
