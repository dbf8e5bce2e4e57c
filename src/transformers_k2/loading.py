"""`from_pretrained` for the Kimi K2 classes: look first, then load, then prove that nothing is missing.

Three steps around transformers' own loader. Before it, the files' headers are compared with the configuration, so that
a broken folder costs seconds and a one-line error, not an hour and a printed report. Then it is settled what becomes of
quantised weights (quantization_choice.py), and FP8 and INT4 files are read by lazy_weights.py. After it, the loader's own
report is read: a weight of the language model that was not in the checkpoint, or was and found no place, is an error.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.utils import cached_file, logging

from . import quantization_choice
from .checkpoint import Checkpoint, check_index
from .configuration_kimi_k2 import KimiK2Config
from .lazy_tensors import OpenFiles
from .lazy_weights import is_coded, lazy_weights, read_headers
from .preflight import compare
from .quantization.hf_quantizer import PackedQuantizer
from .quantization_choice import reading

logger = logging.get_logger(__name__)

# Heads that a task may add or leave behind.
_HEADS = re.compile(r"^(lm_head|score|classifier|qa_outputs)\.")
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_CONFIG_KWARGS = {field.name for field in fields(KimiK2Config)} - {"dtype"}
_CONFIG_KWARGS |= {
    "num_labels",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "rope_scaling",
}
_INDEX_NAME = "model.safetensors.index.json"


# One tensor per expert and projection, as the hub has them; the classes hold them stacked.
_EXPERT = re.compile(r"(.*mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class ShapeMismatchError(ValueError, RuntimeError):
    """A tensor has not the shape that the configuration asks for. transformers raises a RuntimeError then."""


def from_pretrained(
    cls: Any,
    upstream: Callable[..., Any],
    path: str | os.PathLike | None,
    *model_args: Any,
    strict: bool = True,
    config: PreTrainedConfig | str | os.PathLike | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load `cls` from `path` through `upstream`, transformers' own from_pretrained. See KimiK2PreTrainedModel."""
    if path is None or kwargs.get("gguf_file") is not None:  # weights given by hand, or another file format
        return upstream(path, *model_args, config=config, output_loading_info=output_loading_info, **kwargs)
    config = resolve_config(cls, path, config, kwargs)
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False asks for a pickle, which can run code; Kimi K2 loads safetensors only."
        )
    kwargs["use_safetensors"] = True
    _look_first(cls, Path(path), config, kwargs, strict)
    token = reading.set(quantization_choice.choose(config, kwargs))
    try:
        model, report = upstream(path, *model_args, config=config, output_loading_info=True, **kwargs)
    finally:
        reading.reset(token)
    if strict:
        _check_report(model, report, config, headless=_is_headless(config), path=path)
    _forget_conversions(model)
    return (model, report) if output_loading_info else model


def resolve_config(cls: Any, path: Any, config: Any, kwargs: dict[str, Any]) -> KimiK2Config:
    """A private KimiK2Config; takes from `kwargs` what belongs to the configuration."""
    if not isinstance(config, PreTrainedConfig):
        if config is None and _is_adapter(Path(path)):  # transformers then loads the base model that it names
            config = json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
        hub = {key: kwargs[key] for key in _HUB_KWARGS if key in kwargs}
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in _CONFIG_KWARGS}
        return cls.config_class.from_pretrained(config if config is not None else path, **hub, **own)
    return copy.deepcopy(text_config(config))  # routing a quantised checkpoint changes it


def text_config(config: PreTrainedConfig) -> KimiK2Config:
    """The language model's configuration: itself, the text half of K2.5's wrapper, or a relative's with the same keys."""
    text = config.get_text_config()
    if isinstance(text, KimiK2Config):
        return text
    values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        values["quantization_config"] = quantization
    return KimiK2Config.from_dict({**values, "name_or_path": config.name_or_path})


