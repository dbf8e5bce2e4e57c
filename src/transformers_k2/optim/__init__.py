"""MuonClip and its parts: pure torch, for any model."""

from __future__ import annotations

from .groups import DEFAULT_RULES, Rule
from .muon_clip import MuonClip, muon_clip
from .newton_schulz import SCHEDULES, newton_schulz
from .qk_clip import Attention, HeadRows, find_attention

__all__ = [
    "DEFAULT_RULES",
    "SCHEDULES",
    "Attention",
    "HeadRows",
    "MuonClip",
    "Rule",
    "find_attention",
    "muon_clip",
    "newton_schulz",
]
