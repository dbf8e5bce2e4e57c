"""Compare what a checkpoint's headers hold with what its config.json promises, whatever codec each weight is stored in.

The comparison is of weights, not of stored tensors: `X.weight_packed` with its scale, or an FP8 `X.weight` with its scale
grid, stand for `X.weight`. So a folder of any codec, or of several, is judged by one rule, and bf16 weights under a stale
quantization_config pass. Names, shapes and dtypes only; no byte of a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .manifest import WRAPPER_EXTRAS, WRAPPER_PREFIX, expected_tensors

# Not the language model's: stray rope buffers, K2.5's vision tower and projector.
IGNORED_KEYS = (r"rotary_emb\.inv_freq$", *(rf"^{re.escape(prefix)}" for prefix in WRAPPER_EXTRAS))
_IGNORED = re.compile("|".join(IGNORED_KEYS))
_BARE = re.compile(
    r"(?:layers|embed_tokens|norm)\."
)  # a decoder saved without its head drops the `model.` prefix
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PER_INT32 = 8

Stored = Mapping[str, tuple[tuple[int, ...], str]]


class Problem(NamedTuple):
    """One fault of one weight: `kind` is "missing", "left over" or "shape"; `text` a clause without a full stop."""

    kind: str
    name: str
    text: str


def compare(config: Mapping[str, Any], stored: Stored) -> list[Problem]:
    """The faults of a checkpoint, those of weights the config promises first.

    Args:
        config: the language model's config.json as a dict with the hub's key names.
        stored: name -> (shape, dtype as safetensors spells it), as the headers have them.
    """
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    spelling: dict[str, str] = {}  # our name of a tensor -> the name in the file
    for written, value in stored.items():
        name = written.removeprefix(WRAPPER_PREFIX)
        if _IGNORED.search(name):
            continue
        name = f"model.{name}" if _BARE.match(name) else name
        tensors[name], spelling[name] = value, written
    fused = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    expected = expected_tensors(config, "none", fused=fused)
    layers = config["num_hidden_layers"]
    quantization = config.get("quantization_config") or {}
    block = quantization.get("weight_block_size") or (128, 128)
    schemes = [scheme.get("weights") or {} for scheme in (quantization.get("config_groups") or {}).values()]
    group = schemes[0].get("group_size") if len(schemes) == 1 else None

    def beyond(
        name: str,
    ) -> bool:  # DeepSeek's extra prediction layers, if the config has them: the model ignores them
        layer = _LAYER.match(name)
        return layer is not None and int(layer[1]) >= layers and bool(config.get("num_nextn_predict_layers"))

    problems, used = [], set()
    for name, (shape, _) in expected.items():
        if beyond(name):
            continue
        parts = [name, *(f"{name}{suffix}" for suffix in ("_packed", "_scale", "_shape", "_scale_inv"))]
        present = {part.removeprefix(name): tensors[part] for part in parts if part in tensors}
        used.update(part for part in parts if part in tensors)
        if fault := _fault(name, shape, present, block, group):
            problems.append(fault)
    problems += [
        Problem("left over", name, f"{spelling[name]} has no place in the model that config.json describes")
        for name in sorted(tensors.keys() - used)
        if not beyond(name)
    ]
    return problems


def _fault(
    name: str, shape: tuple[int, ...], present: Stored, block: Sequence[int], group: int | None
) -> Problem | None:
    """What is wrong with the tensors that store one weight.

    Args:
        present: suffix -> (shape, dtype).
        block: rows and columns of an FP8 scale.
        group: inputs of an INT4 scale; None if the configuration does not say.
    """

    def wrong(suffix: str, wanted: tuple[int, ...]) -> Problem | None:
        got = present[suffix][0]
        if got == wanted:
            return None
        return Problem(
            "shape", name, f"{name}{suffix} has shape {list(got)}, but config.json asks for {list(wanted)}"
        )

    def lacks(suffix: str) -> Problem:
        return Problem("missing", name, f"{name}{suffix} is missing")

    if "_packed" in present:
        if "_scale" not in present:
            return lacks("_scale")
        if fault := wrong("_packed", (shape[0], -(-shape[1] // _PER_INT32))):
            return fault
        if group:
            return wrong("_scale", (shape[0], -(-shape[1] // group)))
        groups = present["_scale"][0]
        if len(groups) != 2 or groups[0] != shape[0] or groups[1] == 0 or shape[1] % groups[1]:
            text = f"{name}_scale has shape {list(groups)}, which divides no {list(shape)} weight into groups"
            return Problem("shape", name, text)
        return None
    if "" not in present:
        return lacks("")
    if fault := wrong("", shape):
        return fault
    is_fp8 = present[""][1].startswith("F8_")
    if is_fp8 and "_scale_inv" not in present:
        return lacks("_scale_inv")
    if "_scale_inv" in present:
        return wrong("_scale_inv", (-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    return None
