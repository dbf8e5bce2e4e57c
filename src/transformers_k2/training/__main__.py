"""`python -m transformers_k2.training RECIPE [key=value ...]`: `k2 train`, for launchers that start modules."""

from __future__ import annotations

import sys

from . import train

if len(sys.argv) < 2:
    raise SystemExit("usage: python -m transformers_k2.training RECIPE [key=value ...]")
try:
    train(sys.argv[1], sys.argv[2:])
except ValueError as error:
    raise SystemExit(f"error: {error}") from None
