"""A Trainer callback that runs `RouterBalance` after each step and shows how evenly the experts are loaded.

The numbers go to a JSON-lines file as they come, to Trainer's logs as scalars, and into a picture. A run that resumes
from a checkpoint continues the file: lines after the checkpoint's step are cut off. What it gives up: the file grows by
some 6 bytes per expert and step, which for 60 layers of 384 experts is 140 kB a step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..files import replacing
from ..moe import RouterBalance
from .history import StepMaxima, short_name
from .step_monitor import Gather, StepMonitor, log_scalars, unwrap_optimizer

LINES, PICTURE = "expert_load.jsonl", "expert_load.png"
WINDOW = 0.05  # the share of the run's steps that its end is judged by
MAX_COUNTED = 256  # steps of that window whose loads are kept: 47 MB for 60 layers of 384 experts
_GREY = "#525252"


@dataclass(frozen=True)
class LoadOutcome:
    """How evenly the experts were loaded in the last 5% of a run's steps. Loads are relative to an even one."""

    num_steps: int  # in that window
    max_over_mean: float  # a layer's fullest expert, averaged over layers and steps
    worst_layer: str
    worst_max_over_mean: float  # that layer's average over steps
    num_dead: int  # (layer, expert) pairs without a token in the window's last 256 steps
    num_experts: int  # pairs in all

    def __str__(self) -> str:
        return (
            f"in the last {self.num_steps} steps the fullest expert of a layer had {self.max_over_mean:.2f} times the "
            f"mean load ({self.worst_max_over_mean:.2f} in {self.worst_layer}); {self.num_dead} of {self.num_experts} "
            "experts had no token"
        )


class ExpertLoadMonitor(StepMonitor):
    """Updates the routers' bias after each optimizer step; records and draws the loads.

    One JSON line per optimizer step: `step`, `frozen` (the bias did not move), `balance_loss` (the sum over layers, as
    it entered the gradient), `layers` {router: {`max_over_mean`, `dead`, `counts` [experts]}}. Trainer's training logs
    get, of the steps since the log before: `load_max_over_mean` (averaged over steps and layers), `dead_experts` (pairs
    of layer and expert that got no token in any of them) and, if there is one, `balance_loss` (averaged over steps).
    Skipped steps (float16 overflow) and steps without a token leave no line and move no bias.

    Args:
        balance: hooked into the model that trains. It stays open after the run.
        folder: gets expert_load.jsonl and, at each evaluation and at the end, expert_load.png.
        freeze_after: the bias moves up to and including this step; None: always.
        title: of the picture.
        gather: puts together what ranks with different layers know (`Pipeline.gather`); collective.
    """

    def __init__(
        self,
        balance: RouterBalance,
        folder: str | Path,
        freeze_after: int | None = None,
        title: str = "",
        gather: Gather | None = None,
    ) -> None:
        if freeze_after is not None and freeze_after < 0:
            raise ValueError(f"freeze_after is {freeze_after}: expected an integer >= 0, or None.")
        super().__init__(Path(folder) / LINES, Path(folder) / PICTURE, title, gather)
        self.balance = balance
        self.freeze_after = freeze_after
        self._forget(1)

    def outcome(self) -> LoadOutcome | None:
        """The end of the run in numbers, on rank 0; None if there was no step or no router."""
        if not self._ratios or not self._layers:
            return None
        by_layer = np.mean(self._ratios, axis=0)
        worst = int(by_layer.argmax())
        counts = np.sum(self._counts, axis=0)
        return LoadOutcome(
            num_steps=len(self._ratios),
            max_over_mean=float(by_layer.mean()),
            worst_layer=self._layers[worst],
            worst_max_over_mean=float(by_layer[worst]),
            num_dead=int((counts == 0).sum()),
            num_experts=counts.size,
        )

    # -- Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.balance.reset()
        self._forget(max(1, math.ceil(WINDOW * state.max_steps)))
        self.begin(state)
        self._forget_log()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if unwrap_optimizer(optimizer)[1]:
            self.balance.reset()
            return
        step = state.global_step + 1  # it is counted only after the event
        if self.freeze_after is not None:
            self.balance.frozen = step > self.freeze_after
        stats = self.balance.update()  # collective: on every rank
        if self.gather is not None:
            stats = self.gather(stats)
        if not self.lines.is_open or not any(load.loads.any() for load in stats.values()):
            return
        line = {
            "step": step,
            "frozen": self.balance.frozen or not self.balance.bias_update_speed,
            "balance_loss": sum(load.balance_loss for load in stats.values()),
            "layers": {
                name: {
                    "max_over_mean": float(f"{load.max_over_mean:.6g}"),
                    "dead": load.num_dead,
                    "counts": load.loads.tolist(),
                }
                for name, load in stats.items()
            },
        }
        self.remember(line)
        self.lines.write(line)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._losses:
            return
        scalars: dict[str, float] = {
            "load_max_over_mean": float(np.mean(self._ratios_since)),
            "dead_experts": int((self._counts_since == 0).sum()),
        }
        if self.balance.balance_loss:
            scalars["balance_loss"] = float(np.mean(self._losses))
        log_scalars(logs, state, scalars)
        self._forget_log()

    # -- what is remembered of the lines

    def _forget(self, window: int) -> None:
        self._layers: list[str] = []
        self._shape: tuple[int, ...] = ()
        self._ratios: deque[npt.NDArray[Any]] = deque(maxlen=window)  # of [layers], one per step
        self._counts: deque[npt.NDArray[Any]] = deque(maxlen=min(window, MAX_COUNTED))  # of [layers, experts]
        self._history = StepMaxima(1)
        self._last_step = self._drawn = 0
        self._forget_log()

    def _forget_log(self) -> None:
        self._losses: list[float] = []
        self._ratios_since: list[float] = []
        self._counts_since: Any = 0

    def remember(self, line: dict[str, Any]) -> None:
        layers = list(line["layers"])
        counts = np.array([layer["counts"] for layer in line["layers"].values()])
        if not self._layers:
            self._layers, self._shape = layers, counts.shape
            self._history = StepMaxima(len(layers))
        elif (layers, counts.shape) != (self._layers, self._shape):
            raise ValueError(
                f"{self.lines.path} has lines of {len(self._layers)} routers, {list(self._shape)} experts in all, but the "
                f"model has {len(layers)}, {list(counts.shape)}: expected the same run; choose another folder."
            )
        ratios = counts.max(1) / counts.mean(1)
        self._ratios.append(ratios)
        self._counts.append(counts)
        self._history.add(line["step"], ratios)
        self._losses.append(line["balance_loss"])
        self._ratios_since.append(float(ratios.mean()))
        self._counts_since = self._counts_since + counts
        self._last_step = line["step"]

    def draw(self) -> None:
        if not self._layers or self._drawn == self._last_step:
            return
        self._drawn = self._last_step
        counts = np.sum(self._counts, axis=0)
        shares = counts / counts.mean(1, keepdims=True)
        plot_expert_load(self.picture, shares, self._layers, self._history, len(self._counts), self.title)


