"""Training by recipe: `k2 train RECIPE` is `train(recipe, overrides)`; the parts are for scripts of one's own."""

from __future__ import annotations

from .callbacks import Metrics, NonFiniteLossError, ProgressBar
from .loop import train
from .muon_clip_monitor import ClipOutcome, MuonClipMonitor
from .prepare import Data, build_config, build_model, build_trainer, prepare_data
from .recipe import Recipe, load_recipe
from .report import RunSummary

__all__ = [
    "ClipOutcome",
    "Data",
    "Metrics",
    "MuonClipMonitor",
    "NonFiniteLossError",
    "ProgressBar",
    "Recipe",
    "RunSummary",
    "build_config",
    "build_model",
    "build_trainer",
    "load_recipe",
    "prepare_data",
    "train",
]
