"""Bytes that one rank sends in a training step, by kind, and how many of them leave the node.

FSDP2's collectives follow its rules for every parameter group of the real model, replayed over the schedule of forward
and backward passes; the other kinds follow from the shapes that travel. Counted is what the best algorithm has to send
(a ring, (N - 1) / N of the whole), so the times are lower bounds. What it gives up: latency, and contention in the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .parts import Ranks, Share

KINDS = {
    "fsdp_forward": "FSDP all-gather, forward",
    "fsdp_backward": "FSDP all-gather, backward",
    "fsdp_reduce": "FSDP reduce-scatter",
    "hsdp_reduce": "copies' all-reduce",
    "expert_forward": "experts' all-to-all, forward",
    "expert_backward": "experts' all-to-all, backward",
    "pipeline": "pipeline send",
    "muon": "MuonClip matrices",
    "other": "norms, logits, loads",
}


@dataclass(frozen=True)
class Wire:
    """Bytes that a rank sends per step: within its node, and to other nodes."""

    intra: float = 0.0
    inter: float = 0.0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.intra + self.inter

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.intra + other.intra, self.inter + other.inter)


def schedule(num_micro_batches: int, stage: int, num_stages: int, kind: str = "1f1b") -> list[str]:
    """The order of forward (F) and backward (B) passes of a stage; with one stage they alternate in any schedule."""
    if kind == "gpipe" and num_stages > 1:
        return ["F"] * num_micro_batches + ["B"] * num_micro_batches
    ahead = min(num_micro_batches, num_stages - stage)
    steady = ["B", "F"] * (num_micro_batches - ahead)
    return ["F"] * ahead + steady + ["B"] * ahead


def count_gathers(keeps: bool, passes: Sequence[str], keeps_after_backward: bool) -> tuple[int, int]:
    """How often FSDP2 gathers a group in forward and in backward passes; recomputing a layer adds nothing.

    Args:
        keeps: the group stays gathered after a forward pass.
        keeps_after_backward: as torch's pipeline stages set it, until the last micro-batch of a run.
    """
    gathered, forward, backward = False, 0, 0
    for kind in passes:
        if kind == "F":
            forward += not gathered
            gathered = keeps
        else:
            backward += not gathered
            gathered = keeps_after_backward
    return forward, backward


def wires(
    share: Share,
    passes: Sequence[str],
    *,
    gpus_per_node: int,
    recomputes: bool,
    keeps_after_backward: bool,
    num_runs: int,
    num_reductions: int,
    row_bytes: int,
    tokens: int,
    top_k: int,
    num_moe_layers: int,
    num_experts: int,
    imbalance: float,
) -> dict[str, Wire]:
    """Bytes by kind that the rank of `share` sends in a step.

    Args:
        passes: the stage's forward and backward passes in one run; weights are freed between runs.
        num_runs: of the schedule in a step.
        num_reductions: how often gradients are reduced in a step.
        row_bytes: of one token's hidden state.
        tokens: of one micro-batch.
    """
    found = dict.fromkeys(KINDS, Wire())
    node = gpus_per_node
    gathers = {keeps: count_gathers(keeps, passes, keeps_after_backward) for keeps in (False, True)}
    for group, count in Counter(share.groups).items():
        whole = group.numel * count
        forward, backward = gathers[group.keeps]
        found["fsdp_forward"] += ring(whole * group.gather * forward * num_runs, group.shard_ranks, node)
        found["fsdp_backward"] += ring(whole * group.gather * backward * num_runs, group.shard_ranks, node)
        reduced = whole * group.reduce * num_reductions
        found["fsdp_reduce"] += ring(reduced, group.shard_ranks, node)
        found["hsdp_reduce"] += ring(2 * reduced / len(group.shard_ranks), group.replica_ranks, node)
    if not share.groups:  # DDP reduces copies once a step
        found["hsdp_reduce"] += ring(2 * share.gradients, share.data_ranks, node)
    num_micro_batches = passes.count("F") * num_runs
    if len(share.expert_ranks) > 1:
        rows = tokens * top_k * row_bytes * imbalance * 2  # there and back
        counts = num_experts * 8
        layer = exchange((rows + counts) * num_micro_batches * num_moe_layers, share.expert_ranks, node)
        found["expert_forward"] += layer
        found["expert_backward"] += exchange(
            rows * num_micro_batches * num_moe_layers, share.expert_ranks, node
        )
        if recomputes:
            found["expert_backward"] += layer
    found["muon"] += exchange(share.muon_sent, share.data_ranks, node, whole=False)
    small = 2 * (3 * share.num_heads * 4 + num_moe_layers * num_experts * 8 + 4)
    found["other"] += ring(small, share.data_ranks, node)
    return found


def send(num_bytes: float, source: int, target: int, gpus_per_node: int) -> Wire:
    """From one rank to another."""
    same = source // gpus_per_node == target // gpus_per_node
    return Wire(intra=num_bytes) if same else Wire(inter=num_bytes)


def ring(num_bytes: float, ranks: Ranks, gpus_per_node: int) -> Wire:
    """An all-gather to, or a reduce-scatter of, `num_bytes` on every rank.

    A node has to receive what the other nodes hold once; its ranks share that.
    """
    neighbours, nodes = _nodes(ranks, gpus_per_node)
    sent = num_bytes * (len(ranks) - 1) / len(ranks)
    inter = num_bytes * (nodes - 1) / nodes / neighbours
    return Wire(sent - inter, inter)


def exchange(num_bytes: float, ranks: Ranks, gpus_per_node: int, whole: bool = True) -> Wire:
    """An all-to-all of `num_bytes`, evenly spread; with `whole`, the part for the rank itself is among them."""
    if len(ranks) == 1:
        return Wire()
    neighbours, _ = _nodes(ranks, gpus_per_node)
    share = num_bytes / (len(ranks) if whole else len(ranks) - 1)
    return Wire(share * (neighbours - 1), share * (len(ranks) - neighbours))


def _nodes(ranks: Ranks, gpus_per_node: int) -> tuple[float, float]:
    """Ranks on a node, and nodes: evenly spread."""
    nodes = len({rank // gpus_per_node for rank in ranks})
    return len(ranks) / nodes, nodes
