"""From bf16, fp32 or FP8 weights to the hub's INT4 form (K2-Thinking's, K2.5's), streamed; and back onto a grid they left.

What is packed is chosen by module name, routed experts unless told otherwise. The rest is bfloat16 as in those
releases, copied byte for byte where it is that already. FP8 is decoded to bfloat16 first and quantised from there: that is
what the model's loader computes, so a checkpoint quantised here equals the loaded model quantised by `int4.quantize`. It
costs one rounding of 2^-9 before one of 1/14. Weights in float32 are quantised from float32, and the others of such a
checkpoint rounded once; the router's bias stays float32.

`recover` rounds nothing: weights that were dequantised from INT4 find the codes and scales they came from.

Given up: calibration. Every group is rounded by itself, as Kimi's own checkpoints are.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..manifest import base_dtype, expected_tensors, split_config
from ..quantization import int4
from ..quantization.codecs import int4_pack
from .staging import check_destination
from .stored import DTYPES, Weight, new_config, open_model, side_files, weights_of
from .stream import (
    SHARD_BYTES,
    Source,
    Spec,
    Summary,
    Task,
    copy,
    plan_summary,
    write_checkpoint,
)

EXPERTS = (r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj",)
_BIAS = ".e_score_correction_bias"


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    group_size: int = int4.GROUP_SIZE,
    convention: str = "kimi",
    modules: Sequence[str] = EXPERTS,
    recover: bool = False,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write `src` to `dst` with the chosen modules in INT4, and everything that stands beside the weights.

    Args:
        src: a hub checkpoint in bf16, fp32 or FP8 blocks, with or without K2.5's prefix or transformers' fused experts.
        group_size: inputs that share a scale.
        convention: of `int4.CONVENTIONS`; readers need not know it.
        modules: regular expressions for whole module names, as `model.layers.1.mlp.experts.0.up_proj`.
        recover: take weights that lie on a grid back to its codes and scales, and refuse others.
        dry_run: plan and check only.

    Returns:
        Tensors, bytes and shards written, or to be written.

    Raises:
        ValueError: weights that are INT4 already, a group size that does not fit, patterns that match nothing, weights
            that are not finite (or, with `recover`, on no grid), an unusable destination; the message names the tensor.
    """
    src, dst = Path(src), Path(dst)
    if convention not in int4.CONVENTIONS:
        raise ValueError(f"convention is {convention!r}: expected one of {', '.join(int4.CONVENTIONS)}.")
    if recover and convention != "kimi":
        raise ValueError(
            f"convention is {convention!r}, but recover finds the grid itself: expected 'kimi' with recover."
        )
    check_destination(src, dst, overwrite)
    checkpoint, config = open_model(src)
    with Source(checkpoint) as source:
        tasks, packed = _plan(source, config, group_size, convention, list(modules), recover)
        if dry_run:
            return plan_summary(tasks, shard_bytes)
        quantization = _quantization_config(config, packed, group_size)
        text = json.dumps(new_config(config, quantization, "bfloat16"), indent=2) + "\n"
        options = {
            "command": "quantize",
            "group_size": group_size,
            "convention": convention,
            "modules": list(modules),
            "recover": recover,
        }
        return write_checkpoint(
            tasks,
            source,
            dst,
            options=options,
            files={**side_files(src), "config.json": text.encode()},
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            quiet=quiet,
        )


def packed_task(
    weight: Weight, read: Callable[[int, int], Tensor], group_size: int, encode: Callable[..., Any]
) -> Task:
    """The task that packs a weight.

    Args:
        read: (start, stop) -> those rows.
        encode: rows, group size -> codes and scales, as `int4.quantize`.
    """
    stem = weight.name.removesuffix("weight")
    layout = int4_pack.layout(*weight.shape, group_size)
    outputs = tuple(Spec(stem + local, dtype, shape) for local, (dtype, shape) in layout.items())

    def convert(start: int, stop: int) -> Sequence[Tensor]:
        try:
            codes, scale = encode(read(start, stop), group_size)
        except ValueError as error:
            raise ValueError(f"{weight.name}, rows {start} to {stop - 1}: {error}") from None
        return int4.pack(codes), scale

    shape = struct.pack("<2i", *weight.shape)
    return Task(
        outputs,
        convert=convert,
        num_rows=weight.shape[0],
        band_rows=weight.band_rows,
        fixed={f"{stem}weight_shape": shape},
    )


