"""The losses at several lengths that a context recipe is judged by: before and after, with and without its rope scaling."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from ..parallel import Layout
from ..rope import set_rope_scaling
from . import machine
from .data import Data
from .recipe import ContextSection, Recipe
from .steps import Batch, held_out_batches
from .trainer import RecipeTrainer

_MOST_TOKENS = 65536  # of one length: enough for three digits


class ContextLosses:
    """Held-out losses, nats per token, by state of the model and length.

    Attributes:
        losses: {"before, plain" | "before, scaled" | "after, plain" | "after, scaled": {length: loss}}. Plain is the
            scaling that the run began with, scaled the recipe's final one.
    """

    def __init__(self, recipe: Recipe, data: Data, layout: Layout) -> None:
        assert recipe.context is not None
        self.context: ContextSection = recipe.context
        self.losses: dict[str, dict[int, float]] = {}
        self._plain: dict[str, Any] | None = None
        self._batches: dict[int, list[Batch]] = {}
        rank = layout.data_rank(machine.rank())
        for length in self.context.eval_lengths:
            rows = data.rows(recipe, length, recipe.data.seed, held_out=True)
            count = min(recipe.training.eval_sequences, max(_MOST_TOKENS // length, 1))
            self._batches[length] = held_out_batches(rows, count, 1, layout.data_size, rank)

    def measure_before(self, model: PreTrainedModel, trainer: RecipeTrainer) -> None:
        """Then the model is as it was."""
        self._plain = copy.deepcopy(model.config.rope_parameters)
        self._measure("before", model, trainer)
        set_rope_scaling(model, self._plain)

    def measure_after(self, model: PreTrainedModel, trainer: RecipeTrainer) -> None:
        """Then the model has the recipe's final scaling and length."""
        trained = copy.deepcopy(model.config.rope_parameters)
        self._measure("after", model, trainer)
        final = self.context.final_rope_scaling
        set_rope_scaling(model, trained if final is None else final, self.context.max_position_embeddings)

    def _measure(self, when: str, model: PreTrainedModel, trainer: RecipeTrainer) -> None:
        final = self.context.final_rope_scaling
        variants = {"plain": self._plain} | ({} if final is None else {"scaled": final})
        for name, scaling in variants.items():
            set_rope_scaling(model, scaling)
            self.losses[f"{when}, {name}"] = {
                length: trainer.held_out_loss(batches) for length, batches in self._batches.items()
            }
