"""`python -m transformers_k2.training RECIPE [key=value ...]`: `k2 train`, for launchers that start modules.

accelerate launch --config_file training_recipes/accelerate/cpu_x2.yaml -m transformers_k2.training debug_pretrain
"""

from __future__ import annotations

import sys

from . import machine, train

if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
    raise SystemExit(__doc__)
try:
    train(sys.argv[1], sys.argv[2:])
except ValueError as error:
    raise SystemExit(f"error: {error}") from None
finally:
    machine.leave()