def plot_expert_load(
    path: Path,
    shares: npt.NDArray[Any],
    layers: Sequence[str],
    history: StepMaxima,
    num_steps: int,
    title: str = "",
) -> None:
    """Draw the loads as PNG; the file changes all at once.

    Args:
        shares: each expert's load relative to an even one [layers, experts], over the last `num_steps` steps.
        layers: the routers' names.
        history: max/mean of each layer over the steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    tall = min(max(0.26 * len(layers), 1.2), 6.0)
    figure = Figure(figsize=(11, tall + 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[tall, 2.0])
    if title:
        figure.suptitle(title, fontsize=12)

    colours = LogNorm(
        1 / 4, 4, clip=True
    )  # white is an even load; at a quarter and at four times it colours end
    image = above.imshow(
        np.ma.masked_equal(shares, 0), cmap="RdBu_r", norm=colours, aspect="auto", interpolation="nearest"
    )
    above.set_facecolor("black")
    every = -(-len(layers) // 16)
    above.set_yticks(range(0, len(layers), every), [short_name(name) for name in layers][::every])
    above.set_ylabel("layer")
    above.set_xlabel("expert")
    above.set_title(
        f"load of each expert, 1 = even, over {num_steps} step{'s' * (num_steps > 1)}; black: no token",
        loc="left",
        fontsize=9,
        color=_GREY,
    )
    bar = figure.colorbar(image, ax=above, extend="both", pad=0.01)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()

    seen = np.isfinite(history.values).all(0)
    values, steps = history.values[:, seen], history.steps[seen]
    below.fill_between(steps, values.min(0), values.max(0), color="#c6dbef", linewidth=0, label="all layers")
    below.plot(steps, values.mean(0), color="#08519c", linewidth=1.3, label="mean over layers")
    below.axhline(1, color=_GREY, linestyle="--", linewidth=1)
    below.set_ylabel("fullest expert\n/ mean load")
    below.set_xlabel("Step")
    below.set_xlim(0.5, history.used * history.width + 0.5)
    below.set_ylim(bottom=0.9)
    below.grid(alpha=0.25)
    below.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.97))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
