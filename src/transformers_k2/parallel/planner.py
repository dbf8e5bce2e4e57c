"""Does a model fit, and what will it send? Bytes per rank and per step, computed from the layout that training builds.

`plan` measures one layer of each kind as the first rank of a stage holds it (share.py), traces what layers keep
(activations.py) and counts what travels (traffic.py), stage by stage. Nothing is predicted about speed: times are bytes
over bandwidth, a lower bound. What it gives up: the allocator's fragmentation, CUDA's context and NCCL's buffers are one
number, `reserve`.

Held against K2's report (arXiv 2507.20534, section 2.4: 16 stages x 16-way expert parallelism, ZeRO-1, bfloat16 weights,
float32 gradients, about 30 GB of states on a GPU whatever the number of nodes): weights while they are gathered (9.0 GiB)
and unreduced gradients (18.0) are 27.0 GiB = 29 GB on the fullest GPU, and do not depend on it either. FSDP2 adds a rank's
shards of weights and of optimizer states: 3.0 GiB on 256 nodes, where the sum is 32 GB, but 23.8 on 32 nodes (256 GPUs),
where the report moves optimizer states to the host, and ZeRO-1 keeps no second copy of weights.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..configuration_kimi_k2 import KimiK2Config
from ..resources import find
from .activations import Saved, layer_activations
from .layout import Layout, stage_layers
from .parts import Part, Share, add_up, estimate
from .plan_options import Options, make_options
from .plan_stage import Stage, plan_stage
from .share import Kinds, layer_kinds

GIB = 2**30


@dataclass(frozen=True)
class Advice:
    """Changes that would help: another layout, other options, and whether the plan fits with them.

    Attributes:
        change: in words.
        saves: bytes on the fullest rank.
    """

    change: str
    saves: int
    fits: bool
    layout: Layout
    options: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Bytes of a layout, stage by stage.

    Attributes:
        advice: what would make it fit, or come nearer; see plan_search.py.
        notes: what the numbers leave out.
    """

    layout: Layout
    options: Options
    num_micro_batches: int
    num_parameters: int
    stages: tuple[Stage, ...]
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()

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
        return result | {
            "world_size": self.layout.world_size,
            "fits": self.fits,
            "peak": self.fullest.peak,
            "capacity": self.capacity,
            "bubble": self.bubble,
            "communication_seconds_at_least": self.seconds,
        }


def plan(config: KimiK2Config, layout: Layout, **options: Any) -> Plan:
    """Bytes per rank and on the wire of one layout.

    Args:
        options: fields of `Options`.

    Raises:
        ValueError: an option or the layout does not fit; or a process group is initialised.
    """
    chosen = make_options(options)
    check(config, layout, chosen)
    kinds = _kinds(config, layout, chosen)
    shares: dict[tuple[int, ...], Share] = {}
    stages = []
    for number in range(layout.pipeline):
        kind = stage_kind(config, layout, number)
        if kind not in shares:
            shares[kind] = add_up(kinds.stage(*kind), layout, 0)
        stages.append(_stage(config, layout, chosen, number, shares[kind]))
    return _plan(layout, chosen, stages)


def estimated(config: KimiK2Config, layout: Layout, options: Options) -> Plan:
    """As `plan`, from one rank's measurement for all layouts: the first two stages and the last, cut evenly.

    Raises:
        ValueError: as `plan`.
    """
    check(config, layout, options)
    kinds = _kinds(config, Layout(), options)
    reduce = 4 if options.mixed_precision else options.compute_dtype.itemsize
    stages = []
    for number in sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1}):
        parts: list[Part] = kinds.stage(*stage_kind(config, layout, number))
        is_last = number == layout.pipeline - 1
        share = estimate(parts, layout, is_last, options.compute_dtype.itemsize, reduce)
        stages.append(_stage(config, layout, options, number, share))
    return _plan(layout, options, stages)


def check(config: KimiK2Config, layout: Layout, options: Options) -> None:
    """Whether layers, experts and rows divide.

    Raises:
        ValueError: they do not; what would is named.
    """
    layout.check(config, layout.world_size)
    per_pass = layout.data_size * options.micro_batch_size
    if options.batch_size % per_pass:
        raise ValueError(
            f"batch_size is {options.batch_size}: expected a multiple of {per_pass}, {layout.data_size} data ranks times "
            f"micro_batch_size {options.micro_batch_size}."
        )
    num_micro_batches = options.batch_size // per_pass
    length = min(options.micro_batches_per_run or 1, num_micro_batches)
    if num_micro_batches % length:
        raise ValueError(
            f"micro_batches_per_run is {options.micro_batches_per_run}: expected a divisor of the {num_micro_batches} "
            "micro-batches of a step."
        )


def stage_kind(config: Any, layout: Layout, number: int) -> tuple[int, int, bool, bool]:
    """Dense layers, MoE layers, is it the first, the last: stages of one kind hold the same."""
    layers = stage_layers(config.num_hidden_layers, layout.pipeline, number)
    dense = sum(layer < config.first_k_dense_replace for layer in layers)
    return dense, len(layers) - dense, number == 0, number == layout.pipeline - 1


def load_config(source: str) -> KimiK2Config:
    """The configuration of a size in configs/, a config.json or a folder that has one, without its quantisation."""
    path = Path(source) / "config.json" if Path(source).is_dir() else find("configs", source)
    config = copy.deepcopy(KimiK2Config.from_json_file(path))
    if "quantization_config" in vars(config):
        del config.quantization_config
    return config


def _plan(layout: Layout, options: Options, stages: list[Stage]) -> Plan:
    return Plan(
        layout=layout,
        options=options,
        num_micro_batches=options.batch_size // (layout.data_size * options.micro_batch_size),
        num_parameters=sum(stage.num_parameters for stage in stages),
        stages=tuple(stages),
    )


def _stage(config: KimiK2Config, layout: Layout, options: Options, number: int, share: Share) -> Stage:
    saved = _traced(
        _key(config),
        options.micro_batch_size,
        options.sequence_length,
        options.compute_dtype,
        layout.expert > 1,
        options.imbalance,
        options.experts,
    )
    return plan_stage(config, layout, options, number, share.moved(number * layout.data_size), saved)


@lru_cache(maxsize=64)
def _traced(key: str, *arguments: Any) -> dict[str, Saved]:
    return layer_activations(_config(key), *arguments)


def _kinds(config: KimiK2Config, layout: Layout, options: Options) -> Kinds:
    # Plans for all numbers of stages share the measurement.
    alike = dataclasses.replace(layout, pipeline=min(layout.pipeline, 2) if layout.shard == 1 else 1)
    muon = {
        "state_dtype": options.state_dtype,
        "master_weights": options.master_weights,
        "ns_dtype": "bfloat16",
    }
    return _measured(
        _key(config), alike, options.dtype, options.mixed_precision, options.optimizer, tuple(muon.items())
    )


@lru_cache(maxsize=256)
def _measured(
    key: str, layout: Layout, dtype: str, mixed: bool, optimizer: str, options: tuple[tuple[str, Any], ...]
) -> Kinds:
    return layer_kinds(_config(key), layout, getattr(torch, dtype), mixed, optimizer, dict(options))


def _key(config: KimiK2Config) -> str:
    return config.to_json_string(use_diff=False)


def _config(key: str) -> KimiK2Config:
    return KimiK2Config.from_dict(json.loads(key))
