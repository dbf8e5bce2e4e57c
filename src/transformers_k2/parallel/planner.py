"""Does a model fit, and what will it send? Bytes per rank and per step, computed from the layout that training builds.

`plan` measures the first rank of every pipeline stage (share.py), traces what layers keep (activations.py) and counts what
travels (traffic.py); `search` compares layouts. Nothing is predicted about speed: times are bytes over bandwidth, a lower
bound. What it gives up: the allocator's fragmentation, CUDA's context and NCCL's buffers are one number, `reserve`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..configuration_kimi_k2 import KimiK2Config
from ..resources import find
from .activations import RECOMPUTE, Saved, layer_activations
from .layout import Layout, stage_layers
from .share import Share, share_of
from .traffic import Wire, schedule, send, wires

GIB = 2**30
PIPELINES = (1, 2, 4, 8, 16, 32)
MAX_SHARD = 512


@dataclass(frozen=True)
class Options:
    """How the model is trained, as far as memory and traffic depend on it.

    Attributes:
        micro_batch_size: sequences per rank and pass.
        batch_size: sequences per step, over all ranks.
        dtype: of the weights; with `mixed_precision` FSDP2 gathers bfloat16 and reduces float32 whatever they are.
        optimizer: `muon_clip` or `adamw`; the two after it are MuonClip's.
        recompute: what the backward pass computes again: norms, swiglu, mla_up, moe_down, or full.
        experts: implementation of the routed experts, `k2` or `grouped_mm`.
        loss_chunk_tokens: tokens whose logits exist at a time; None: all.
        offload_optimizer, offload_activations: kept in the host's memory.
        reduce_each_micro_batch: reduce gradients after every micro-batch, not once a step. None: without pipeline
            stages, as Trainer does; torch's pipeline stages reduce once and keep weights gathered until then.
        micro_batches_per_run: how many go through the pipeline at a time. None: all of a step; torch's stages allocate
            what they receive for every one of them, so that a large batch needs several runs, each with its own bubble.
        imbalance: rows of the fullest rank's experts, relative to an even share.
        gpu_memory, reserve: GiB of a GPU, and what the context, NCCL and fragmentation take of it (assumed).
        intra_node_gbps, inter_node_gbps: GB/s that one GPU sends in and out of the node (K2: NVLink, 400 Gb/s RoCE).
    """

    micro_batch_size: int = 1
    sequence_length: int = 4096
    batch_size: int = 16384
    dtype: str = "bfloat16"
    mixed_precision: bool = True
    optimizer: str = "muon_clip"
    state_dtype: str = "float32"
    master_weights: bool = False
    recompute: tuple[str, ...] = ()
    experts: str = "k2"
    loss_chunk_tokens: int | None = 1024
    offload_optimizer: bool = False
    offload_activations: bool = False
    reduce_each_micro_batch: bool | None = None
    micro_batches_per_run: int | None = None
    imbalance: float = 1.0
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    reserve: float = 4.0
    intra_node_gbps: float = 200.0
    inter_node_gbps: float = 50.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "recompute", tuple(self.recompute))
        counts = ["micro_batch_size", "sequence_length", "batch_size", "gpus_per_node"]
        counts += [
            name for name in ("loss_chunk_tokens", "micro_batches_per_run") if getattr(self, name) is not None
        ]
        for name in counts:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: expected an integer >= 1.")
        for name in ("imbalance", "gpu_memory", "intra_node_gbps", "inter_node_gbps"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value!r}: expected a number > 0.")
        choices = {
            "dtype": ("bfloat16", "float32"),
            "optimizer": ("muon_clip", "adamw"),
            "state_dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}.")
        if unknown := sorted(set(self.recompute) - set(RECOMPUTE)):
            raise ValueError(f"recompute has {unknown}: expected some of {', '.join(RECOMPUTE)}.")


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


@dataclass(frozen=True)
class Plan:
    """Bytes of a layout, stage by stage.

    Attributes:
        advice: what would make it fit: (change, bytes it saves on the fullest rank).
    """

    layout: Layout
    options: Options
    num_micro_batches: int
    num_parameters: int
    stages: tuple[Stage, ...]
    advice: tuple[tuple[str, int], ...] = field(default=())

    @property
    def fullest(self) -> Stage:
        """The stage whose rank holds most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def busiest(self) -> Stage:
        """The stage whose rank sends most."""
        return max(self.stages, key=lambda stage: stage.sent.total)

    @property
    def capacity(self) -> int:
        """Bytes a rank may hold."""
        return int((self.options.gpu_memory - self.options.reserve) * GIB)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.fullest.peak <= self.capacity

    @property
    def bubble(self) -> float:
        """The share of a 1F1B step in which a stage waits, if all stages take equally long."""
        length = min(self.options.micro_batches_per_run or self.num_micro_batches, self.num_micro_batches)
        return (self.layout.pipeline - 1) / (length + self.layout.pipeline - 1)

    @property
    def seconds(self) -> float:
        """A lower bound on a step's communication: bytes over bandwidth, all kinds overlapping each other perfectly."""
        options = self.options
        return max(
            max(
                stage.sent.intra / (options.intra_node_gbps * 1e9),
                stage.sent.inter / (options.inter_node_gbps * 1e9),
            )
            for stage in self.stages
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, with its verdict."""
        result = asdict(self)
        result["stages"] = [
            asdict(stage) | {"layers": list(stage.layers), "peak": stage.peak, "sent": stage.sent.total}
            for stage in self.stages
        ]
        result["options"]["recompute"] = list(self.options.recompute)
        result["advice"] = [list(entry) for entry in self.advice]
        return result | {
            "world_size": self.layout.world_size,
            "fits": self.fits,
            "peak": self.fullest.peak,
            "capacity": self.capacity,
            "bubble": self.bubble,
            "communication_seconds_at_least": self.seconds,
        }


def plan(config: KimiK2Config, layout: Layout, *, advise: bool = True, **options: Any) -> Plan:
    """Bytes per rank and on the wire of one layout.

    Args:
        advise: if it does not fit, compute what would help.
        options: fields of `Options`.

    Raises:
        ValueError: an option or the layout does not fit; or a process group is initialised.
    """
    chosen = _options(options)
    layout.check(config, layout.world_size)
    per_pass = layout.data_size * chosen.micro_batch_size
    if chosen.batch_size % per_pass:
        raise ValueError(
            f"batch_size is {chosen.batch_size}: expected a multiple of {per_pass}, {layout.data_size} data ranks times "
            f"micro_batch_size {chosen.micro_batch_size}."
        )
    length = min(chosen.micro_batches_per_run or 1, chosen.batch_size // per_pass)
    if chosen.batch_size // per_pass % length:
        raise ValueError(
            f"micro_batches_per_run is {chosen.micro_batches_per_run}: expected a divisor of the "
            f"{chosen.batch_size // per_pass} micro-batches of a step."
        )
    stages = tuple(_stage(config, layout, chosen, number) for number in range(layout.pipeline))
    result = Plan(
        layout=layout,
        options=chosen,
        num_micro_batches=chosen.batch_size // per_pass,
        num_parameters=sum(stage.num_parameters for stage in stages),
        stages=stages,
    )
    if advise and not result.fits:
        result = dataclasses.replace(result, advice=tuple(_advice(config, result)))
    return result


def plan_nodes(
    source: str, nodes: Sequence[int], sizes: Mapping[str, int], *, gpus_per_node: int = 8, **options: Any
) -> dict[int, list[Plan]]:
    """What `k2 plan` prints: for each number of nodes, the layout asked for, or the best ones.

    Args:
        source: see `load_config`.
        sizes: fields of `Layout`; the copies follow from the number of GPUs. Empty: search.
        options: fields of `Options`.

    Raises:
        ValueError: a layout or an option that does not fit.
    """
    config = load_config(source)
    options["gpus_per_node"] = gpus_per_node
    found: dict[int, list[Plan]] = {}
    for number in nodes:
        num_gpus = number * gpus_per_node
        if not sizes:
            found[number] = search(config, num_gpus, **options)
            continue
        held = Layout(**({"shard": sizes.get("expert", 1)} | dict(sizes)))
        if "replicate" not in sizes and num_gpus % held.world_size == 0:
            held = dataclasses.replace(held, replicate=num_gpus // held.world_size)
        if held.world_size != num_gpus:
            raise ValueError(
                f"The layout pipeline {held.pipeline} x replicate {held.replicate} x shard {held.shard} has "
                f"{held.world_size} ranks: expected {number} nodes x {gpus_per_node} GPUs = {num_gpus}."
            )
        found[number] = [plan(config, held, **options)]
    return found


def search(
    config: KimiK2Config, num_gpus: int, *, keep: int = 4, tries: int = 6, **options: Any
) -> list[Plan]:
    """The best layouts for a number of GPUs: those that fit, least bytes on the wire first, then the smallest others.

    Candidates are ordered by an estimate of their traffic; the first `tries` whose states can fit are planned.

    Raises:
        ValueError: no layout at all divides the experts, the ranks and the batch.
    """
    chosen = _options(options)
    candidates = sorted(_candidates(config, num_gpus, chosen), key=lambda c: _estimate(config, c, chosen))
    if not candidates:
        raise ValueError(
            f"No layout of {num_gpus} GPUs divides {config.n_routed_experts} experts and a batch of "
            f"{chosen.batch_size} sequences: expected a power of two."
        )
    size = _num_parameters(config) * 8 if chosen.optimizer == "muon_clip" else _num_parameters(config) * 12
    able = [c for c in candidates if size / (c.pipeline * c.shard) < chosen.gpu_memory * GIB]
    biggest = sorted(candidates, key=lambda c: -c.pipeline * c.shard)
    plans = [plan(config, c, advise=False, **asdict(chosen)) for c in (able or biggest)[:tries]]
    plans.sort(key=lambda p: (not p.fits, p.busiest.sent.total if p.fits else p.fullest.peak))
    if not plans[0].fits:
        plans[0] = dataclasses.replace(plans[0], advice=tuple(_advice(config, plans[0])))
    return plans[:keep]


def _options(options: Mapping[str, Any]) -> Options:
    known = [entry.name for entry in dataclasses.fields(Options)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"A plan has no option {', '.join(unknown)}: expected some of {', '.join(known)}.")
    return Options(**options)


def _candidates(config: KimiK2Config, num_gpus: int, options: Options) -> Iterator[Layout]:
    for pipeline in PIPELINES:
        if num_gpus % pipeline or pipeline > config.num_hidden_layers:
            continue
        ranks = num_gpus // pipeline
        if options.batch_size % (ranks * options.micro_batch_size):
            continue
        for shard in (size for size in range(1, min(ranks, MAX_SHARD) + 1) if ranks % size == 0):
            for expert in (size for size in range(1, shard + 1) if shard % size == 0):
                if config.n_routed_experts % expert == 0:
                    yield Layout(replicate=ranks // shard, shard=shard, expert=expert, pipeline=pipeline)


def _estimate(config: Any, layout: Layout, options: Options) -> float:
    """Bytes that a rank sends in a step, roughly: only to decide which layouts are worth a plan."""
    tokens = options.batch_size * options.sequence_length / layout.data_size
    passes = 1 if layout.pipeline > 1 else 2 * tokens / options.sequence_length / options.micro_batch_size
    experts = (
        config.n_routed_experts
        * 3
        * config.hidden_size
        * config.moe_intermediate_size
        * config.num_hidden_layers
    )
    held = experts / layout.expert * (layout.shard > layout.expert)
    dense = (_num_parameters(config) - experts) * (layout.shard > 1)
    travels = 8 * tokens * config.num_experts_per_tok * config.hidden_size * config.num_hidden_layers
    return ((held + dense) * 2 * (passes + 2) + travels * (1 - 1 / layout.expert)) / layout.pipeline


@lru_cache(maxsize=8)
def _count(key: str) -> int:
    return share_of(_config(key), Layout(), 0, torch.bfloat16, False, "adamw", {}).num_parameters


def _num_parameters(config: KimiK2Config) -> int:
    return _count(_key(config))


def _key(config: KimiK2Config) -> str:
    return config.to_json_string(use_diff=False)


def _config(key: str) -> KimiK2Config:
    return KimiK2Config.from_dict(json.loads(key))


def _stage(config: Any, layout: Layout, options: Options, number: int) -> Stage:
    """Stages that hold the same kinds of layers share a measurement; they differ in rank and micro-batches in flight."""
    layers = stage_layers(config.num_hidden_layers, layout.pipeline, number)
    dense = sum(layer < config.first_k_dense_replace for layer in layers)
    alike = next(
        n for n in range(layout.pipeline) if _kind(config, layout, n) == _kind(config, layout, number)
    )
    share = _share(config, layout, options, alike)
    offset = (number - alike) * layout.data_size
    share = _moved(share, offset)
    saved = _saved(config, layout, options)
    last = number == layout.pipeline - 1
    num_micro_batches = options.batch_size // (layout.data_size * options.micro_batch_size)
    length = min(options.micro_batches_per_run or num_micro_batches, num_micro_batches)
    num_runs = math.ceil(num_micro_batches / length)
    passes = schedule(length, number, layout.pipeline)
    in_flight = min(length, layout.pipeline - number)
    each = options.reduce_each_micro_batch
    each = layout.pipeline == 1 if each is None else each
    keeps = layout.pipeline > 1 and not each
    dtype = _compute_dtype(options)
    tokens = options.micro_batch_size * options.sequence_length
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
    gathered, accumulated, buffers = _fsdp(share, keeps, each)
    rows = tokens * config.num_experts_per_tok * config.hidden_size * dtype.itemsize
    expert_rows = int(2 * rows * options.imbalance) if layout.expert > 1 and counts["moe"] else 0
    # torch's stages allocate what they receive for every micro-batch of the step.
    received = hidden * length * ((number > 0) + (not last)) if layout.pipeline > 1 else 0
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
        "communication": buffers + expert_rows + received,
        "buffers": share.buffers,
    }
    wire = wires(
        share,
        passes,
        gpus_per_node=options.gpus_per_node,
        recomputes="full" in options.recompute,
        keeps_after_backward=keeps,
        num_runs=num_runs,
        num_reductions=num_micro_batches if each else num_runs,
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


def _kind(config: Any, layout: Layout, number: int) -> tuple[int, int, bool, bool]:
    layers = stage_layers(config.num_hidden_layers, layout.pipeline, number)
    dense = sum(layer < config.first_k_dense_replace for layer in layers)
    return dense, len(layers) - dense, number == 0, number == layout.pipeline - 1


def _fsdp(share: Share, keeps: bool, each: bool) -> tuple[int, int, int]:
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
    accumulated = 0 if each else sum(group.numel * max(group.reduce, group.gather) for group in share.groups)
    flat = max((g.numel * g.gather for g in share.groups if len(g.shard_ranks) > 1), default=0)
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


def _compute_dtype(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.mixed_precision else getattr(torch, options.dtype)


def _share(config: KimiK2Config, layout: Layout, options: Options, number: int) -> Share:
    muon = {
        "state_dtype": options.state_dtype,
        "master_weights": options.master_weights,
        "ns_dtype": "bfloat16",
    }
    return _measured(
        _key(config),
        layout,
        number * layout.data_size,
        options.dtype,
        options.mixed_precision,
        options.optimizer,
        tuple(muon.items()),
    )


@lru_cache(maxsize=512)
def _measured(
    key: str,
    layout: Layout,
    rank: int,
    dtype: str,
    mixed: bool,
    optimizer: str,
    options: tuple[tuple[str, Any], ...],
) -> Share:
    config = _config(key)
    return share_of(config, layout, rank, getattr(torch, dtype), mixed, optimizer, dict(options))


def _saved(config: KimiK2Config, layout: Layout, options: Options) -> dict[str, Saved]:
    return _traced(
        _key(config),
        options.micro_batch_size,
        options.sequence_length,
        _compute_dtype(options),
        layout.expert > 1,
        options.imbalance,
        options.experts,
    )


@lru_cache(maxsize=64)
def _traced(key: str, *arguments: Any) -> dict[str, Saved]:
    return layer_activations(_config(key), *arguments)


def _moved(share: Share, offset: int) -> Share:
    """The same share on ranks further on."""

    def move(ranks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rank + offset for rank in ranks)

    groups = tuple(
        dataclasses.replace(
            group, shard_ranks=move(group.shard_ranks), replica_ranks=move(group.replica_ranks)
        )
        for group in share.groups
    )
    return dataclasses.replace(
        share,
        rank=share.rank + offset,
        groups=groups,
        data_ranks=move(share.data_ranks),
        expert_ranks=move(share.expert_ranks),
    )


def _advice(config: KimiK2Config, tight: Plan) -> Iterator[tuple[str, int]]:
    """Single changes, and what each saves on the fullest rank, largest first."""
    options, layout = tight.options, tight.layout
    changes: list[tuple[str, Layout, dict[str, Any]]] = [
        ("recompute whole layers (recompute: full)", layout, {"recompute": ("full",)}),
        ("bfloat16 momenta (state_dtype: bfloat16)", layout, {"state_dtype": "bfloat16"}),
        ("optimizer state in the host's memory (offload_optimizer)", layout, {"offload_optimizer": True}),
        ("activations in the host's memory (offload_activations)", layout, {"offload_activations": True}),
        ("logits 1,024 tokens at a time (loss_chunk_tokens)", layout, {"loss_chunk_tokens": 1024}),
    ]
    pieces = 4 * layout.pipeline
    if (
        layout.pipeline > 1
        and tight.num_micro_batches % pieces == 0
        and pieces < (options.micro_batches_per_run or tight.num_micro_batches)
    ):
        text = f"{pieces} micro-batches through the pipeline at a time (micro_batches_per_run)"
        changes.append((text, layout, {"micro_batches_per_run": pieces}))
    if (
        options.batch_size % (2 * layout.data_size * options.micro_batch_size) == 0
        and 2 * layout.shard <= MAX_SHARD
    ):
        changes.append(
            ("twice the nodes, shard doubled", dataclasses.replace(layout, shard=2 * layout.shard), {})
        )
    found = []
    for text, changed, values in changes:
        other = plan(config, changed, advise=False, **(asdict(options) | values))
        if (saves := tight.fullest.peak - other.fullest.peak) > 0:
            found.append((text + (": then it fits" if other.fits else ""), saves))
    yield from sorted(found, key=lambda entry: -entry[1])


def load_config(source: str) -> KimiK2Config:
    """The configuration of a size in configs/, a config.json or a folder that has one, without its quantisation."""
    path = Path(source) / "config.json" if Path(source).is_dir() else find("configs", source)
    config = copy.deepcopy(KimiK2Config.from_json_file(path))
    if "quantization_config" in vars(config):
        del config.quantization_config
    return config
