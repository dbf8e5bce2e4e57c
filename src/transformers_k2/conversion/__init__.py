"""Checkpoints from file to file: what a folder holds, what it should hold, and how to rewrite it."""

from __future__ import annotations

from ..manifest import count_parameters, expected_tensors
from .adapter_export import export_adapter
from .convert import convert
from .inspection import inspect
from .merge import merge_adapter
from .quantize import quantize
from .report import Problem, Report, render
from .slicing import drop_experts, slice_model
from .upcycle import upcycle
from .verify import verify

__all__ = [
    "Problem",
    "Report",
    "convert",
    "count_parameters",
    "drop_experts",
    "expected_tensors",
    "export_adapter",
    "inspect",
    "merge_adapter",
    "quantize",
    "render",
    "slice_model",
    "upcycle",
    "verify",
]