def _look_first(cls: Any, path: Path, config: KimiK2Config, kwargs: dict[str, Any], strict: bool) -> None:
    """Compare the files' headers with the configuration before anything is allocated."""
    folder = path / kwargs.get("subfolder", "")
    if not path.is_dir():  # a hub name: only the index can be looked at before the shards are fetched
        hub = {key: kwargs[key] for key in _HUB_KWARGS if key in kwargs}
        index = cached_file(str(path), _INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if index is not None:
            check_index(json.loads(Path(index).read_text(encoding="utf-8")), None, f"{path}/{_INDEX_NAME}")
        return
    if _is_adapter(folder) or is_sharded_checkpoint(folder) or kwargs.get("variant"):
        return  # the weights are elsewhere, or in a distributed training checkpoint: one file per rank
    checkpoint = Checkpoint.open(folder)
    if not strict or kwargs.get("key_mapping"):
        return
    found = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    problems = compare(config.to_hub_dict(), found)
    tolerated = kwargs.get("ignore_mismatched_sizes", False)
    for problem in problems:
        is_head = _HEADS.match(problem.name) is not None
        if problem.kind == "shape" and (tolerated or (is_head and not cls.__name__.endswith("ForCausalLM"))):
            continue
        needs_head = cls.__name__.endswith("ForCausalLM") and not _is_headless(config)
        if is_head and problem.kind != "shape" and not (problem.kind == "missing" and needs_head):
            continue
        others = sum(1 for other in problems if other.kind == problem.kind) - 1
        more = f" ({others} more like it; `k2 inspect {folder}` lists them)" if others else ""
        error = ShapeMismatchError if problem.kind == "shape" else ValueError
        raise error(f"{folder}: {problem.text}{more}.")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _is_headless(config: KimiK2Config) -> bool:
    """Whether the checkpoint says of itself that it holds the bare decoder, so that a missing head is a new one."""
    return any(name.endswith(("K2Model", "V3Model")) for name in config.architectures or [])


def load_weights(
    upstream: Callable[..., Any],
    model: Any,
    state_dict: Any,
    checkpoint_files: Any,
    load_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' `_load_pretrained_model`, with FP8 and INT4 weights read by lazy_weights.py.

    Args:
        upstream: that function; the others are its arguments.
    """
    how = reading.get()
    reading.set(None)  # an adapter that is loaded after its base comes by here too
    files = checkpoint_files or ()
    tensors = {}
    if how is not None and state_dict is None and all(str(file).endswith(".safetensors") for file in files):
        tensors = read_headers(files)
    if how is None or (how.packing is None and not is_coded(tensors)) or not tensors:
        return upstream(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
    if isinstance(quantizer := load_config.hf_quantizer, PackedQuantizer):
        if any(name.endswith(".weight_shape") and info.dtype == "I64" for name, info in tensors.items()):
            quantizer.shape_dtype = torch.int64  # as compressed-tensors' own library writes it
        others = [name for name in tensors if name.endswith(".weight_packed") and ".mlp.experts." not in name]
        if others:
            quantizer.quantization_config.stored = None  # which says that they are INT4
            logger.warning(
                f"{len(others)} INT4 weights that are no routed experts ({others[0]}, ...) are dequantised to "
                f"{load_config.dtype}."
            )
    with OpenFiles() as opened:
        weights = lazy_weights(tensors, opened, load_config.dtype, how.packing, how.block)
        # Without their files: weights that are offloaded to disk are written there as the model has them.
        return upstream(model, weights, None, load_config, *args, **kwargs)


def _check_report(model: Any, report: Any, config: KimiK2Config, headless: bool, path: Any) -> None:
    """Raise unless every weight of the language model came from the checkpoint and none of it is left over."""
    prefix = f"{model.base_model_prefix}."
    bare = not any(name == model.base_model_prefix for name, _ in model.named_children())
    missing = [key for key in report["missing_keys"] if bare or key.startswith(prefix)]
    if not headless:
        missing += [key for key in report["missing_keys"] if key == "lm_head.weight"]
    first_extra = config.num_hidden_layers
    extra_layers = range(first_extra, first_extra + (config.num_nextn_predict_layers or 0))
    extra = (
        re.compile(rf"^(model\.)?layers\.({'|'.join(map(str, extra_layers))})\.") if extra_layers else None
    )
    leftover = [
        key for key in report["unexpected_keys"] if not _HEADS.match(key) and not (extra and extra.match(key))
    ]
    for kind, keys in (("lacks", missing), ("has, and the model has no place for,", leftover)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"The checkpoint {path} {kind} {min(keys)}{more}; pass strict=False to load it all the same."
            )


def _forget_conversions(model: Any) -> None:
    """Save in the hub's layout whatever was loaded: drop the record of prefixes and codecs of the source.

    A model that stays quantised keeps it: there the record is what writes its scales back.
    """
    if getattr(model, "hf_quantizer", None) is None:
        model.__dict__.pop("_weight_conversions", None)  # a distributed training checkpoint leaves none


@torch.no_grad()
def stack_experts(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the hub's names, one tensor per expert and projection, under the names of the model's modules.

    Experts that are not there keep the model's values: a sharded checkpoint comes file by file.
    """
    stacked: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            stacked[name] = tensor
            continue
        prefix, expert, projection = match.groups()
        target = f"{prefix}.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
        if target not in stacked:
            stacked[target] = model.get_parameter(target).detach().clone()
        place = stacked[target][int(expert)]
        if projection != "down":
            place = place.chunk(2)[projection == "up"]
        place.copy_(tensor)
    return stacked
