"""The `k2` command: argument parsing only."""

from __future__ import annotations

from . import checkpoints, surgery, training
from .app import app, main

__all__ = ["app", "checkpoints", "main", "surgery", "training"]
