"""What the monitors of a run share: lines that a resumed run continues, scalars in Trainer's logs, a picture."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Gather = Callable[[dict[str, Any]], dict[str, Any]]


class StepLines:
    """A file with lines of JSON, each with its `step`, written as they come.

    Args:
        path: of the file.
        owner: who writes it, for messages.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path, self.owner = path, owner
        self._file: TextIO | None = None

    @property
    def is_open(self) -> bool:
        """Whether this process writes."""
        return self._file is not None

    def begin(self, last_step: int, take: Callable[[dict[str, Any]], None], writes: bool = True) -> None:
        """Hand the lines of a resumed run to `take`, up to the resumed step, and go on behind them.

        What comes after that step is cut off, with what a crash left half written.

        Args:
            last_step: 0 for a new run, whose file replaces one that is there.
            writes: this process writes; others only read.

        Raises:
            ValueError: a line is not JSON.
        """
        size = self._read(last_step, take) if last_step > 0 and self.path.is_file() else 0
        if not writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if size:
            os.truncate(self.path, size)
        self._file = self.path.open("a" if size else "w", encoding="utf-8", buffering=1)

    def _read(self, last_step: int, take: Callable[[dict[str, Any]], None]) -> int:
        size = 0
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    line = json.loads(text)
                except ValueError:
                    raise ValueError(
                        f"{self.path}, line {number}, is not JSON: expected lines of {self.owner}; move the file away."
                    ) from None
                if line["step"] > last_step:
                    break
                take(line)
                size += len(text)
        return size

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; nothing where another process writes."""
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            self._file.close()
            self._file = None


class StepMonitor(TrainerCallback, ABC):
    """A callback with a line per optimizer step, and a picture at each evaluation and at the end.

    Args:
        lines: the JSON-lines file.
        picture: the PNG file.
        title: of the picture.
        gather: puts together what ranks with different layers know (`Pipeline.gather`); collective.
    """

    def __init__(self, lines: Path, picture: Path, title: str, gather: Gather | None) -> None:
        self.lines = StepLines(lines, type(self).__name__)
        self.picture, self.title, self.gather = picture, title, gather

    def attach(self, trainer: Trainer) -> None:
        """Add it to a Trainer, in front of the others, so that TensorBoard and Weights & Biases log its scalars too.

        `callbacks=[monitor]` puts it behind them: then progress bars and trainer_state.json show them, those two do not.
        """
        trainer.callback_handler.callbacks.insert(0, self)

    def begin(self, state: TrainerState) -> None:
        """Start the file, or continue it from the resumed step, on rank 0.

        Raises:
            ValueError: the file is not from this run.
        """
        if state.is_world_process_zero:
            self.lines.begin(state.global_step, self.remember)

    @abstractmethod
    def remember(self, line: dict[str, Any]) -> None:
        """Take over what a line says, a new one or one of the run that is resumed."""

    @abstractmethod
    def draw(self) -> None:
        """Draw what there is into the picture, unless it shows that already."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.lines.is_open:
            self.draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.lines.is_open:
            self.draw()
        self.lines.close()


def log_scalars(logs: dict[str, float], state: TrainerState, scalars: dict[str, float]) -> None:
    """Add to what Trainer logs, and to the copy that it made before it told its callbacks."""
    logs.update(scalars)
    state.log_history[-1].update(scalars)


def unwrap_optimizer(optimizer: Any) -> tuple[Any, bool]:
    """The optimizer that Accelerate may have wrapped, and whether the last step was skipped."""
    from accelerate.optimizer import AcceleratedOptimizer  # here: Trainer needs it, reading a recipe does not

    skipped = False
    while isinstance(optimizer, AcceleratedOptimizer):
        skipped = skipped or optimizer.step_was_skipped
        optimizer = optimizer.optimizer
    return optimizer, skipped
