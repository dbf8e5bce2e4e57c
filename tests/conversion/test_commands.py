"""The commands about checkpoints, as a shell calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import checkpoints
from transformers_k2.cli import app
from transformers_k2.cli.app import num_bytes


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = checkpoints.per_expert(checkpoints.stock_model())
    return checkpoints.write(tmp_path_factory.mktemp("src") / "bf16", plain, checkpoints.hub_config())


def run(*words: str | Path) -> tuple[int, str]:
    told = CliRunner().invoke(app, [str(word) for word in words])
    return told.exit_code, told.output


def test_convert_and_verify(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    code, told = run("convert", src, dst, "--to", "megatron", "--dry-run", "--memory", "1.5GB")
    assert (code, dst.exists()) == (0, False)
    assert told.startswith("hub_bf16 (bf16) -> megatron (bf16): 49 copied, 15 rearranged")
    assert f"{dst} would hold 64 tensors" in told
    assert run("convert", src, dst, "--to", "megatron", "--quiet")[0] == 0
    code, told = run("verify", dst, "--quiet")
    assert code == 0
    assert "64 checksums right" in told
    assert run("verify", src, dst, "--quiet")[0] == 0
    with (dst / "model.safetensors").open("r+b") as file:
        file.seek(3_000_000)
        byte = file.read(1)
        file.seek(3_000_000)
        file.write(bytes([byte[0] ^ 4]))
    for words in (("verify", dst), ("verify", src, dst)):
        code, told = run(*words, "--quiet")
        assert code == 1
        assert "1 of " in told
        assert "at fault" in told


def test_slice_prune_and_upcycle(src: Path, tmp_path: Path) -> None:
    code, told = run(
        "slice", src, tmp_path / "cut", "--layers", "0,2", "--experts", "4", "--experts-per-token", "2"
    )
    assert (code, "2 layers (1 with 4 experts)" in told) == (0, True)
    assert run("verify", tmp_path / "cut", "--quiet")[0] == 0
    code, told = run("prune", tmp_path / "cut", tmp_path / "less", "--keep", "3", "--rule", "norm")
    assert code == 0, told
    code, told = run("upcycle", tmp_path / "less", tmp_path / "more", "--experts", "6", "--noise", "0")
    assert code == 0, told
    assert run("verify", tmp_path / "more", "--quiet")[0] == 0


@pytest.mark.parametrize(("text", "number"), [("512MB", 512 * 10**6), ("2 GiB", 2 << 30), ("1000", 1000)])
def test_sizes(text: str, number: int) -> None:
    assert num_bytes(text) == number
    with pytest.raises(ValueError, match="size is 'a lot'"):
        num_bytes("a lot")


def test_the_memory_of_a_conversion_may_be_small(src: Path, tmp_path: Path) -> None:
    code, told = run(
        "convert", src, tmp_path / "dst", "--to", "hub_int4", "--memory", "1KB", "--shard-bytes", "200000"
    )
    assert code == 0, told
    assert torch.get_num_threads() >= 1


def test_an_adapter_is_converted_too(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    told = CliRunner().invoke(
        app, ["convert", str(tmp_path / "lora"), str(tmp_path / "dst"), "--to", "megatron"]
    )
    assert isinstance(told.exception, ValueError)
    assert "form is 'megatron': expected one of serving, peft" in str(told.exception)
