"""Trainer callbacks of a recipe run; each also serves a Trainer that someone builds by hand."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NonFiniteLossError(ValueError):
    """The loss or the gradient norm became infinite or NaN."""


class Metrics(TrainerCallback):
    """Keeps the losses, writes them to a JSON-lines file as they come, and stops a run whose numbers are not finite.

    Trainer must log every step (`logging_steps=1`) and must not filter (`logging_nan_inf_filter=False`).

    Args:
        path: the file to write. Training lines have step, tokens, loss, grad_norm, learning_rate and seconds (of
            training, evaluations excluded); evaluation lines have step, tokens and held_out_loss.
        tokens_per_step: how many tokens an optimizer step reads.
    """

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.training: list[tuple[int, float]] = []  # step, loss
        self.held_out: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._started = 0.0
        self._file: TextIO | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._file = self.path.open("w", encoding="utf-8", buffering=1)

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
            numbers = {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate") if key in logs}
            self._write({**line, **numbers, "seconds": round(self.seconds, 3)})
            self._demand_finite(state.global_step, numbers)
            self.training.append((state.global_step, numbers["loss"]))
        elif "eval_loss" in logs:
            self._write({**line, "held_out_loss": float(logs["eval_loss"])})
            self._demand_finite(state.global_step, {"held-out loss": float(logs["eval_loss"])})
            self.held_out.append((state.global_step, float(logs["eval_loss"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        finite = {key: value if math.isfinite(value) else str(value) for key, value in line.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def _demand_finite(self, step: int, numbers: dict[str, float]) -> None:
        bad = [f"{key} {value}" for key, value in numbers.items() if not math.isfinite(value)]
        if bad:
            rate = f" at learning rate {numbers['learning_rate']:.3g}" if "learning_rate" in numbers else ""
            last = (
                f"the last finite loss was {self.training[-1][1]:.4f}"
                if self.training
                else "no step was finite"
            )
            raise NonFiniteLossError(
                f"Training stopped at step {step}{rate}: {', '.join(bad)}; {last}. Try a lower optimizer.lr or a "
                f"longer schedule.warmup; the metrics are in {self.path}."
            )


class ProgressBar(TrainerCallback):
    """A rich progress bar over the steps, and one printed line per evaluation."""

    def __init__(self, progress: Progress, metrics: Metrics) -> None:
        self.progress = progress
        self.metrics = metrics
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = self.progress.add_task("Training", total=state.max_steps, note="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._training is not None and logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}, {self._speed(state):,.0f} tokens/s"
            self.progress.update(self._training, completed=state.global_step, note=note)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._evaluation is None:
            self._evaluation = self.progress.add_task("Held-out loss", total=len(eval_dataloader), note="")
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
