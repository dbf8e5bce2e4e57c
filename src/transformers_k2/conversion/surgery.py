"""Edits of an opened checkpoint that change its sizes: other layers, other experts, another config.

A cut is a smaller model whose tensors are tensors of the larger one, under other numbers and with fewer rows in the routers;
a grown one has some of them twice. So each is an opened source with other names (`cut`, `resized`) and is written by the
engine that converts: only what is kept is read, FP8 and INT4 weights pass bit for bit, any layout will do.

Given up: other vocabularies, because the tokenizer beside the weights would no longer fit them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..lazy_tensors import Cat, LazyTensor, Narrow, OpenFiles
from ..manifest import expected_tensors, quantization_of
from ..quantization import int4
from . import layout as layouts
from .configs import linear_modules
from .convert import Coding, Output, Summary, write_model
from .opened import Model
from .weights import BIAS, Weight

ROUTER = ".mlp.gate.weight"
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
OF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
_NUMBERED = re.compile(r"layers\\?\.\D{0,3}\d")  # a pattern that knows a layer's number


def cut(
    model: Model,
    layers: Sequence[int],
    experts: Mapping[int, Sequence[int]] | None,
    changes: Mapping[str, Any],
) -> Model:
    """The model made of layers of another, and of experts of those.

    Args:
        layers: the number in `model` of each layer, multi-token-prediction layers included.
        experts: by the layer's number in `model`, the number there of each expert; None: all, in order.
        changes: of config.json, that say the same.
    """

    def origin(name: str) -> str:
        if (match := IN_LAYER.fullmatch(name)) is None:
            return name
        layer, rest = layers[int(match[1])], match[2]
        if experts is not None and (expert := OF_EXPERT.fullmatch(rest)):
            rest = f"mlp.experts.{experts[layer][int(expert[1])]}.{expert[2]}"
        return f"model.layers.{layer}.{rest}"

    def read(name: str) -> Weight:
        there = origin(name)
        weight = model.read(there)
        if experts is not None and name.endswith((ROUTER, BIAS)):
            rows = experts[layer_of(there)]
            weight = Weight(name, "bf16", {"weight": picked(weight.values(), rows)})
        return replace(weight, name=name)

    return resized(model, changes, origin, read)


def resized(
    model: Model,
    changes: Mapping[str, Any],
    origin: Callable[[str], str | None],
    read: Callable[[str], Weight],
) -> Model:
    """The model with another config, and the tensors that this asks for.

    Args:
        changes: of the language model's part of config.json.
        origin: name of a tensor -> the name in `model` of what it is made from; None: of nothing.
        read: name of a tensor -> its weight.
    """
    text, config = {**model.text, **changes}, {**model.config, **changes}
    if "text_config" in model.config:
        config = {**model.config, "text_config": {**model.config["text_config"], **changes}}
    names = expected_tensors(text | {"quantization_config": None}, "none")
    coded = frozenset(
        name.removesuffix(".weight")
        for name in names
        if name.endswith(".weight") and (origin(name) or "").removesuffix(".weight") in model.coded
    )
    shapes = {name: shape for name, (shape, _) in names.items()}
    edited = replace(model, config=config, text=text, names=shapes, read=read, coded=coded)
    left = [name for name in model.names if layer_of(name) >= model.shape.num_layers]
    if left and not text.get("num_nextn_predict_layers"):
        why = "multi-token prediction needs all layers, and loads of its own where loads choose the experts"
        dropped = (*model.dropped, (f"model.layers.{layer_of(left[0])}.*", why, len(left)))
        edited = replace(edited, dropped=dropped)
    return replace(edited, text=text | {"quantization_config": _quantization(edited)})


def write_edited(
    model: Model,
    edited: Model,
    dst: Path,
    to: str | None,
    output: Output,
    files: OpenFiles,
    options: Mapping[str, Any],
) -> Summary:
    """Write what became of `model`, in the layout `to`, or in its own with nothing rounded."""
    if to is None:
        layout = replace(layouts.load(model.layout), dtype=None)
        if model.codec not in layout.codecs:  # K2.5's names around plain weights
            layout = replace(layout, codecs=(model.codec,))
    else:
        layout = layouts.load(to)
    coding = Coding(group_size=model.group_size or int4.GROUP_SIZE)
    summary = write_model(edited, dst, layout, coding, output, files, {**options, "to": to})
    before, after = _told(model), _told(edited)
    return summary._replace(lines=(f"from {before} to {after}", *summary.lines))


def _told(model: Model) -> str:
    shape, num_moe = model.shape, len(moe_layers(model))
    mtp = f", {num_layers(model) - shape.num_layers} for multi-token prediction"
    mtp = mtp if num_layers(model) > shape.num_layers else ""
    experts = f"{num_moe} with {shape.num_experts} experts" if num_moe else "none with experts"
    return f"{num_layers(model)} layers ({experts}{mtp})"


def picked(tensor: LazyTensor, rows: Sequence[int]) -> LazyTensor:
    """Entries of the first dimension by their numbers."""
    if list(rows) == list(range(tensor.shape[0])):
        return tensor
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, row + 1])
    parts = [Narrow(tensor, 0, start, stop) for start, stop in runs]
    return parts[0] if len(parts) == 1 else Cat(parts)


def routing(
    model: Model, experts: Mapping[int, Sequence[int]] | None, num_experts_per_tok: int | None
) -> dict[str, int]:
    """What config.json says of routing among other experts.

    Raises:
        ValueError: a token cannot be sent to that many of them, or they do not divide into groups.
    """
    if experts is None:
        if num_experts_per_tok is not None:
            raise ValueError(f"num_experts_per_tok is {num_experts_per_tok}: expected None with all experts.")
        return {}
    num, text = len(next(iter(experts.values()))), model.text
    groups, best = text.get("n_group") or 1, text.get("topk_group") or 1
    if num % groups or (groups > 1 and num < 2 * groups):
        raise ValueError(
            f"{num} experts cannot form the {groups} groups of config.json (n_group): expected a multiple of {groups}, at "
            "least two in each."
        )
    chosen = text["num_experts_per_tok"] if num_experts_per_tok is None else num_experts_per_tok
    most = num // groups * min(best, groups)
    if type(chosen) is not int or not 0 < chosen <= most:
        raise ValueError(
            f"num_experts_per_tok is {chosen}: expected 1 to {most}, as a token has {num} experts to choose from in "
            f"{min(best, groups)} of {groups} groups; it can be given anew."
        )
    return {"n_routed_experts": num, "num_experts_per_tok": chosen}


def measured(model: Model, scores: Mapping[int, Any]) -> tuple[list[int], dict[str, Any]]:
    """The layers that stay if those of multi-token prediction have no scores, and what config.json says then."""
    lacking = [layer for layer in moe_layers(model) if layer not in scores]
    if not lacking:
        return list(range(num_layers(model))), {}
    return list(range(model.shape.num_layers)), {"num_nextn_predict_layers": 0}


def layer_of(name: str) -> int:
    """The number in a tensor's name; -1 without one."""
    match = IN_LAYER.fullmatch(name)
    return int(match[1]) if match else -1


