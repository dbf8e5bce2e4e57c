"""What stops a run from inside."""

from __future__ import annotations


class NonFiniteLossError(ValueError):
    """The loss or the gradient norm became infinite or NaN."""


class LossSpikeError(ValueError):
    """The spike guard skipped as many steps in a row as it may."""
