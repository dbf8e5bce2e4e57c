"""The README's tree names every source file, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/transformers_k2"


def test_the_tree_is_true() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("## To change X")[0]
    named = set(re.findall(r"^  ([\w/.]+\.(?:py|jinja))\s", tree, re.MULTILINE))
    files = {
        path.relative_to(PACKAGE).as_posix() for kind in ("*.py", "*.jinja") for path in PACKAGE.rglob(kind)
    }
    markers = {name for name in files if name.endswith("/__init__.py")}  # one line each would say nothing
    assert named == files - markers
    for name in re.findall(r"^([\w/.]+\.\w+)\s", tree, re.MULTILINE):
        assert (ROOT / name).is_file(), name


def test_what_to_touch_exists() -> None:
    table = (ROOT / "README.md").read_text().split("## To change X, touch Y")[1].split("## Limits")[0]
    for name in re.findall(r"`([\w/.]+\.\w+)`", table):
        assert any((folder / name).is_file() for folder in (ROOT, PACKAGE)), name
