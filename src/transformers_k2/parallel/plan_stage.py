"""One pipeline stage of a plan: what its first rank holds at its fullest, and what it sends in a step.

Both follow from the rank's share, from what layers keep of a micro-batch, and from the schedule of passes. What it gives
up: the allocator's fragmentation, which `reserve` of the options stands for, and memory that lives inside an operation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .activations import Saved
from .layout import Layout, stage_layers
from .parts import Share
from .plan_options import Options
from .traffic import Wire, schedule, send, wires


@dataclass(frozen=True)
class Stage:
    """The first rank of a pipeline stage. Bytes; the rank holds `memory` at its fullest, and sends `wire` a step.

    Attributes:
        num_parameters: of the stage, over all ranks.
        in_flight: micro-batches whose activations are kept at a time.
        memory: by kind, in the forward and backward passes.
        step_peak: weights, gradients, states and the optimizer's workspace, while it steps.
        host: what was offloaded.
    """

    rank: int
    layers: tuple[int, int]
    num_parameters: int
    in_flight: int
    memory: dict[str, int]
    step_peak: int
    host: int
    wire: dict[str, Wire]

    @property
    def peak(self) -> int:
        """The larger of both phases."""
        return max(sum(self.memory.values()), self.step_peak)

    @property
    def sent(self) -> Wire:
        """All kinds together."""
        return sum(self.wire.values(), Wire())


def plan_stage(
    config: Any, layout: Layout, options: Options, number: int, share: Share, saved: Mapping[str, Saved]
) -> Stage:
    """The stage `number`, whose first rank has `share` and whose layers keep `saved` of a micro-batch."""
    if options.frozen:
        share = dataclasses.replace(share, gradients=0, optimizer=0, step_workspace=0, muon_sent=0)
    layers = stage_layers(config.num_hidden_layers, layout.pipeline, number)
    dense = sum(layer < config.first_k_dense_replace for layer in layers)
    last = number == layout.pipeline - 1
    num_micro_batches = options.batch_size // (layout.data_size * options.micro_batch_size)
    length = min(options.micro_batches_per_run or num_micro_batches, num_micro_batches)
    num_runs = math.ceil(num_micro_batches / length)
    passes = schedule(length, number, layout.pipeline, options.schedule)
    in_flight = passes.index("B")
    each = options.reduce_each_micro_batch
    each = layout.pipeline == 1 if each is None else each
    keeps = layout.pipeline > 1 and not each
    dtype, tokens = options.compute_dtype, options.tokens
    hidden = tokens * config.hidden_size * dtype.itemsize
    counts = {"dense": dense, "moe": len(layers) - dense}
    kept = {kind: saved[kind].kept(options.recompute) for kind in saved}
    per_batch = sum(counts[kind] * size for kind, size in kept.items())
    whole = max(
        (sum(saved[kind].by_choice.values()) for kind, count in counts.items() if count and kind in saved),
        default=0,
    )
    activations, host = per_batch * in_flight, 0
    if options.offload_activations:
        largest = 2 * max(kept.values(), default=0)  # this layer's, and one on its way
        host += max(activations - largest, 0)
        activations = min(activations, largest)
    workspace = whole if "full" in options.recompute else 0
    loss = _loss(config, options, tokens, dtype) if last else 0
    gathered, accumulated, buffers = _fsdp(share, keeps, each, options.frozen)
    rows = tokens * config.num_experts_per_tok * config.hidden_size * dtype.itemsize
    expert_rows = int(2 * rows * options.imbalance) if layout.expert > 1 and counts["moe"] else 0
    # torch's stages allocate what they receive for every micro-batch of the step.
    received = hidden * length * ((number > 0) + (not last)) if layout.pipeline > 1 else 0
    # Copies of a whole model are DDP's, whose buckets are copies of the gradients.
    buckets = share.gradients if not share.groups and len(share.data_ranks) > 1 else 0
    optimizer = share.optimizer
    if options.offload_optimizer:
        host, optimizer = host + optimizer, 0
    memory = {
        "weights": share.weights,
        "gradients": accumulated + share.gradients * (not accumulated or num_runs > 1),
        "optimizer": optimizer,
        "activations": activations,
        "recomputed": workspace,
        "loss": loss,
        "gathered": gathered,
        "communication": buffers + expert_rows + received + buckets,
        "buffers": share.buffers,
    }
    wire = wires(
        share,
        passes,
        gpus_per_node=options.gpus_per_node,
        recomputes="full" in options.recompute,
        keeps_after_backward=keeps,
        num_runs=num_runs,
        num_reductions=0 if options.frozen else num_micro_batches if each else num_runs,
        row_bytes=config.hidden_size * dtype.itemsize,
        tokens=tokens,
        top_k=config.num_experts_per_tok,
        num_moe_layers=counts["moe"],
        num_experts=config.n_routed_experts,
        imbalance=options.imbalance,
    )
    for step, wanted in ((1, not last), (-1, number > 0)):
        if wanted:
            target = share.rank + step * layout.data_size
            wire["pipeline"] += send(hidden * num_micro_batches, share.rank, target, options.gpus_per_node)
    return Stage(
        rank=share.rank,
        layers=(layers.start, layers.stop),
        num_parameters=share.num_parameters,
        in_flight=in_flight,
        memory=memory,
        step_peak=share.weights + share.gradients + optimizer + share.step_workspace + share.buffers,
        host=host,
        wire=wire,
    )


def _fsdp(share: Share, keeps: bool, each: bool, frozen: bool) -> tuple[int, int, int]:
    """Bytes of gathered weights, of gradients that wait for their reduction, and of the collectives' buffers."""
    if not share.groups:
        return 0, 0, 0
    sizes = [group.numel * group.gather for group in share.groups]
    if keeps:
        gathered = sum(sizes)
    else:
        stay = [size for size, group in zip(sizes, share.groups, strict=True) if group.keeps]
        move = [size for size, group in zip(sizes, share.groups, strict=True) if not group.keeps]
        # A layer, its experts, and the next one, which is fetched ahead.
        gathered = sum(stay) + max((sum(move[i : i + 3]) for i in range(len(move))), default=0)
    flat = max((g.numel * g.gather for g in share.groups if len(g.shard_ranks) > 1), default=0)
    if frozen:
        return gathered, 0, flat
    accumulated = 0 if each else sum(group.numel * max(group.reduce, group.gather) for group in share.groups)
    gradient = max(g.numel * g.gather for g in share.groups)
    reducing = max(g.numel * g.reduce + g.numel * g.reduce // len(g.shard_ranks) for g in share.groups)
    # Gradients that wait are reduced when the activations are gone.
    return gathered, accumulated, flat + gradient + (reducing if each else 0)


def _loss(config: Any, options: Options, tokens: int, dtype: torch.dtype) -> int:
    """Logits, their float32 copy and its gradient; in chunks, the gradients of hidden states and head beside one chunk."""
    at_once = min(options.loss_chunk_tokens or tokens, tokens)
    size = dtype.itemsize
    logits = at_once * config.vocab_size * (size + 4 + (4 if options.loss_chunk_tokens is None else size))
    if options.loss_chunk_tokens is None:
        return logits
    return logits + (tokens * size + config.vocab_size * (size + 4)) * config.hidden_size
