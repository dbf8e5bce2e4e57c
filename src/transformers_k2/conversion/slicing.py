"""Checkpoints with fewer layers or fewer experts than the one they are cut from, file to file (see surgery.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..lazy_tensors import OpenFiles
from .convert import Output, Summary
from .engine import MEMORY
from .expert_scores import best_experts, read_scores, router_norms
from .layout import Shape
from .opened import Model, open_model
from .staging import check_destination
from .surgery import check_number, cut, measured, moe_layers, num_layers, routing, write_edited
from .tasks import SHARD_BYTES

RULES = ("load", "norm")


def slice_model(
    src: str | Path,
    dst: str | Path,
    *,
    layers: int | Sequence[int] | None = None,
    experts: int | Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    num_experts_per_tok: int | None = None,
    to: str | None = None,
    config: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write some layers and some experts of `src` to `dst`: a small checkpoint of the shape of a huge one.

    Layers and experts are numbered anew in the order in which they are chosen; a router keeps the rows and the bias of its
    experts. Multi-token-prediction layers stay only if all layers do. Where experts are routed by groups (n_group > 1), the
    groups are as many as before, each a run of the chosen experts.

    Args:
        src: a checkpoint of any layout; for a dry run its index will do.
        layers: the first so many, or a list, in which a layer may come twice; None: all.
        experts: of each layer the first so many, or a list, or such a list for each layer of experts, by the layer's number
            in `src` (multi-token-prediction layers count on from the last). None: all.
        num_experts_per_tok: that a token is sent to, if fewer experts are kept than it is now.
        to: another layout, a stem in conversion/; None: the source's own layout, codec and dtypes.
        config: config.json of the model, or a name in configs/, if none stands beside the weights.
        memory: bytes that the work may take beside Python and its libraries.
        dry_run: plan and check only.

    Returns:
        Tensors, bytes and files written, or to be written.

    Raises:
        ValueError: nothing to cut, layers or experts that are not there, dense layers behind layers of experts, experts that
            do not divide into groups or are fewer than a token is sent to; what `convert` raises. All before a byte is
            written.
    """
    src, dst = Path(src), Path(dst)
    if layers is None and experts is None:
        raise ValueError("layers and experts are None: expected one of them to say what to keep.")
    check_destination(src, dst, overwrite)
    with OpenFiles() as files:
        model = open_model(src, files, config=config, names_only=dry_run)
        sources, changes = _chosen_layers(model, layers)
        chosen = None if experts is None else _chosen_experts(model, experts, sources)
        edited = cut(model, sources, chosen, changes | routing(model, chosen, num_experts_per_tok))
        options = {"command": "slice", "layers": sources, "experts": chosen}
        output = Output(shard_bytes, memory, 1, dry_run, overwrite, quiet)
        return write_edited(model, edited, dst, to, output, files, options)


