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

import re
from collections.abc import Sequence
from pathlib import Path

from ..lazy_tensors import OpenFiles
from ..quantization import int4
from . import layout as layouts
from .convert import Coding, Output, Summary, make_target, write_model
from .engine import MEMORY
from .opened import open_model
from .staging import check_destination
from .tasks import SHARD_BYTES

EXPERTS = (r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj",)


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    group_size: int = int4.GROUP_SIZE,
    convention: str = "kimi",
    modules: Sequence[str] = EXPERTS,
    recover: bool = False,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write `src` to `dst` with the chosen modules in INT4, and everything that stands beside the weights.

    Args:
        src: a checkpoint of any layout in bf16, fp32 or FP8 blocks.
        group_size: inputs that share a scale.
        convention: of `int4.CONVENTIONS`; readers need not know it.
        modules: regular expressions for whole module names, as `model.layers.1.mlp.experts.0.up_proj`.
        recover: take weights that lie on a grid back to its codes and scales, and refuse others.
        memory: bytes that the work may take beside Python and its libraries.
        dry_run: plan and check only.

    Returns:
        Tensors, bytes and shards written, or to be written.

    Raises:
        ValueError: weights that are INT4 already, a group size that does not fit, patterns that match nothing, weights
            that are not finite (or, with `recover`, on no grid), an unusable destination; the message names the tensor.
    """
    src, dst = Path(src), Path(dst)
    check_destination(src, dst, overwrite)
    coding = Coding(
        "int4", group_size, convention, recover, modules=lambda linear: _chosen(linear, list(modules))
    )
    output = Output(shard_bytes, memory, 1, dry_run, overwrite, quiet)
    with OpenFiles() as files:
        model = open_model(src, files)
        layout = layouts.load("k25_int4" if "text_config" in model.config else "hub_int4")
        make_target(model, layout, coding)
        if model.codec in ("int4", "affine"):
            raise ValueError(
                f"{src} is INT4 already ({len(model.coded):,} weights, such as {min(model.coded)}): expected bf16, fp32 or "
                "FP8 weights."
            )
        options = {"command": "quantize", "modules": list(modules)}
        return write_model(model, dst, layout, coding, output, files, options)


def _chosen(linear: Sequence[str], modules: Sequence[str]) -> set[str]:
    """The modules to pack."""
    chosen: set[str] = set()
    for pattern in modules:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"modules has the pattern {pattern!r}: {error}; expected a regular expression."
            ) from None
        found = {name for name in linear if compiled.fullmatch(name)}
        if not found:
            raise ValueError(
                f"modules has the pattern {pattern!r}, which matches no linear module: expected one for whole names such "
                f"as {min(linear)}; embeddings and routers stay as they are."
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"modules is empty: expected patterns, as {EXPERTS[0]!r}.")
    return chosen
