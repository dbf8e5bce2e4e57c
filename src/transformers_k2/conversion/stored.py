"""The weights in a checkpoint, whichever form each is stored in, readable by bands of rows.

Form follows from the tensors that are there (`weight_packed`: INT4, `weight_scale_inv`: FP8, a stack of experts:
transformers' fused form), not from config.json, so a stale quantization_config misleads nobody. What comes out equals what
the model's loader computes from the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, TensorInfo, file_inside, read_json
from ..manifest import WRAPPER_PREFIX, quantization_of, split_config
from ..preflight import compare
from ..quantization.codecs import fp8_block, int4_pack
from .stream import Source

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
}
_FLOATS = ("BF16", "F16", "F32", "F64")
_BAND = 1 << 21  # weights in a band: 4 MB of bfloat16, and a few times that in copies
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
# Fused parameter -> the projections in it, in the order in which transformers concatenates them.
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# What stands beside weights and is safe to copy: no code, no pickles.
_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_SIDE_NAMES = ("LICENSE", "NOTICE")


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in] of a linear module.

    Attributes:
        name: the hub's, as in the file: with K2.5's prefix, ending in `.weight`.
        form: "plain", "fp8", "int4" or "fused" (rows of a stack of experts).
        parts: local name -> tensor; "weight" alone for plain and fused.
        block: rows and columns of an FP8 scale.
        first_row: of the stack, if fused.
    """

    name: str
    shape: tuple[int, int]
    form: str
    parts: Mapping[str, TensorInfo]
    block: tuple[int, int] = (128, 128)
    first_row: int = 0

    @property
    def module(self) -> str:
        """The module's name without K2.5's prefix: `model.layers.1.mlp.experts.0.up_proj`."""
        return self.name.removeprefix(WRAPPER_PREFIX).removesuffix(".weight")

    @property
    def dtype(self) -> str:
        """Of `rows`, as safetensors spells it: what quantised forms are decoded to is bfloat16, as in K2's releases."""
        return self.parts["weight"].dtype if self.form in ("plain", "fused") else "BF16"

    @property
    def band_rows(self) -> int:
        num_rows = max(1, _BAND // self.shape[1])
        return -(-num_rows // self.block[0]) * self.block[0] if self.form == "fp8" else num_rows

    def rows(self, source: Source, start: int, stop: int) -> Tensor:
        """Rows start to stop in `dtype`; FP8 bands start at a block."""
        if self.form == "fp8":
            weight = _rows(source, self.parts["weight"], start, stop)
            scale = _rows(
                source, self.parts["weight_scale_inv"], start // self.block[0], -(-stop // self.block[0])
            )
            return fp8_block.decode(weight, scale, torch.bfloat16, self.block)
        if self.form == "int4":
            packed, scale = (
                _rows(source, self.parts[part], start, stop) for part in ("weight_packed", "weight_scale")
            )
            shape = torch.tensor([stop - start, self.shape[1]])
            return int4_pack.decode(packed, scale, torch.bfloat16, shape)
        return _rows(source, self.parts["weight"], self.first_row + start, self.first_row + stop)


def open_model(path: str | Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint folder whose tensors are those of its config.json, and that config.

    Raises:
        ValueError: no such folder, a broken file, or tensors that are missing or have another shape.
    """
    path = Path(path)
    checkpoint = Checkpoint.open(path)
    if not path.is_dir():
        raise ValueError(f"{path} is a file: expected a checkpoint folder with a config.json.")
    if not (path / "config.json").exists():
        raise ValueError(f"{path} has no config.json: expected that of the model beside its weights.")
    config = read_json(file_inside(path, "config.json"))
    text, _ = split_config(config)
    stored = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    problems = [problem for problem in compare(text, stored) if problem.kind != "left over"]
    if problems:
        more = f" ({len(problems) - 1} more; `k2 inspect {path}` lists them)" if problems[1:] else ""
        raise ValueError(f"{path}: {problems[0].text}{more}.")
    return checkpoint, config


def weights_of(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> tuple[dict[str, Weight], list[TensorInfo]]:
    """The matrices of a checkpoint by name, in the order of its files, and the tensors that are no matrix."""
    tensors = checkpoint.tensors
    spec = split_config(config)[0].get("quantization_config") or {}
    block = (
        quantization_of({"quantization_config": spec}).block
        if spec.get("quant_method") == "fp8"
        else (128, 128)
    )
    weights: dict[str, Weight] = {}
    others = []
    for name, info in tensors.items():
        stem = name.rpartition("_")[0]
        if name.endswith("weight_scale_inv") and name.removesuffix("_scale_inv") in tensors:
            continue
        if name.endswith(("weight_scale", "weight_shape")) and f"{stem}_packed" in tensors:
            continue
        if name.endswith("weight_packed"):
            parts = {local: tensors[f"{stem[:-6]}{local}"] for local in int4_pack.NAMES[:2]}
            if f"{stem}_shape" in tensors:
                parts["weight_shape"] = tensors[f"{stem}_shape"]
            weights[stem] = Weight(stem, (info.shape[0], _in_features(parts)), "int4", parts)
        elif f"{name}_scale_inv" in tensors:
            parts = {"weight": info, "weight_scale_inv": tensors[f"{name}_scale_inv"]}
            weights[name] = Weight(name, _pair(info.shape), "fp8", parts, block)
        elif (match := _FUSED.fullmatch(name)) and len(info.shape) == 3 and info.dtype in _FLOATS:
            projections = PROJECTIONS[match[2]]
            num_experts, num_rows, in_features = info.shape
            shape = (num_rows // len(projections), in_features)
            for expert in range(num_experts):
                for index, projection in enumerate(projections):
                    key = f"{match[1]}.{expert}.{projection}.weight"
                    first = expert * num_rows + index * shape[0]
                    weights[key] = Weight(key, shape, "fused", {"weight": info}, first_row=first)
        elif name.endswith(".weight") and len(info.shape) == 2 and info.dtype in _FLOATS:
            weights[name] = Weight(name, _pair(info.shape), "plain", {"weight": info})
        else:
            others.append(info)
    return weights, others


def side_files(folder: Path) -> dict[str, Path]:
    """Tokenizer, templates, generation config, licence: what to copy along; neither code nor pickles nor links away."""
    return {
        path.name: file_inside(folder, path.name)
        for path in sorted(folder.iterdir())
        if (path.suffix in _SIDE_SUFFIXES or (path.name.startswith(_SIDE_NAMES) and not path.suffix))
        and path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith((".index.json",))
        and path.name not in ("config.json", "adapter_config.json")
    }


def new_config(
    config: Mapping[str, Any], quantization: Mapping[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """The config.json of converted weights: `quantization` in place of the old one, and no code that is not there.

    K2.5's belongs into its `text_config`; Moonshot's `auto_map` names Python files, which are not copied.
    """
    result = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    inner = result
    if "text_config" in result:
        inner = result["text_config"] = {
            key: value
            for key, value in result["text_config"].items()
            if key not in ("quantization_config", "auto_map")
        }
    if quantization is not None:
        inner["quantization_config"] = dict(quantization)
    for level in (result, inner):
        for key in ("torch_dtype", "dtype"):
            if level.get(key):
                level[key] = dtype
    return result


def _rows(source: Source, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows of a tensor seen as a matrix of its last dimension."""
    columns = info.shape[-1]
    row_bytes = columns * DTYPES[info.dtype].itemsize
    data = source.read(info, start * row_bytes, stop * row_bytes)
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(stop - start, columns)


def _in_features(parts: Mapping[str, TensorInfo]) -> int:
    """Inputs of a packed weight; its rows are whole words in every checkpoint of this family."""
    return parts["weight_packed"].shape[1] * int4_pack.PER_INT32


def _pair(shape: Iterable[int]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns
