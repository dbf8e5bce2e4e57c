"""Trainer callbacks of a recipe run; each also serves a Trainer that someone builds by hand."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..quantization.qat import QATSchedule, set_rounding, settings
from .errors import NonFiniteLossError
from .machine import StopSignal
from .step_monitor import StepLines


class Metrics(TrainerCallback):
    """Keeps the losses, writes them to a JSON-lines file as they come, and stops a run whose numbers are not finite.

    Trainer must log every step (`logging_steps=1`) and must not filter (`logging_nan_inf_filter=False`). A resumed run
    continues the file; lines after the checkpoint's step are cut off. Only rank 0 writes; every rank checks.

    Args:
        path: the file to write. Training lines have step, tokens, loss, grad_norm, learning_rate, seconds (of training,
            evaluations and checkpoints excluded), tokens_per_second and what monitors add; evaluation lines have step,
            tokens and held_out_loss.
        tokens_per_step: how many tokens an optimizer step reads.
        flops_per_token: of a training step, for the MFU; None: no MFU.
        peak_flops: of all processes together, a second.
    """

    def __init__(
        self,
        path: Path,
        tokens_per_step: int,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.lines = StepLines(path, type(self).__name__)
        self.tokens_per_step = tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.training: list[tuple[int, float]] = []  # step, loss
        self.held_out: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._started = 0.0
        self._before = 0.0  # seconds at the log before

    @property
    def tokens_per_second(self) -> float:
        """Of the last step."""
        return self.tokens_per_step / max(self._last_seconds, 1e-9)

    @property
    def mfu(self) -> float | None:
        """The share of the peak that the model's arithmetic makes up in the last step; recomputation does not count."""
        if self.flops_per_token is None or self.peak_flops is None:
            return None
        return self.tokens_per_second * self.flops_per_token / self.peak_flops

    _last_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.lines.begin(state.global_step, self._take, state.is_world_process_zero)

    def _take(self, line: dict[str, Any]) -> None:
        if "held_out_loss" in line:
            self.held_out.append((line["step"], float(line["held_out_loss"])))
        else:
            self.training.append((line["step"], float(line["loss"])))
            self.seconds = self._before = line["seconds"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self._started
        if state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
        if "loss" in logs:
            numbers = {key: float(value) for key, value in logs.items() if key not in ("epoch", "step")}
            self._last_seconds, self._before = self.seconds - self._before, self.seconds
            speed = {"seconds": round(self.seconds, 3), "tokens_per_second": round(self.tokens_per_second, 1)}
            if self.mfu is not None:
                speed["mfu"] = round(self.mfu, 4)
            self._write({**line, **numbers, **speed})
            losses = {key: numbers[key] for key in ("loss", "grad_norm", "learning_rate") if key in numbers}
            self._demand_finite(state.global_step, losses)
            self.training.append((state.global_step, numbers["loss"]))
        elif "eval_loss" in logs:
            self._write({**line, "held_out_loss": float(logs["eval_loss"])})
            self._demand_finite(state.global_step, {"held-out loss": float(logs["eval_loss"])})
            self.held_out.append((state.global_step, float(logs["eval_loss"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.lines.close()

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.write({key: value if math.isfinite(value) else str(value) for key, value in line.items()})

    def _demand_finite(self, step: int, numbers: dict[str, float]) -> None:
        bad = [f"{key} {value}" for key, value in numbers.items() if not math.isfinite(value)]
        if bad:
            rate = f" at learning rate {numbers['learning_rate']:.3g}" if "learning_rate" in numbers else ""
            raise NonFiniteLossError(
                f"Training stopped at step {step}{rate}: {', '.join(bad)}; {self.advice()}"
            )

    def advice(self) -> str:
        """The end of a message about a run that diverged."""
        last = (
            f"the last finite loss was {self.training[-1][1]:.4f}" if self.training else "no step was finite"
        )
        return f"{last}. Try a lower optimizer.lr or a longer schedule.warmup; the metrics are in {self.lines.path}."


class Saver(TrainerCallback):
    """Tells Trainer when to save: every so many steps, at the last one, and before a process that was told to stop ends.

    Args:
        every: steps; None: at the end and at a signal only.
        signal: SIGTERM and SIGINT, on any rank.
    """

    def __init__(self, every: int | None, signal: StopSignal) -> None:
        self.every, self.signal = every, signal
        self.stopped_at: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = self.every is not None and state.global_step % self.every == 0
        control.should_save = due or state.global_step == state.max_steps
        if state.global_step < state.max_steps and self.signal.agreed(args.device):
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True


class QATPhases(TrainerCallback):
    """Moves a model that `prepare_qat` has prepared through the phases of its schedule.

    The phase is a function of the step, so a resumed run is in the right one. An evaluation sees the phase of the step that
    follows; after training the model rounds.
    """

    def __init__(self, model: nn.Module, schedule: QATSchedule) -> None:
        self.model, self.schedule = model, schedule
        self.weights = list(settings(model))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_rounding(self.model, self.schedule.rounds(state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule.freezes(state.global_step, state.max_steps):
            for name in self.weights:
                self.model.get_parameter(name).grad = None  # optimizers then skip it, weight decay included

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_rounding(self.model, self.schedule.rounds(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_rounding(self.model, True)


class ProgressBar(TrainerCallback):
    """A rich progress bar over the steps, and one printed line per evaluation."""

    def __init__(self, progress: Progress, metrics: Metrics, num_batches: int | None = None) -> None:
        """`num_batches`: of an evaluation; None if not known."""
        self.progress = progress
        self.metrics = metrics
        self.num_batches = num_batches
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = self.progress.add_task(
            "Training", total=state.max_steps, completed=state.global_step, note=""
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._training is not None and logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}, {self.metrics.tokens_per_second:,.0f} tokens/s"
            if self.metrics.mfu is not None:
                note += f", MFU {self.metrics.mfu:.0%}"
            if "max_logit" in logs:
                note += f", max logit {logs['max_logit']:.1f}"
            if "load_max_over_mean" in logs:
                note += f", load {logs['load_max_over_mean']:.2f}"
            self.progress.update(self._training, completed=state.global_step, note=note)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._evaluation is None:
            self._evaluation = self.progress.add_task("Held-out loss", total=self.num_batches, note="")
        self.progress.advance(self._evaluation)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluation is not None:
            self.progress.remove_task(self._evaluation)
            self._evaluation = None
        if self.metrics.held_out and self.metrics.training:
            self.progress.console.print(
                f"step {state.global_step}/{state.max_steps}: loss {self.metrics.training[-1][1]:.3f}, held-out loss "
                f"{self.metrics.held_out[-1][1]:.3f}, {self._speed(state):,.0f} tokens/s",
                highlight=False,
            )

    def _speed(self, state: TrainerState) -> float:
        return state.global_step * self.metrics.tokens_per_step / max(self.metrics.seconds, 1e-9)
