"""The data folders are found by name: in a checkout, in an editable install, and inside a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from transformers_k2 import resources

ROOT = Path(__file__).resolve().parents[1]


def test_find_by_stem_file_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ROOT / "configs/kimi_k2_instruct.json"
    monkeypatch.chdir(tmp_path)
    for name in ("kimi_k2_instruct", "kimi_k2_instruct.json", "configs/kimi_k2_instruct.json", str(expected)):
        assert resources.find("configs", name).samefile(expected)
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert resources.find("configs", "mine.json").samefile(mine)


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'kimi_k2_instruct'.*Choices: .*debug_0_2b"):
        resources.find("configs", "kimi_k2_instrukt")
    with pytest.raises(ValueError, match="Unknown resource kind 'config'"):
        resources.find("config", "kimi_k2_instruct")
    with pytest.raises(ValueError, match="No configs file"):
        resources.find("configs", "../pyproject.toml")


def test_a_wheel_carries_the_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    inside = {path.relative_to(tmp_path / "site/transformers_k2/_data") for path in (tmp_path / "site").rglob("*.*")
              if "_data" in path.parts and path.is_file()}  # fmt: skip
    outside = {path.relative_to(ROOT) for kind in resources.SUFFIXES for path in (ROOT / kind).rglob("*.*")
               if path.is_file()}  # fmt: skip
    assert inside == outside
    # -S -E: without the editable install's finder; resources.py itself needs the standard library only.
    package = str(tmp_path / "site/transformers_k2")
    code = f"import sys; sys.path.insert(0, {package!r})\n"
    code += "from resources import find; print(find('configs', 'debug_0_2b'))"
    printed = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], check=True, capture_output=True, text=True
    )
    assert Path(printed.stdout.strip()) == tmp_path / "site/transformers_k2/_data/configs/debug_0_2b.json"
