"""A plan for the terminal and as a picture: what fills a rank, what it sends, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import replacing
from .planner import GIB, Plan
from .traffic import KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(plans: Sequence[Plan]) -> RenderableType:
    """The first plan in full; the others, the next best layouts, one line each."""
    from rich.console import Group
    from rich.text import Text

    best = plans[0]
    blocks: list[RenderableType] = [_facts(best), _memory(best), _wires(best), _verdict(best)]
    if len(plans) > 1:
        blocks += [
            Text("Layouts compared", style="bold"),
            _lines([(short_name(plan), plan) for plan in plans]),
        ]
    return Group(*blocks)


def render_sweep(found: Mapping[int, Sequence[Plan]]) -> RenderableType:
    """The best plan for each number of nodes."""
    return _lines([(f"{nodes} nodes", plans[0]) for nodes, plans in found.items()])


def plot_sweep(found: Mapping[int, Sequence[Plan]], path: str | Path) -> None:
    """Two panels, PNG: what the fullest rank holds, and what the busiest sends, by number of nodes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    plans = [entry[0] for entry in found.values()]
    names = [f"{nodes}\n{short_name(plan)}" for nodes, plan in zip(found, plans, strict=True)]
    memory = [{name: size / GIB for name, size in plan.fullest.memory.items()} for plan in plans]
    wire = [{name: one.total / 1e9 for name, one in plan.busiest.wire.items()} for plan in plans]
    for axes, columns in ((left, memory), (right, wire)):
        bottom = [0.0] * len(columns)
        for name in columns[0]:
            heights = [column[name] for column in columns]
            if max(heights) > 0.001 * max(sum(column.values()) for column in columns):
                axes.bar(names, heights, bottom=bottom, label=KINDS.get(name, name))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set_xlabel("nodes, and the layout chosen")
        axes.tick_params(axis="x", labelsize=7)
        axes.legend(fontsize=7)
    left.axhline(plans[0].capacity / GIB, color="black", linestyle="--", linewidth=1)
    left.set_ylabel("GiB on the fullest rank (dashed: what there is)")
    right.set_ylabel("GB sent per step by the busiest rank")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


_NAMES = ("", "layout", "fits")


def short_name(plan: Plan) -> str:
    """A layout in few letters: PP16 EP16 shard 16 x8."""
    layout = plan.layout
    return f"PP{layout.pipeline} EP{layout.expert} shard {layout.shard} x{layout.replicate}"


def _facts(plan: Plan) -> RenderableType:
    from rich.table import Table

    layout, options = plan.layout, plan.options
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    tokens = options.batch_size * options.sequence_length
    recompute = ", ".join(options.recompute) or "nothing"
    facts = {
        "GPUs": f"{layout.world_size:,} = pipeline {layout.pipeline} x replicate {layout.replicate} x shard {layout.shard}; "
        f"experts dealt out over {layout.expert}",
        "parameters": f"{plan.num_parameters:,} over all ranks",
        "step": f"{options.batch_size:,} x {options.sequence_length:,} = {tokens:,} tokens, {plan.num_micro_batches:,} "
        f"micro-batches of {options.micro_batch_size}",
        "kept": f"{options.optimizer}, momenta {options.state_dtype}; weights {options.dtype}; recomputed: {recompute}",
    }
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _memory(plan: Plan) -> RenderableType:
    from rich.table import Table

    stages = _distinct(plan)
    table = Table(box=None, padding=(0, 1), title="GiB on the first rank of a stage", title_justify="left")
    table.add_column("")
    for number in stages:
        first, stop = plan.stages[number].layers
        table.add_column(f"stage {number}\n{first}-{stop - 1}", justify="right")
    for kind in plan.stages[0].memory:
        sizes = [plan.stages[number].memory[kind] for number in stages]
        if any(sizes):
            table.add_row(kind, *(f"{size / GIB:,.2f}" for size in sizes))
    table.add_section()
    table.add_row(
        "passes", *(f"{sum(plan.stages[n].memory.values()) / GIB:,.2f}" for n in stages), style="bold"
    )
    table.add_row("optimizer step", *(f"{plan.stages[n].step_peak / GIB:,.2f}" for n in stages), style="bold")
    if any(plan.stages[number].host for number in stages):
        table.add_row("on the host", *(f"{plan.stages[n].host / GIB:,.2f}" for n in stages))
    table.add_row("micro-batches kept", *(str(plan.stages[n].in_flight) for n in stages))
    return table


def _wires(plan: Plan) -> RenderableType:
    from rich.table import Table

    stages = _distinct(plan)
    table = Table(
        box=None, padding=(0, 1), title="GB sent per step (of these to other nodes)", title_justify="left"
    )
    table.add_column("")
    for number in stages:
        table.add_column(f"stage {number}", justify="right")
    for kind, told in KINDS.items():
        wires = [plan.stages[number].wire[kind] for number in stages]
        if any(wire.total for wire in wires):
            table.add_row(told, *(f"{wire.total / 1e9:,.2f} ({wire.inter / 1e9:,.2f})" for wire in wires))
    table.add_section()
    sent = [plan.stages[number].sent for number in stages]
    table.add_row(
        "all", *(f"{wire.total / 1e9:,.2f} ({wire.inter / 1e9:,.2f})" for wire in sent), style="bold"
    )
    return table


def _verdict(plan: Plan) -> RenderableType:
    from rich.text import Text

    options = plan.options
    peak, capacity = plan.fullest.peak / GIB, plan.capacity / GIB
    of = f"{peak:,.1f} of {capacity:,.1f} GiB ({options.gpu_memory:g} less {options.reserve:g} assumed for the rest)"
    text = Text("Fits: " if plan.fits else "Does not fit: ", style="bold green" if plan.fits else "bold red")
    text.append(of + ".\n", style="none")
    for one in plan.advice:
        then = "; then it fits" if one.fits else ""
        text.append(f"  {one.saves / GIB:7.1f} GiB less{then}: {one.change}\n", style="none")
    for note in plan.notes:
        text.append(f"{note}\n", style="none")
    text.append(
        f"Communication takes at least {plan.seconds:,.1f} s a step at {options.intra_node_gbps:g} GB/s within and "
        f"{options.inter_node_gbps:g} GB/s between nodes; the pipeline waits at least {plan.bubble:.1%}.",
        style="dim",
    )
    return text


def _lines(entries: Sequence[tuple[str, Plan]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in (
        "",
        "layout",
        "fits",
        "peak\nGiB",
        "states\nGiB",
        "GB\nsent",
        "out of\nnode",
        "sec.\n>=",
        "bubble",
    ):
        table.add_column(name, no_wrap=True, justify="left" if name in _NAMES else "right")
    for name, plan in entries:
        memory = plan.fullest.memory
        states = sum(memory[kind] for kind in ("weights", "gradients", "optimizer"))
        sent = plan.busiest.sent
        table.add_row(
            name if name != short_name(plan) else "",
            short_name(plan),
            "yes" if plan.fits else "no",
            f"{plan.fullest.peak / GIB:,.1f}",
            f"{states / GIB:,.1f}",
            f"{sent.total / 1e9:,.0f}",
            f"{sent.inter / 1e9:,.0f}",
            f"{plan.seconds:,.1f}",
            f"{plan.bubble:.1%}",
        )
    return table


def _distinct(plan: Plan) -> list[int]:
    """The first stage, the fullest, the busiest and the last: at most four columns."""
    chosen = {0, len(plan.stages) - 1, plan.stages.index(plan.fullest), plan.stages.index(plan.busiest)}
    return sorted(chosen)
