"""A Trainer callback that shows what MuonClip does: every head's largest logit, the clips, the size of the updates.

The numbers go to a JSON-lines file as they come, to Trainer's logs as three scalars, and into a picture. A run that
resumes from a checkpoint continues the file: lines after the checkpoint's step are cut off, counts go on. What it gives
up: the file grows by some 30 bytes per head and step, which for 61 layers of 64 heads is 120 kB a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..optim import MuonClip
from .history import StepMaxima, layer_of
from .muon_clip_plot import plot_muon_clip
from .step_monitor import Gather, StepMonitor, log_scalars, unwrap_optimizer

LINES, PICTURE = "qk_clip.jsonl", "qk_clip.png"


@dataclass(frozen=True)
class ClipOutcome:
    """What QK-Clip did in a run. Logits are those seen before each step's clip."""

    tau: float
    num_heads: int
    peak_logit: float  # of all heads and steps
    peak_is_exact: bool  # else an upper bound: no head came above tau
    heads_clipped: int  # at least once
    heads_above_tau: int  # at the last step
    last_logit: float  # the largest of the last step, or its upper bound

    def __str__(self) -> str:
        below = self.num_heads - self.heads_above_tau
        bound = "" if self.peak_is_exact else "at most "
        return (
            f"{below} of {self.num_heads} heads below tau {self.tau:g} at the end; {self.heads_clipped} were clipped at "
            f"least once; the largest logit of the run was {bound}{self.peak_logit:.1f}"
        )


