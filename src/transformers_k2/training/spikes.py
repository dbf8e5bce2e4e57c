"""The spike guard: a step whose loss jumps far above the last ones is skipped, its gradients thrown away.

A bad batch can undo days of training; skipping it costs one step. The decision is a function of losses that all
processes share, so they agree without asking. What it gives up: a loss that rises slowly is not noticed.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from .errors import LossSpikeError


class SpikeGuard:
    """Compares each loss with the median of the last `window` accepted ones.

    Args:
        window: how many losses; nothing is skipped before they are there.
        factor: a loss above median + factor x the median absolute deviation, and above 1.1 x the median, is a spike.
        max_skips: so many skipped steps in a row stop the run.
    """

    def __init__(self, window: int, factor: float, max_skips: int) -> None:
        self.window, self.factor, self.max_skips = window, factor, max_skips
        self.skipped: list[int] = []  # steps, from 0
        self._losses: deque[float] = deque(maxlen=window)
        self._in_a_row = 0

    def spikes(self, step: int, loss: float) -> bool:
        """Whether the step is to be skipped.

        Raises:
            LossSpikeError: `max_skips` steps in a row were.
        """
        if len(self._losses) == self.window and loss > self.threshold():
            self.skipped.append(step)
            self._in_a_row += 1
            if self._in_a_row >= self.max_skips:
                raise LossSpikeError(
                    f"Training stopped at step {step + 1}: {self._in_a_row} steps in a row had a loss above "
                    f"{self.threshold():.4f} (the last {loss:.4f}) after a median of {median(self._losses):.4f}: the model, "
                    "not a batch, has gone bad. Resume from an earlier checkpoint with a lower optimizer.lr, or raise "
                    "training.spike_guard.factor."
                )
            return True
        self._losses.append(loss)
        self._in_a_row = 0
        return False

    def threshold(self) -> float:
        """The loss above which a step is skipped."""
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        return max(middle + self.factor * deviation, 1.1 * middle)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"losses": list(self._losses), "skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._losses = deque(state["losses"], maxlen=self.window)
        self.skipped = list(state["skipped"])
        self._in_a_row = state["in_a_row"]
