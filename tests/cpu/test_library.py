"""How C files become libraries; tests/quantization/test_cpu_kernel.py has what happens where that is not possible."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from transformers_k2.cpu import library
from transformers_k2.cpu.library import FLOAT, NUMBER, SIZE

C = """
#include <stdint.h>
#include "sub/two.h"
int64_t add(int64_t a, int b) { return a + b; }
float half(float a) { return a / TWO; }
"""
SIGNATURES = {"add": ([SIZE, NUMBER], SIZE), "half": ([FLOAT], FLOAT)}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file that includes a header, which includes another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "two.h").write_text('#pragma once\n#include "../one.h"\n#define TWO (ONE + ONE)\n')
    (tmp_path / "one.h").write_text("#pragma once\n#define ONE 1\n")
    path = tmp_path / "small.c"
    path.write_text(C)
    return path


def test_functions_have_their_signatures(source: Path) -> None:
    loaded = library.load(source, SIGNATURES, "Sums")
    if loaded is None:
        pytest.skip("no C compiler here")
    assert loaded.add(2**40, -1) == 2**40 - 1
    assert loaded.half(3.0) == 1.5
    assert library.load(source, SIGNATURES, "Sums") is loaded


def test_headers_are_part_of_the_version(source: Path) -> None:
    before = library.compiled(source)
    assert library.compiled(source) == before
    for header, text in (("one.h", "#define ONE 2\n"), ("sub/two.h", "#define TWO 3\n")):
        (source.parent / header).write_text(text)
        after = library.compiled(source)
        assert after != before
        assert after.name.startswith("small-")
        before = after
    assert len(list(before.parent.iterdir())) == 3


def test_log_says_what_is_slower(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("no C at all")
    with caplog.at_level(logging.INFO, logger=library.__name__):
        assert library.load(source, SIGNATURES, "Sums of two") is None
        assert library.load(source, SIGNATURES, "Sums of two") is None
        monkeypatch.setenv(library.SWITCH, "0")
        assert library.load(source.with_name("other.c"), SIGNATURES, "Halves") is None
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("Sums of two on the CPU are slower than they could be")
    assert "small.c" in first
    assert second == f"Halves go without the CPU kernel: {library.SWITCH}=0."