class MuonClipMonitor(StepMonitor):
    """Records and draws QK-Clip and update sizes of a Trainer whose optimizer is MuonClip.

    One JSON line per optimizer step: `step`, `tau`, `attention` {module: {`max_logit`, `exact`, `gamma`, `clips`}, each a
    list over heads} and, every `rms_every` steps, `update_rms` {layer: number}. `max_logit` is an upper bound where
    `exact` is false and null where the module did not run; `clips` counts this head's clips so far. Trainer's training
    logs get, since the log before: `max_logit`, `heads_clipped` (how many different heads), `update_rms` (the mean over
    layers of the last measurement). Skipped steps (float16 overflow) leave no line.

    Args:
        folder: gets qk_clip.jsonl and, at each evaluation and at the end, qk_clip.png.
        rms_every: how often update sizes are measured: a pass over all updates, collective over ranks.
        title: of the picture.
        gather: puts together what ranks with different layers know (`Pipeline.gather`); collective.
    """

    def __init__(
        self, folder: str | Path, rms_every: int = 10, title: str = "", gather: Gather | None = None
    ) -> None:
        if rms_every < 1:
            raise ValueError(f"rms_every is {rms_every}: expected an integer >= 1.")
        super().__init__(Path(folder) / LINES, Path(folder) / PICTURE, title, gather)
        self.rms_every = rms_every
        self._forget()

    def outcome(self) -> ClipOutcome | None:
        """The run in numbers; None if no head was watched."""
        if self._last is None or not self._heads or self._logits is None:
            return None
        last = [logit for item in self._last["attention"].values() for logit in _numbers(item["max_logit"])]
        clips = [count for counts in self._clips.values() for count in counts]
        tau = self._last["tau"]
        return ClipOutcome(
            tau=tau,
            num_heads=len(clips),
            peak_logit=self._peak[0],
            peak_is_exact=self._peak[1],
            heads_clipped=sum(count > 0 for count in clips),
            heads_above_tau=sum(logit > tau for logit in last),
            last_logit=max(last),
        )

    # -- Trainer's events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start the file, or continue it from the resumed step.

        Raises:
            ValueError: the Trainer's optimizer is not MuonClip, or the file is not from this run.
        """
        self._forget()
        self._update_rms = _muon_clip(optimizer)[0].defaults["update_rms"]
        self.begin(state)
        self._since_log, self._clipped_since_log = -math.inf, set()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        _muon_clip(optimizer)[0].track_update_rms = (state.global_step + 1) % self.rms_every == 0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        muon, skipped = _muon_clip(optimizer)
        if skipped:
            return
        rms = _layer_rms(muon) if muon.track_update_rms else {}  # collective: on every rank
        watched = muon.qk_clip_stats()
        if self.gather is not None:
            rms, watched = self.gather(rms), self.gather(watched)
        if not self.lines.is_open:
            return
        attention = {}
        for name, stats in watched.items():
            before = self._clips.get(name) or [0] * len(stats["gamma"])
            clipped = (stats["gamma"] < 1).tolist()
            attention[name] = {
                "max_logit": _written(stats["max_logit"]),
                "exact": stats["exact"].tolist(),
                "gamma": _written(stats["gamma"]),
                "clips": [count + new for count, new in zip(before, clipped, strict=True)],
            }
        # state.global_step counts this step only after the event
        line = {"step": state.global_step + 1, "tau": muon.qk_clip_tau, "attention": attention}
        if rms:
            line["update_rms"] = {layer: float(f"{value:.6g}") for layer, value in rms.items()}
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
        if logs is None or "loss" not in logs or self._last is None:
            return
        scalars: dict[str, float] = {}
        if self._heads:
            scalars |= {"max_logit": self._since_log, "heads_clipped": len(self._clipped_since_log)}
        if self._last_rms:
            scalars["update_rms"] = sum(self._last_rms.values()) / len(self._last_rms)
        log_scalars(logs, state, scalars)
        self._since_log, self._clipped_since_log = -math.inf, set()

    # -- what is remembered of the lines

    def _forget(self) -> None:
        self._heads: dict[str, int] = {}
        self._clips: dict[str, list[int]] = {}
        self._logits: StepMaxima | None = None
        self._events: StepMaxima | None = None
        self._layers: list[str] = []
        self._rms: StepMaxima | None = None
        self._last: dict[str, Any] | None = None
        self._drawn = 0  # the step that the picture shows
        self._last_rms: dict[str, float] = {}
        self._peak: tuple[float, bool] = (-math.inf, False)
        self._since_log, self._clipped_since_log = -math.inf, set[tuple[str, int]]()

    def remember(self, line: dict[str, Any]) -> None:
        step, attention = line["step"], line["attention"]
        heads = {name: len(item["clips"]) for name, item in attention.items()}
        if self._logits is None or self._events is None:
            self._heads = heads
            self._logits, self._events = StepMaxima(sum(heads.values())), StepMaxima(sum(heads.values()))
        elif heads != self._heads:
            raise ValueError(
                f"{self.lines.path} has lines of {len(self._heads)} attention modules, {sum(self._heads.values())} heads, "
                f"but the optimizer watches {len(heads)}, {sum(heads.values())} heads: expected the same run; choose "
                "another folder."
            )
        logits: list[float] = []
        events: list[float] = []
        for name, item in attention.items():
            values = _numbers(item["max_logit"])
            before = self._clips.get(name) or [0] * len(values)
            clipped = [now > then for now, then in zip(item["clips"], before, strict=True)]
            self._clipped_since_log |= {(name, head) for head, new in enumerate(clipped) if new}
            self._clips[name] = item["clips"]
            self._peak = max(self._peak, *zip(values, item["exact"], strict=True))
            logits += values
            events += clipped
        if logits:
            self._since_log = max(self._since_log, *logits)
            self._logits.add(step, logits)
            self._events.add(step, events)
        if rms := line.get("update_rms"):
            self._layers = list(rms)
            self._rms = self._rms or StepMaxima(len(rms))
            self._rms.add(step, list(rms.values()))
            self._last_rms = rms
        self._last = line

    def draw(self) -> None:
        if self._last is None or self._logits is None or self._events is None:
            return
        if self._drawn == self._last["step"]:  # the last evaluation and the end show the same
            return
        self._drawn = self._last["step"]
        plot_muon_clip(
            self.picture,
            self._heads,
            self._logits,
            self._events,
            self._last["tau"],
            self._layers,
            self._rms or StepMaxima(1),
            self._update_rms,
            self.title,
        )


def _muon_clip(optimizer: Any) -> tuple[MuonClip, bool]:
    """The MuonClip that Accelerate may have wrapped, and whether the last step was skipped."""
    optimizer, skipped = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, MuonClip):
        raise ValueError(
            f"MuonClipMonitor watches MuonClip, but the Trainer's optimizer is {type(optimizer).__name__}: expected "
            "Trainer(optimizer_cls_and_kwargs=muon_clip(lr=...))."
        )
    return optimizer, skipped


def _layer_rms(muon: MuonClip) -> dict[str, float]:
    """RMS of the last update over all of a layer's Muon parameters together."""
    sizes = {
        name: parameter.numel()
        for group in muon.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    sums: dict[str, tuple[float, int]] = {}
    for name, rms in muon.update_rms().items():
        total, count = sums.get(layer_of(name), (0.0, 0))
        sums[layer_of(name)] = total + rms**2 * sizes[name], count + sizes[name]
    ordered = sorted(sums, key=lambda layer: [part.zfill(6) for part in layer.split(".")])
    return {layer: math.sqrt(sums[layer][0] / sums[layer][1]) for layer in ordered}


def _written(values: Tensor) -> list[float | None]:
    """float32 in the digits that tell it from its neighbours; null for -inf, which JSON lacks."""
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]


def _numbers(values: list[float | None]) -> list[float]:
    return [-math.inf if value is None else value for value in values]
