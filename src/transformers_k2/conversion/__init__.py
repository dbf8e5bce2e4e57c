"""Checkpoints from file to file: what a folder holds, what it should hold, and how to rewrite it."""

from __future__ import annotations

from ..manifest import count_parameters, expected_tensors
from .inspection import inspect
from .report import Problem, Report, render

__all__ = ["Problem", "Report", "count_parameters", "expected_tensors", "inspect", "render"]
