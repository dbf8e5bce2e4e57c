"""What a plan assumes about a training run and its machines, as far as memory and traffic depend on it.

Every value is checked here, because a plan that quietly ignores a misspelt option is worse than none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .activations import RECOMPUTE


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
        frozen: only an adapter trains: no gradients, no states, nothing of either on the wire. Its own are not counted.
        schedule: of pipeline stages, `1f1b` or `gpipe`, which keeps the activations of all micro-batches of a run.
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
    frozen: bool = False
    schedule: str = "1f1b"
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
            "schedule": ("1f1b", "gpipe"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}.")
        if unknown := sorted(set(self.recompute) - set(RECOMPUTE)):
            raise ValueError(f"recompute has {unknown}: expected some of {', '.join(RECOMPUTE)}.")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations and of gathered weights."""
        return torch.bfloat16 if self.mixed_precision else getattr(torch, self.dtype)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch_size * self.sequence_length


def make_options(options: Mapping[str, Any]) -> Options:
    """Options by name.

    Raises:
        ValueError: an unknown name, or a value that does not fit.
    """
    known = [entry.name for entry in dataclasses.fields(Options)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"A plan has no option {', '.join(unknown)}: expected some of {', '.join(known)}.")
    return Options(**options)
