"""Checkpoints with more experts than the one they are made from, file to file: of a mixture, or of a dense model.

What is new is copied from weights that are there, or drawn: random values depend on the seed and the tensor's name alone, so
that a run that is resumed, and one with other threads, writes the same bits.

Given up: anything that needs data or gradients to choose what is copied, and noise in the experts themselves: copies part
because their routers send them other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..lazy_tensors import LazyTensor, OpenFiles, Region
from .convert import Output, Summary
from .engine import MEMORY
from .expert_scores import read_scores
from .from_dense import drawn, from_dense
from .opened import Model, open_model
from .staging import check_destination
from .surgery import (
    ROUTER,
    cut,
    layer_of,
    measured,
    moe_layers,
    num_layers,
    routing,
    write_edited,
)
from .tasks import SHARD_BYTES
from .weights import Weight

NOISE = 0.01


def upcycle(
    src: str | Path,
    dst: str | Path,
    *,
    num_experts: int,
    num_experts_per_tok: int | None = None,
    load: str | Path | Mapping[Any, Any] | None = None,
    noise: float | None = None,
    granularity: int | None = None,
    shared: str | None = None,
    first_k_dense_replace: int | None = None,
    seed: int = 0,
    to: str | None = None,
    config: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write `src` to `dst` with `num_experts` routed experts in each of its layers of experts, to train it on.

    **A mixture gets more experts** (arXiv 2604.19835). The new ones are copies, behind the old ones of their group
    (n_group); of expert 0, 1, 2, ... in turn, or, with `load`, each of the expert that has the highest load per copy so
    far, as DeepSeek's load balancer EPLB places its copies. A copy has the row and the correction bias of its expert in the
    router; to its row is added normal noise, whose deviation is `noise` times the row's root mean square, so that the
    copies differ. What that does to the function, with noise 0: a token is sent to the first num_experts_per_tok = K of all
    experts in the order of s_e + b_e, where expert e stands m_e times; if n_e of its copies are among them, its weight is
    n_e s_e / sum_j n_j s_j (norm_topk_prob), so that the copies of the best experts push out the last of the K. If each
    expert stands m times and there is one group, the result is the old model's with the best K / m experts alone; with K
    times m experts per token (`num_experts_per_tok`) each stands in it with all of its copies and the function is the old
    one exactly. (Without norm_topk_prob it would be m times as large.) Groups are chosen by their two best experts, which
    may now be copies.

    **A dense model gets experts** (sparse upcycling, Komatsuzaki et al., 2212.05055) in all layers but the first. With
    `granularity` g each expert is one of g slices of the dense MLP, of 1/g of its width (He et al., 2410.07524, whose
    "virtual groups" these are): experts t g to t g + g - 1 together are one copy of the MLP, and have one row in the
    router, drawn from a normal distribution of deviation initializer_range, and no bias. A token is then sent to whole
    groups, in each group with equal weights, and since the weights are normalised and sum to routed_scaling_factor, the
    routed experts add up to routed_scaling_factor / g times the dense MLP, whatever the router says. That factor is
    set, so that the function is the old one exactly (up to the order of sums) and no routed weight is scaled; 2410.07524
    scales weights instead, for a softmax over all experts, which does not sum to 1 over the chosen ones:

    * shared "zero": routed_scaling_factor is g; the shared expert is the first slice with a down_proj of zeros.
    * shared "dense": it is g / 2; the shared expert is the whole MLP (n_shared_experts is g), its down_proj halved.

    The result routes as DeepSeek-V3: sigmoid scores, one group, normalised weights.

    Args:
        src: a checkpoint of any layout: a mixture, or a model of dense layers alone in bf16 (or fp32) or FP8 blocks.
        num_experts: in each layer; for a dense model a multiple of `granularity`.
        num_experts_per_tok: that a token is sent to; None: as before, and 2 `granularity` in what was dense.
        load: of the experts of a mixture, as `drop_experts` takes it. Multi-token-prediction layers without any are left
            out.
        noise: in the rows of copies, relative; None: 0.01.
        granularity: slices of a dense MLP; None: 1. Slices of FP8 weights must be of whole blocks.
        shared: "zero" or "dense"; None: "zero".
        first_k_dense_replace: layers of a dense model that stay so; None: 1.
        seed: of whatever is drawn.
        to: another layout, a stem in conversion/; None: the source's own layout, codec and dtypes.
        config: config.json of the model, or a name in configs/, if none stands beside the weights.
        memory: bytes that the work may take beside Python and its libraries.
        dry_run: plan and check only.

    Returns:
        Tensors, bytes and files written, or to be written.

    Raises:
        ValueError: sizes that do not divide or do not grow, an option of the other kind of source, loads that do not fit;
            what `convert` raises. All before a byte is written.
    """
    src, dst = Path(src), Path(dst)
    if type(seed) is not int:
        raise ValueError(f"seed is {seed!r}: expected an integer.")
    check_destination(src, dst, overwrite)
    with OpenFiles() as files:
        model = open_model(src, files, config=config, names_only=dry_run)
        dense = not moe_layers(model)
        foreign: dict[str, Any] = {"load": load, "noise": noise}
        if not dense:
            foreign = {
                "granularity": granularity,
                "shared": shared,
                "first_k_dense_replace": first_k_dense_replace,
            }
        for name, value in foreign.items():
            if value is not None:
                told = "dense" if dense else "a mixture of experts"
                raise ValueError(f"{name} is {str(value)[:60]}, but {src} is {told}: expected None.")
        if dense:
            given = (
                1 if granularity is None else granularity,
                "zero" if shared is None else shared,
                1 if first_k_dense_replace is None else first_k_dense_replace,
            )
            edited = from_dense(model, num_experts, num_experts_per_tok, *given, seed)
            told = {"granularity": given[0], "shared": given[1], "first_k_dense_replace": given[2]}
        else:
            strength = NOISE if noise is None else noise
            edited, copies = _more_experts(model, num_experts, num_experts_per_tok, load, strength, seed)
            told = {"experts": copies, "noise": strength}
        options = {"command": "upcycle", "seed": seed, **told, "num_experts": num_experts}
        options["num_experts_per_tok"] = edited.text["num_experts_per_tok"]
        output = Output(shard_bytes, memory, 1, dry_run, overwrite, quiet)
        return write_edited(model, edited, dst, to, output, files, options)