def dense_task(weight: Weight, read: Callable[[int, int], Tensor], dtype: str) -> Task:
    """The task that writes a weight's rows as a plain matrix of `dtype`, proven to be finite."""

    def convert(start: int, stop: int) -> Sequence[Tensor]:
        rows = read(start, stop).to(DTYPES[dtype])
        if not rows.isfinite().all():
            raise ValueError(
                f"{weight.name}, rows {start} to {stop - 1}: expected weights that are finite in {dtype}."
            )
        return (rows,)

    return Task(
        (Spec(weight.name, dtype, weight.shape),),
        convert=convert,
        num_rows=weight.shape[0],
        band_rows=weight.band_rows,
    )


def reader(source: Source, weight: Weight) -> Callable[[int, int], Tensor]:
    """(start, stop) -> rows of a stored weight."""
    return lambda start, stop: weight.rows(source, start, stop)


def _plan(
    source: Source,
    config: Mapping[str, Any],
    group_size: int,
    convention: str,
    modules: Sequence[str],
    recover: bool,
) -> tuple[list[Task], set[str]]:
    """The tasks in the order of the source, and the modules they pack."""
    checkpoint = source.checkpoint
    weights, others = weights_of(checkpoint, config)
    if already := [name for name, weight in weights.items() if weight.form == "int4"]:
        raise ValueError(
            f"{checkpoint.folder} is INT4 already ({len(already):,} weights, such as {already[0]}): expected bf16, fp32 or "
            "FP8 weights."
        )
    chosen = _chosen(weights, modules, _linear_modules(config))
    encode = int4.recover if recover else lambda w, group: int4.quantize(w, group, convention)
    base = base_dtype(split_config(config)[0])
    tasks = []
    for name, weight in weights.items():
        read = reader(source, weight)
        if name in chosen:
            try:
                tasks.append(packed_task(weight, read, group_size, encode))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif weight.form == "plain" and (weight.dtype == "BF16" or weight.dtype != base):
            tasks.append(copy(weight.parts["weight"]))
        else:
            tasks.append(dense_task(weight, read, "BF16"))
    for info in others:
        if info.dtype == base != "BF16" and len(info.shape) == 1 and not info.name.endswith(_BIAS):
            tasks.append(_rounded(source, info.name))
        else:
            tasks.append(copy(info))
    return tasks, {weights[name].module for name in chosen}


def _chosen(weights: Mapping[str, Weight], modules: Sequence[str], linear: set[str]) -> set[str]:
    """The names of the weights to pack."""
    chosen: set[str] = set()
    for pattern in modules:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"modules has the pattern {pattern!r}: {error}; expected a regular expression."
            ) from None
        found = {name for name, weight in weights.items() if compiled.fullmatch(weight.module)}
        if not found:
            raise ValueError(
                f"modules has the pattern {pattern!r}, which matches no weight: expected one for whole names such as "
                f"{min(linear)}."
            )
        if others := [name for name in found if weights[name].module not in linear]:
            raise ValueError(
                f"modules has the pattern {pattern!r}, which matches {min(others)}: expected linear modules of the language "
                f"model, such as {min(linear)}."
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"modules is empty: expected patterns, as {EXPERTS[0]!r}.")
    return chosen


def _linear_modules(config: Mapping[str, Any]) -> set[str]:
    """Names without K2.5's prefix."""
    text, _ = split_config(config)
    names = {
        name.removesuffix(".weight")
        for name, (shape, _) in expected_tensors(text | {"quantization_config": None}, "none").items()
        if name.endswith(".weight") and len(shape) == 2
    }
    return {name for name in names if not name.endswith((".embed_tokens", ".mlp.gate"))}


def _rounded(source: Source, name: str) -> Task:
    """A vector (of a checkpoint in fp32) in bfloat16."""
    info = source.checkpoint.tensors[name]

    def convert(start: int, stop: int) -> Sequence[Tensor]:
        size = DTYPES[info.dtype].itemsize
        data = source.read(info, start * size, stop * size)
        return (torch.frombuffer(data, dtype=DTYPES[info.dtype]).to(torch.bfloat16),)

    num = info.shape[0]
    return Task((Spec(name, "BF16", info.shape),), convert=convert, num_rows=num, band_rows=num)


def _quantization_config(config: Mapping[str, Any], packed: set[str], group_size: int) -> dict[str, Any]:
    """The published quantization_config, its ignore list changed as far as other modules were packed."""
    published = int4_pack.hub_config(group_size)
    ignore = [pattern for pattern in published["ignore"] if not _hits(pattern, packed)]
    left = _linear_modules(config) - packed
    ignore += sorted(name for name in left if not any(_hits(pattern, {name}) for pattern in ignore))
    return published | {"ignore": ignore}


def _hits(pattern: str, names: set[str]) -> bool:
    """compressed-tensors' rule for an entry of an ignore list."""
    if not pattern.startswith("re:"):
        return pattern in names
    return any(re.match(pattern[3:], name) for name in names)