def drop_experts(
    src: str | Path,
    dst: str | Path,
    *,
    keep: int,
    load: str | Path | Mapping[Any, Any] | None = None,
    rule: str | None = None,
    num_experts_per_tok: int | None = None,
    to: str | None = None,
    config: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write `src` to `dst` with `keep` experts in each layer, those that matter most, in their order.

    Rules, each within a layer:

    * "load": the experts that were sent the most tokens of a text like those to come. Counts as the criterion: SEER-MoE
      (arXiv 2404.05089, "heavy hitters"), and usage frequency in MC-Suite (2504.05586). Any other score of which more is
      better, such as REAP's router-weighted activations (2510.13999), can be given in the place of the counts.
    * "norm": the experts with the longest rows in the router, which needs no text: router weight norm in MC-Suite
      (2504.05586). The guarantee of 2405.16646 is for the norm's change in fine-tuning, not for the norm itself. The
      correction bias plays no part. Measured loads are the better guide wherever there are any.

    Of equal experts the first stays. Where experts are routed by groups (n_group > 1), each group keeps as many, so that the
    groups remain what they were. Nothing makes up for what is dropped: its tokens go to the next best experts.

    Args:
        src: a checkpoint of any layout.
        keep: experts that each layer keeps.
        load: an expert_load.jsonl as training writes it, whose lines are summed; or layer -> a number for each expert, as a
            mapping or a JSON file, where a layer is its number or its router's name. Training measures no
            multi-token-prediction layers: without numbers for them they are left out, and the summary says so.
        rule: "load" or "norm"; None: "load" if there is one, else "norm".
        num_experts_per_tok: that a token is sent to, if fewer experts are kept than it is now.
        to: another layout, a stem in conversion/; None: the source's own layout, codec and dtypes.
        config: config.json of the model, or a name in configs/, if none stands beside the weights.
        memory: bytes that the work may take beside Python and its libraries.
        dry_run: plan and check only.

    Returns:
        Tensors, bytes and files written, or to be written.

    Raises:
        ValueError: a rule that does not exist or has no numbers to go by, loads that do not fit the model, experts that do
            not divide into groups or are fewer than a token is sent to; what `convert` raises. All before a byte is written.
    """
    src, dst = Path(src), Path(dst)
    rule = rule or ("norm" if load is None else "load")
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: expected one of {', '.join(RULES)}.")
    if (rule == "load") != (load is not None):
        wanted = "expected loads" if load is None else "expected no loads, or rule 'load'"
        raise ValueError(f"rule is {rule!r} and load is {str(load)[:60]}: {wanted}.")
    check_destination(src, dst, overwrite)
    with OpenFiles() as files:
        model = open_model(src, files, config=config, names_only=dry_run and rule == "load")
        check_number("keep", keep, model.shape.num_experts)
        if not (moe := moe_layers(model)):
            raise ValueError(f"{src} has no layers with experts: expected some to choose among.")
        changes = routing(model, dict.fromkeys(moe, range(keep)), num_experts_per_tok)
        sources = list(range(num_layers(model)))
        if load is None:
            scores = router_norms(model, moe)
        else:
            scores = read_scores(load, model)
            sources, less = measured(model, scores)
            changes |= less
        groups = model.text.get("n_group") or 1
        chosen = {layer: best_experts(scores[layer], keep, groups) for layer in moe if layer in scores}
        edited = cut(model, sources, chosen, changes)
        options = {"command": "drop_experts", "rule": rule, "experts": chosen}
        output = Output(shard_bytes, memory, 1, dry_run, overwrite, quiet)
        return write_edited(model, edited, dst, to, output, files, options)


def _chosen_layers(model: Model, layers: int | Sequence[int] | None) -> tuple[list[int], dict[str, int]]:
    """The source's number of each layer, and the changes of config.json."""
    shape = model.shape
    if layers is None:
        return list(range(num_layers(model))), {}
    if isinstance(layers, int):
        check_number("layers", layers, shape.num_layers)
        chosen = list(range(layers))
    else:
        chosen = list(layers)
        wrong = [one for one in chosen if type(one) is not int or not 0 <= one < shape.num_layers]
        if wrong or not chosen:
            told = f"has {wrong[0]!r}" if wrong else "is empty"
            raise ValueError(f"layers {told}: expected numbers from 0 to {shape.num_layers - 1}.")
    if chosen == list(range(shape.num_layers)):
        return list(range(num_layers(model))), {}
    kinds = [shape.kind(layer) for layer in chosen]
    first_dense = kinds.index("moe") if "moe" in kinds else len(kinds)
    after = Shape(len(chosen), first_dense, shape.moe_every, shape.num_experts)
    for place, (layer, kind) in enumerate(zip(chosen, kinds, strict=True)):
        if after.kind(place) != kind:
            raise ValueError(
                f"layers puts layer {layer}, which is {kind}, in place {place}: expected dense layers before those with "
                f"experts, and then one with experts every {shape.moe_every} (moe_layer_freq), as config.json can say."
            )
    changes = {"num_hidden_layers": len(chosen), "first_k_dense_replace": first_dense}
    return chosen, changes | ({"num_nextn_predict_layers": 0} if num_layers(model) > shape.num_layers else {})


def _chosen_experts(
    model: Model, experts: int | Sequence[int] | Mapping[int, Sequence[int]], layers: Sequence[int]
) -> dict[int, list[int]]:
    """By the number in the source of each chosen layer that has experts, theirs."""
    num = model.shape.num_experts
    moe = sorted({layer for layer in layers if model.shape.kind(layer) == "moe"})
    if not moe:
        raise ValueError(
            f"experts is {str(experts)[:60]}, but none of the layers has experts: expected None."
        )
    if isinstance(experts, int):
        check_number("experts", experts, num)
        return {layer: list(range(experts)) for layer in moe}
    if isinstance(experts, Mapping):
        given = {int(key) if str(key).isdecimal() else key: list(rows) for key, rows in experts.items()}
        if unknown := [key for key in given if key not in moe_layers(model)]:
            raise ValueError(
                f"experts names layer {unknown[0]!r}: expected layers with experts, as {moe[0]}."
            )
        if lacking := [layer for layer in moe if layer not in given]:
            raise ValueError(f"experts lacks layer {lacking[0]}: expected a list for each layer of experts.")
        chosen = {layer: given[layer] for layer in moe}
    else:
        chosen = {layer: list(experts) for layer in moe}
    for layer, rows in chosen.items():
        if wrong := [row for row in rows if type(row) is not int or not 0 <= row < num]:
            raise ValueError(
                f"experts has {wrong[0]!r} for layer {layer}: expected numbers from 0 to {num - 1}."
            )
        if not rows or len(set(rows)) < len(rows):
            raise ValueError(
                f"experts has {rows} for layer {layer}: expected some experts, each of them once."
            )
        if len(rows) != len(chosen[moe[0]]):
            raise ValueError(
                f"experts has {len(rows)} for layer {layer} and {len(chosen[moe[0]])} for layer {moe[0]}: expected as many "
                "in each layer."
            )
    return chosen
