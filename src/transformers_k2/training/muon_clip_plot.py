"""The picture of QK-Clip at work: every head's largest logit over the steps, the clips, and the update RMS by layer.

A run has more steps than a picture has pixels, and a large model more heads. Both are reduced by maxima, so that no
peak is lost; what that gives up is how often something happened inside one pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import replacing
from .history import Matrix, StepMaxima, short_name

MAX_ROWS = 512  # of heads in the picture
MAX_NAMED = 8  # layers with a colour of their own in the legend
_GREY, _BAD = "#525252", "#d94801"


def plot_muon_clip(
    path: Path,
    heads: Mapping[str, int],
    logits: StepMaxima,
    clips: StepMaxima,
    tau: float | None,
    layers: Sequence[str],
    rms: StepMaxima,
    update_rms: float,
    title: str = "",
) -> None:
    """Draw what was recorded, as PNG; the file changes all at once.

    Args:
        heads: attention modules and how many heads each has, in the order of the rows of `logits` and `clips` (1 where
            the head was clipped). Without any, only the update RMS is drawn.
        layers: names of the rows of `rms`.
        update_rms: what a full-rank update has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [short_name(name) for name in heads]
    image, pooled = _pool_heads(logits.values, list(heads.values()))
    tall = min(max(0.26 * len(image), 1.6), 6.2)
    inches = [tall, 0.6, 2.1] if heads and tau is not None else []
    inches += [1.7] if rms.used else []
    height = sum(inches) + 0.28 * (len(inches) - 1) + 1.1
    figure = Figure(figsize=(11, height), dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(inches),
        2,
        height_ratios=inches,
        width_ratios=[60, 1],
        left=0.085,
        right=0.9,
        bottom=0.55 / height,
        top=1 - 0.55 / height,
        hspace=0.28 * len(inches) / sum(inches),
        wspace=0.03,
    )
    last = max(logits.used * logits.width, rms.used * rms.width)
    panels = [figure.add_subplot(grid[row, 0]) for row in range(len(inches))]
    sides = [figure.add_subplot(grid[row, 1]) for row in range(len(inches))]
    for axes in panels:
        axes.set_xlim(0.5, last + 0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[-1].set_xlabel("Step")
    figure.suptitle(title, y=1 - 0.18 / height, va="top", fontsize=12)
    if heads and tau is not None:
        _draw_heads(panels[0], sides[0], image, pooled, names, list(heads.values()), logits, clips, tau)
        _draw_clips(panels[1], sides[1], clips)
        largest = _by_module(logits.values, list(heads.values()))
        _draw_lines(panels[2], sides[2], logits.steps, largest, names)
        _draw_tau(panels[2], tau, float(largest.max()))
    if rms.used:
        shown = np.isfinite(rms.values).any(0)
        short = [short_name(name) for name in layers]
        _draw_lines(panels[-1], sides[-1], rms.steps[shown], rms.values[:, shown], short)
        panels[-1].axhline(update_rms, color=_GREY, linestyle="--", linewidth=1)
        _name_line(panels[-1], f"{update_rms:g}: all singular values 1", update_rms, _GREY)
        panels[-1].set_ylabel("update RMS / lr")
        panels[-1].set_ylim(0, max(1.15 * update_rms, 1.05 * float(rms.values.max())))
    figure.align_ylabels(panels)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _by_module(values: Matrix, sizes: Sequence[int]) -> Matrix:
    """The largest over the heads of each module [modules, columns]."""
    return np.maximum.reduceat(values, np.cumsum([0, *sizes[:-1]]), axis=0)


def _pool_heads(values: Matrix, sizes: Sequence[int]) -> tuple[Matrix, int]:
    """Rows for the picture: the largest of every `pooled` heads that follow each other in one module."""
    pooled = -(-len(values) // MAX_ROWS) or 1
    if pooled == 1:
        return values, 1
    starts: list[int] = []
    first = 0
    for size in sizes:
        starts += range(first, first + size, pooled)
        first += size
    return np.maximum.reduceat(values, starts, axis=0), pooled


def _draw_heads(
    axes: Any,
    side: Any,
    image: Matrix,
    pooled: int,
    names: Sequence[str],
    sizes: Sequence[int],
    logits: StepMaxima,
    clips: StepMaxima,
    tau: float,
) -> None:
    """The heat map: blue up to tau, orange to red above, so that the border between the colours is tau."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    blues = [(0, "#f7fbff"), (0.2, "#bdd7ec"), (0.35, "#5ba3d0"), (0.5, "#08306b")]
    reds = [(0.5, "#fdb45f"), (0.7, "#f4691e"), (1, "#8b0a0a")]
    colours = LinearSegmentedColormap.from_list("tau", [*blues, *reds], N=1024)
    peak = float(image.max())
    top = min(max(peak, 1.2 * tau), 4 * tau)
    norm = TwoSlopeNorm(tau, 0, top)
    extent = (0.5, logits.used * logits.width + 0.5, len(image) - 0.5, -0.5)
    masked = np.ma.masked_invalid(image)
    axes.set_facecolor("#d9d9d9")
    picture = axes.imshow(
        masked, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest"
    )
    rows = [-(-size // pooled) for size in sizes]
    borders = np.cumsum([0, *rows]) - 0.5
    every = -(-len(names) // 16)
    axes.set_yticks(((borders[:-1] + borders[1:]) / 2)[::every], names[::every])
    if len(names) <= 16:
        axes.hlines(borders[1:-1], *extent[:2], color="white", linewidth=2)
    heads = "one row a head" if pooled == 1 else f"one row for {pooled} heads"
    axes.set_ylabel(f"layer ({heads})")
    axes.spines[:].set_visible(False)
    if len(image) <= 32 and pooled == 1:
        row, column = np.nonzero(clips.values > 0)
        axes.scatter(clips.steps[column], row, s=4, color="black", linewidths=0, zorder=3)
        axes.set_title(
            "largest logit of each head (below tau: an upper bound); dots: clipped",
            loc="left",
            fontsize=9,
            color=_GREY,
        )
    else:
        axes.set_title(
            "largest logit (below tau: an upper bound); orange to red: clipped",
            loc="left",
            fontsize=9,
            color=_GREY,
        )
    bar = axes.figure.colorbar(
        picture, cax=side, extend="max" if peak > top else "neither", spacing="proportional"
    )
    bar.set_ticks([0, tau / 2, tau, top], labels=["0", f"{tau / 2:g}", f"tau {tau:g}", f"{top:.3g}"])
    bar.ax.axhline(tau, color="black", linewidth=1.2)
    bar.outline.set_visible(False)


def _draw_clips(axes: Any, side: Any, clips: StepMaxima) -> None:
    side.axis("off")
    count = (clips.values > 0).sum(0)
    axes.bar(clips.steps, count, width=clips.width, color=_BAD, linewidth=0)
    top = max(int(count.max(initial=0)), 1)
    axes.set_ylim(0, 1.1 * top)
    axes.set_yticks([0, top])
    axes.set_ylabel("heads\nclipped")


def _draw_tau(axes: Any, tau: float, peak: float) -> None:
    axes.axhline(tau, color=_BAD, linestyle="--", linewidth=1.3)
    _name_line(axes, "tau", tau, _BAD)
    axes.set_ylabel("largest logit")
    if peak > 6 * tau:
        axes.set_yscale("symlog", linthresh=tau)
    axes.set_ylim(bottom=0)


def _name_line(axes: Any, text: str, value: float, colour: str) -> None:
    at = {"xycoords": ("axes fraction", "data"), "xytext": (4, 3), "textcoords": "offset points"}
    axes.annotate(text, (0, value), color=colour, fontsize=9, **at)


def _draw_lines(axes: Any, side: Any, steps: npt.NDArray[Any], values: Matrix, names: Sequence[str]) -> None:
    """One line per layer, dark for the first to light for the last."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = colormaps["viridis"].resampled(256)
    few = len(names) <= MAX_NAMED
    for index, (line, name) in enumerate(zip(values, names, strict=True)):
        shade = shades(0.9 * index / max(len(names) - 1, 1))
        seen = np.isfinite(line)
        axes.plot(steps[seen], line[seen], color=shade, linewidth=1.3 if few else 0.7, label=name)
    axes.grid(alpha=0.25)
    if few:
        side.axis("off")
        side.legend(
            *axes.get_legend_handles_labels(), title="layer", frameon=False, loc="upper left", borderaxespad=0
        )
        return
    numbers = Normalize(0, (len(names) - 1) / 0.9)
    bar = axes.figure.colorbar(ScalarMappable(numbers, shades), cax=side)
    ends = [0, len(names) // 2, len(names) - 1]
    bar.ax.set_ylim(0, len(names) - 1)
    bar.set_ticks(ends, labels=[names[end] for end in ends])
    bar.set_label("layer")
    bar.outline.set_visible(False)
