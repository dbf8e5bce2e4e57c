"""The config.json of converted weights: what describes them now, in the spelling that the layout's readers know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..manifest import FP8
from ..quantization.codecs import int4_pack
from .opened import Model
from .plan import Target

_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# What the hub's K2 configs name, and engines know; transformers goes by model_type.
_ARCHITECTURES = {"KimiK2ForCausalLM": "DeepseekV3ForCausalLM"}
# What transformers' DeepSeek-V3 takes for granted and leaves out; llama.cpp takes softmax where nothing is said.
_ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_OF_THE_OLD_WEIGHTS = ("quantization_config", "quantization", "auto_map")


def target_config(model: Model, target: Target, group_size: int) -> dict[str, Any]:
    """config.json for a model in another layout.

    The quantization_config is that of the new weights, and code that is not there is not named. All but transformers' own
    layout get the hub's names of keys (rope_scaling, torch_dtype), which engines and converters read; in K2.5's layout the
    text part stands inside a wrapper, in the others alone.
    """
    wrapped = "text_config" in model.config
    text = dict(model.config["text_config"] if wrapped else model.config)
    for key in _OF_THE_OLD_WEIGHTS:
        text.pop(key, None)
    if wrapped:
        for key in ("dtype", "torch_dtype"):
            if model.config.get(key) and not (text.get("dtype") or text.get("torch_dtype")):
                text[key] = model.config[key]
    if target.layout.mtp is None or not model.text.get("num_nextn_predict_layers"):
        text |= {"num_nextn_predict_layers": 0} if text.get("num_nextn_predict_layers") else {}
    if target.layout.name != "transformers_fused":
        text = _ROUTING | hub_keys(text)
    dtype = _TORCH[target.dtype or ("BF16" if model.codec != "bf16" else target.base)]
    for key in ("torch_dtype", "dtype"):
        if text.get(key):
            text[key] = dtype
    quantization = _quantization(model, target, group_size)
    if target.codec == "affine":
        text |= {"quantization": quantization, "quantization_config": quantization}
    elif quantization is not None:
        text["quantization_config"] = quantization
    if target.layout.config != "k25":
        return text
    if not wrapped:
        return {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "text_config": text,
        }
    outer = {key: value for key, value in model.config.items() if key not in _OF_THE_OLD_WEIGHTS}
    for key in ("torch_dtype", "dtype"):
        if outer.get(key):
            outer[key] = dtype
    return outer | {"text_config": text}


def hub_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 5 saves it, with the names that the hub's files have."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "rope_parameters" and isinstance(value, dict):
            rope = dict(value)
            theta, kind = (
                rope.pop("rope_theta", None),
                rope.pop("rope_type", None) or rope.pop("type", "default"),
            )
            if theta is not None:
                result["rope_theta"] = theta
            result["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
        elif key == "dtype":
            result["torch_dtype"] = value
        elif key == "architectures" and isinstance(value, list):
            result[key] = [_ARCHITECTURES.get(name, name) for name in value]
        else:
            result[key] = value
    return result


def _quantization(model: Model, target: Target, group_size: int) -> dict[str, Any] | None:
    """What config.json says about the weights' form; None if they are plain."""
    published = model.text.get("quantization_config")
    if target.codec == "bf16":
        return None
    if target.codec == "fp8":
        return dict(published if model.codec == "fp8" and published else FP8)
    kept = target.keep and model.codec in ("int4", "affine")
    packed = set(target.coded) | (set(model.coded) if kept else set())
    size = model.group_size if kept else group_size
    if target.codec == "affine":
        return {"group_size": size, "bits": 4, "mode": "affine"}
    if kept and model.codec == "int4" and published and set(target.coded) <= set(model.coded):
        return dict(published)
    spec = int4_pack.hub_config(size)
    ignore = [pattern for pattern in spec["ignore"] if not _hits(pattern, packed)]
    left = {name for name in linear_modules(model) if name not in packed}
    ignore += sorted(name for name in left if not any(_hits(pattern, {name}) for pattern in ignore))
    return spec | {"ignore": ignore}


def linear_modules(model: Model) -> list[str]:
    """Modules with a matrix that may be quantised: no embedding, no router."""
    return [
        name.removesuffix(".weight")
        for name, shape in model.names.items()
        if name.endswith(".weight") and len(shape) == 2
        if not name.endswith((".embed_tokens.weight", ".mlp.gate.weight"))
    ]


def _hits(pattern: str, names: set[str]) -> bool:
    """compressed-tensors' rule for an entry of an ignore list."""
    if not pattern.startswith("re:"):
        return pattern in names
    return any(re.match(pattern[3:], name) for name in names)
