"""Which layout to take: all that divide are estimated, the most promising are planned, and what does not fit is advised.

An estimate scales one rank's measurement to a layout in a millisecond; it only decides which layouts are worth a plan.
What it gives up: layouts whose sizes are not divisors of the GPUs, and stage numbers other than powers of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..configuration_kimi_k2 import KimiK2Config
from .layout import Layout
from .plan_options import Options, make_options
from .planner import GIB, Advice, Plan, estimated, load_config, plan

PIPELINES = (1, 2, 4, 8, 16, 32)
MAX_SHARD = 512


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
        found[number] = [advised(config, plan(config, held, **options))]
    return found


def search(
    config: KimiK2Config, num_gpus: int, *, keep: int = 4, tries: int = 6, **options: Any
) -> list[Plan]:
    """The best layouts for a number of GPUs: those that fit, least bytes on the wire first, then the smallest others.

    All that divide are estimated, and the first `tries` planned.

    Raises:
        ValueError: no layout at all divides the experts, the ranks and the batch.
    """
    chosen = make_options(options)
    candidates = list(_candidates(config, num_gpus, chosen))
    if not candidates:
        raise ValueError(
            f"No layout of {num_gpus} GPUs divides {config.n_routed_experts} experts and a batch of "
            f"{chosen.batch_size} sequences: expected a power of two."
        )
    # What no estimate can save: states of a rank beyond its memory.
    num_states = estimated(config, Layout(), chosen).stages[0].memory
    size = sum(num_states[kind] for kind in ("weights", "gradients", "optimizer"))
    able = [c for c in candidates if size / (c.pipeline * c.shard) < chosen.gpu_memory * GIB]
    most = max(c.pipeline * c.shard for c in candidates)
    rough = [estimated(config, c, chosen) for c in able or candidates if able or c.pipeline * c.shard == most]
    rough.sort(key=_order)
    plans = sorted((plan(config, one.layout, **asdict(chosen)) for one in rough[:tries]), key=_order)
    return [advised(config, plans[0]), *plans[1:keep]]


def _order(one: Plan) -> tuple[bool, float, float]:
    """Those that fit by what they send; the others by what they hold, in two digits, and then by what they send."""
    sent = one.busiest.sent.total
    return (False, sent, 0) if one.fits else (True, float(f"{one.fullest.peak:.2g}"), sent)


def _candidates(config: KimiK2Config, num_gpus: int, options: Options) -> Iterator[Layout]:
    for pipeline in PIPELINES:
        if num_gpus % pipeline or pipeline > config.num_hidden_layers:
            continue
        ranks = num_gpus // pipeline
        per_pass = ranks * options.micro_batch_size
        if options.batch_size % per_pass:
            continue
        num_micro_batches = options.batch_size // per_pass
        if num_micro_batches % min(options.micro_batches_per_run or 1, num_micro_batches):
            continue
        for shard in (size for size in range(1, min(ranks, MAX_SHARD) + 1) if ranks % size == 0):
            for expert in (size for size in range(1, shard + 1) if shard % size == 0):
                if config.n_routed_experts % expert == 0:
                    yield Layout(replicate=ranks // shard, shard=shard, expert=expert, pipeline=pipeline)


def advised(config: KimiK2Config, made: Plan) -> Plan:
    """The plan, with advice if it does not fit: single changes, the largest saving first, then enough of them together."""
    if made.fits:
        return made
    changes = _changes(made)

    def tell(chosen: Sequence[tuple[str, Layout, dict[str, Any]]]) -> Advice:
        layout, values = made.layout, {}
        for _, changed, more in chosen:
            layout, values = layout if changed == made.layout else changed, values | more
        other = plan(config, layout, **(asdict(made.options) | values))
        saves = made.fullest.peak - other.fullest.peak
        return Advice("; ".join(text for text, _, _ in chosen), saves, other.fits, layout, values)

    singles = sorted(((tell([change]), change) for change in changes), key=lambda entry: -entry[0].saves)
    singles = [(one, change) for one, change in singles if one.saves > 0]
    found = [one for one, _ in singles]
    if not any(one.fits for one in found):
        for count in range(2, len(singles) + 1):
            together = tell([change for _, change in singles[:count]])
            if together.fits:
                found.append(together)
                break
    return dataclasses.replace(made, advice=tuple(found))


def _changes(tight: Plan) -> list[tuple[str, Layout, dict[str, Any]]]:
    """Changes in words, with the layout and the options that they mean."""
    options, layout = tight.options, tight.layout
    changes: list[tuple[str, Layout, dict[str, Any]]] = [
        ("recompute whole layers (recompute full)", layout, {"recompute": ("full",)}),
        ("bfloat16 momenta (state_dtype bfloat16)", layout, {"state_dtype": "bfloat16"}),
        ("activations in the host's memory (offload_activations)", layout, {"offload_activations": True}),
        ("logits 1,024 tokens at a time (loss_chunk_tokens 1024)", layout, {"loss_chunk_tokens": 1024}),
    ]
    shards = layout.shard * layout.replicate
    if layout.replicate > 1 and shards <= MAX_SHARD:
        text = f"shards in the place of copies (shard {shards})"
        changes.append((text, dataclasses.replace(layout, replicate=1, shard=shards), {}))
    pieces = 4 * layout.pipeline
    if (
        layout.pipeline > 1
        and tight.num_micro_batches % pieces == 0
        and pieces < (options.micro_batches_per_run or tight.num_micro_batches)
    ):
        text = f"{pieces} micro-batches through the pipeline at a time (micro_batches_per_run {pieces})"
        changes.append((text, layout, {"micro_batches_per_run": pieces}))
    if (
        options.batch_size % (2 * layout.data_size * options.micro_batch_size) == 0
        and 2 * layout.shard <= MAX_SHARD
    ):
        text = f"twice the nodes (shard {2 * layout.shard})"
        changes.append((text, dataclasses.replace(layout, shard=2 * layout.shard), {}))
    return changes
