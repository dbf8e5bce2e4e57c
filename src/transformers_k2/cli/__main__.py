"""`python -m transformers_k2.cli`, for launchers that start modules."""

from __future__ import annotations

from .app import main

main()
