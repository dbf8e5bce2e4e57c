"""Training by recipe: `k2 train RECIPE` is `train(recipe, overrides)`; the parts are for scripts of one's own."""

from __future__ import annotations

from .callbacks import Metrics, ProgressBar, QATPhases, Saver
from .data import Data, prepare_data
from .errors import LossSpikeError, NonFiniteLossError
from .expert_load import ExpertLoadMonitor, LoadOutcome
from .export import export_int4
from .int4_report import Int4Outcome
from .loop import train
from .muon_clip_monitor import ClipOutcome, MuonClipMonitor
from .prepare import build_config, build_trainer, prepare_model
from .recipe import Recipe, load_recipe
from .report import RunSummary
from .trainer import RecipeTrainer

__all__ = [
    "ClipOutcome",
    "Data",
    "ExpertLoadMonitor",
    "Int4Outcome",
    "LoadOutcome",
    "LossSpikeError",
    "Metrics",
    "MuonClipMonitor",
    "NonFiniteLossError",
    "ProgressBar",
    "QATPhases",
    "Recipe",
    "RecipeTrainer",
    "RunSummary",
    "Saver",
    "build_config",
    "build_trainer",
    "export_int4",
    "load_recipe",
    "prepare_data",
    "prepare_model",
    "train",
]
