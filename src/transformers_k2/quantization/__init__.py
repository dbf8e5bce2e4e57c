"""Quantised weights: the grid (int4.py), training on it (qat.py), the formats on disk (codecs/), transformers' side."""

from __future__ import annotations

from .qat import QATSchedule, prepare_qat, remove_qat

__all__ = ["QATSchedule", "prepare_qat", "remove_qat"]