def _more_experts(
    model: Model,
    num_experts: int,
    num_experts_per_tok: int | None,
    load: str | Path | Mapping[Any, Any] | None,
    noise: float,
    seed: int,
) -> tuple[Model, dict[int, list[int]]]:
    """The grown model, and layer -> the old number of each of its experts."""
    num, groups = model.shape.num_experts, model.text.get("n_group") or 1
    if type(num_experts) is not int or num_experts <= num:
        raise ValueError(f"num_experts is {num_experts!r}: expected more than the {num} that the model has.")
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise!r}: expected a finite number >= 0.")
    changes: dict[str, Any] = {}
    changes |= routing(model, {0: range(num_experts)}, num_experts_per_tok)
    layers, loads = list(range(num_layers(model))), {}
    if load is not None:
        loads = read_scores(load, model)
        if negative := [layer for layer, one in loads.items() if min(one) < 0]:
            raise ValueError(f"load has negative numbers for layer {negative[0]}: expected counts.")
        layers, less = measured(model, loads)
        changes |= less
    size, extra = num // groups, (num_experts - num) // groups
    experts = {}
    for layer in [one for one in moe_layers(model) if one in layers]:
        experts[layer] = []
        for start in range(0, num, size):
            of_group = loads[layer][start : start + size] if loads else [1.0] * size
            copied = (start + expert for expert in _copied(of_group, extra))
            experts[layer] += [*range(start, start + size), *copied]
    grown = cut(model, layers, experts, changes)

    def read(name: str) -> Weight:
        weight = grown.read(name)
        if not noise or not name.endswith(ROUTER):
            return weight
        rows = experts[layers[layer_of(name)]]
        fresh = frozenset(place for place, expert in enumerate(rows) if expert in rows[:place])
        return replace(weight, parts={"weight": _Noisy(weight.values(), fresh, noise, seed, name)})

    return replace(grown, read=read), experts


def _copied(loads: Sequence[float], num: int) -> list[int]:
    """The experts to copy, one after the other: that of the highest load per copy, the first of equals."""
    copies, chosen = [1] * len(loads), []
    for _ in range(num):
        best = max(
            range(len(loads)), key=lambda expert: (loads[expert] / copies[expert], -copies[expert], -expert)
        )
        copies[best] += 1
        chosen.append(best)
    return chosen


class _Noisy(LazyTensor):
    """A router whose rows `fresh` have noise in proportion to their root mean square, added in float32."""

    def __init__(self, source: LazyTensor, fresh: frozenset[int], noise: float, seed: int, name: str) -> None:
        self.source, self.fresh, self.noise, self.seed, self.name = source, fresh, noise, seed, name
        self.shape, self.dtype = source.shape, source.dtype

    def fill(self, place: Tensor, region: Region) -> None:
        self.source.fill(place, region)
        normal = drawn(self.seed, self.name, self.shape)
        for number in range(region[0].start, region[0].stop):
            if number in self.fresh:
                row = self.source[number : number + 1][0].float()
                row += self.noise * row.square().mean().sqrt() * normal[number]
                place[number - region[0].start] = row[region[1]]
