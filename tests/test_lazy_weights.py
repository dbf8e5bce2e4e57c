"""Weights that are read when they are asked for: regions of every kind against safetensors and textbook decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import INT4_CONFIG, decoded, hub_config, per_expert, stock_model, to_fp8, to_int4, write
from transformers_k2.checkpoint import CheckpointError
from transformers_k2.lazy_tensors import LazyTensor, OpenFiles
from transformers_k2.lazy_weights import Packing, is_coded, lazy_weights, read_headers

REGIONS = [
    ...,
    (slice(2, 5),),
    (slice(None), slice(33, 190)),
    (slice(1, 4), slice(90, 101), slice(32, 96)),
    (slice(3, 3), slice(None)),
]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def region(value: torch.Tensor, index: object) -> torch.Tensor:
    return value[index if index is ... else index[: value.dim()]]


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The textbook's way to transformers' names: everything in memory."""
    found = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts"

        def pick(part: str, suffix: str, stem: str = stem) -> list[torch.Tensor]:
            return [tensors[f"{stem}.{expert}.{part}_proj.weight{suffix}"] for expert in range(6)]

        for suffix in ("", "_packed", "_scale"):
            if f"{stem}.0.up_proj.weight{suffix}" in tensors:
                pairs = zip(pick("gate", suffix), pick("up", suffix), strict=True)
                found[f"{stem}.gate_up_proj{suffix}"] = torch.stack([torch.cat(pair) for pair in pairs])
                found[f"{stem}.down_proj{suffix}"] = torch.stack(pick("down", suffix))
    return found


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int4", "int4 packed", "bf16 packed", "fp8 packed"])
def test_every_region_of_every_weight(tmp_path: Path, codec: str) -> None:
    plain = per_expert(stock_model())
    encode = {"bf16": lambda same: same, "fp8": to_fp8, "int4": to_int4}[codec.split()[0]]
    stored = encode(plain)
    folder = write(tmp_path, stored, hub_config(), stray=False)
    packing = Packing() if codec.endswith("packed") else None
    meaning = decoded(stored, torch.bfloat16)
    expected = stacked(to_int4(meaning) if packing else meaning)
    tensors = read_headers(files_of(folder))
    assert is_coded(tensors) == (not codec.startswith("bf16"))
    with OpenFiles() as files:
        found = lazy_weights(tensors, files, torch.bfloat16, packing)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            lazy = found[name]
            assert isinstance(lazy, LazyTensor)
            assert (lazy.get_shape(), lazy.dtype) == (list(value.shape), value.dtype)
            for index in REGIONS:
                # A packed column is eight inputs, a scale's is 32: columns are cut as tensor parallelism does.
                assert torch.equal(
                    lazy[index] if index is ... else lazy[index[: value.dim()]], region(value, index)
                ), name


def test_dtypes_are_spelled_as_safetensors_does(tmp_path: Path) -> None:
    dtypes = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    values = {f"a{number}": torch.ones(3, 5).to(dtype) for number, dtype in enumerate(dtypes)}
    values |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(values, tmp_path / "model.safetensors")
    with OpenFiles() as files, safe_open(tmp_path / "model.safetensors", "pt") as theirs:
        for name, lazy in lazy_weights(read_headers(files_of(tmp_path)), files, torch.float32).items():
            other = theirs.get_slice(name)
            assert lazy.get_dtype() == other.get_dtype()
            assert lazy.get_shape() == other.get_shape()
            assert torch.equal(lazy[...], values[name])


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    tensors = read_headers(files_of(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(300)
    with OpenFiles() as files, pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte 300"):
        _ = lazy_weights(tensors, files, torch.float32)["a"][...]


def test_an_expert_that_is_missing_or_of_another_shape(tmp_path: Path) -> None:
    tensors = per_expert(stock_model())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with OpenFiles() as files:
        whole = tensors.pop(name)
        folder = write(tmp_path / "missing", tensors, hub_config())
        with pytest.raises(
            CheckpointError, match=r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"
        ):
            lazy_weights(read_headers(files_of(folder)), files, torch.bfloat16)
        folder = write(tmp_path / "shape", tensors | {name: whole[:-1].clone()}, hub_config())
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*\[191, 256\].*\[192, 256\]"
        ):
            lazy_weights(read_headers(files_of(folder)), files, torch.bfloat16)


PEAK = """
import gc, json, resource, sys, torch, transformers_k2
from transformers import AutoModelForCausalLM
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
gc.collect()
experts = sum(value.nbytes for name, value in model.named_parameters() if ".experts." in name)
# not ru_maxrss, which counts the process that started this one
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps({"before": before, "after": resident(), "peak": peak, "experts": experts}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dequantize": True}])
def test_nothing_exists_twice_while_it_is_loaded(tmp_path: Path, options: dict[str, bool]) -> None:
    """0.6 G weights of experts: pages of the files that are read would show, and so would a second copy of a stack."""
    size = {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "n_routed_experts": 192,
        "num_hidden_layers": 3,
    }
    config = hub_config(quantization_config=INT4_CONFIG, **size)
    small = per_expert(
        stock_model(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=1, num_experts_per_tok=1)
    )
    stored = to_int4(small)
    for layer in (1, 2):
        bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        stored[bias] = stored[bias].repeat(192)
        gate = f"model.layers.{layer}.mlp.gate.weight"
        stored[gate] = stored[gate].repeat(192, 1)
        first = {name: value for name, value in stored.items() if f".{layer}.mlp.experts.0." in name}
        for expert in range(1, 192):
            stored |= {
                name.replace("experts.0.", f"experts.{expert}."): value.clone()
                for name, value in first.items()
            }
    folder = write(tmp_path, stored, config, stray=False)
    command = [sys.executable, "-c", PEAK, str(folder), json.dumps(options)]
    seen = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    num_weights = 2 * 192 * 3 * 1024 * 512
    assert seen["after"] - seen["before"] >= 0.9 * seen["experts"]
    assert seen["experts"] <= (2 if options else 0.35 * 2) * num_weights
    assert seen["peak"] <= 1.1 * seen["after"]
