"""Values over the steps of a run in bounded memory, and the short names of layers that pictures write beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
MAX_COLUMNS = 1024  # in a picture at a pixel or more each


class StepMaxima:
    """A value per row and step, in bounded memory: neighbouring steps share a column when they get too many.

    Args:
        rows: how many values a step has.
        columns: how many columns are kept at most; even.
    """

    def __init__(self, rows: int, columns: int = MAX_COLUMNS) -> None:
        self._values: Matrix = np.full((rows, columns), -np.inf, np.float32)
        self.width = 1  # steps per column
        self.used = 0

    def add(self, step: int, values: Sequence[float] | Matrix) -> None:
        """Record the values of a step >= 1; those it has already are kept where they are larger."""
        columns = self._values.shape[1]
        while (step - 1) // self.width >= columns:
            half = self._values.reshape(len(self._values), columns // 2, 2).max(2)
            self._values[:, : columns // 2] = half
            self._values[:, columns // 2 :] = -np.inf
            self.width *= 2
            self.used = (self.used + 1) // 2
        column = (step - 1) // self.width
        self._values[:, column] = np.maximum(self._values[:, column], values)
        self.used = max(self.used, column + 1)

    @property
    def values(self) -> Matrix:
        """[rows, columns], -inf where nothing was recorded."""
        return self._values[:, : self.used]

    @property
    def steps(self) -> npt.NDArray[Any]:
        """The middle of each column."""
        return np.arange(self.used) * self.width + (self.width + 1) / 2


def layer_of(name: str) -> str:
    """The name of the layer that a parameter belongs to: up to the first number, or all but the last part."""
    numbered = re.match(r"(?:.*?\.)??\w+\.\d+(?=\.)", name)
    return numbered[0] if numbered else name.rpartition(".")[0]


def short_name(name: str) -> str:
    """The number in a module's name, or the name."""
    numbered = re.search(r"\.(\d+)(?=\.|$)", name)
    return numbered[1] if numbered else name
