"""One model over many ranks: layouts, sharded construction, pipeline stages, and what they cost."""

from __future__ import annotations

from .layout import Layout, stage_layers
from .model import build_model, demand_sharded, fill, lay_out
from .weights import CheckpointWeights, RandomWeights, Weights

__all__ = [
    "CheckpointWeights",
    "Layout",
    "RandomWeights",
    "Weights",
    "build_model",
    "demand_sharded",
    "fill",
    "lay_out",
    "stage_layers",
]
