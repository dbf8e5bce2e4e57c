"""The house rules that a machine can check: imports go one way."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_import_contracts() -> None:
    assert (
        lint_imports(config_filename=str(Path(__file__).parents[1] / "pyproject.toml"), no_cache=True)
        == EXIT_STATUS_SUCCESS
    )
