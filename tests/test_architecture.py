"""The house rules that a machine can check: imports go one way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_import_contracts() -> None:
    """In a process of its own: the linter reconfigures logging for the whole process."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