def num_layers(model: Model) -> int:
    """Those of multi-token prediction included."""
    return model.shape.num_layers + (model.text.get("num_nextn_predict_layers") or 0)


def moe_layers(model: Model) -> list[int]:
    """Layers with experts, those of multi-token prediction included."""
    return [layer for layer in range(num_layers(model)) if model.shape.kind(layer) == "moe"]


def check_number(what: str, value: Any, most: int) -> None:
    """Raises: ValueError: no integer from 1 to `most`."""
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{what} is {value!r}: expected 1 to {most}, as many as the model has.")


def _quantization(model: Model) -> Any:
    """The quantization_config of the new model: patterns with the numbers of layers are made anew."""
    spec = model.text.get("quantization_config")
    if not spec or model.codec not in ("fp8", "int4"):
        return spec
    if model.codec == "int4":  # without one, the writer makes it of the modules that are packed
        return None if any(map(_NUMBERED.search, spec.get("ignore") or ())) else spec
    given = list(spec.get("modules_to_not_convert") or ())
    ignore = [pattern for pattern in given if not _NUMBERED.search(pattern)]
    rule = quantization_of({"quantization_config": {**spec, "modules_to_not_convert": ignore}})
    ignore += [
        name
        for name in linear_modules(model)
        if name not in model.coded and len(rule.stores(name, 1, 1, "BF16")) > 1
    ]
    return spec if ignore == given else {**spec, "modules_to_not_convert": ignore}
