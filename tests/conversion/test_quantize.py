"""`quantize`: compressed-tensors reads what it writes, transformers loads it, and nothing but the chosen weights changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM
from typer.testing import CliRunner

import checkpoints
from conversion_results import problems, read, same, stray
from transformers_k2.cli import app
from transformers_k2.conversion import crew, inspect, quantize
from transformers_k2.manifest import expected_tensors
from transformers_k2.quantization import int4

Tensor = torch.Tensor
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.fixture(scope="module")
def stock() -> DeepseekV3ForCausalLM:
    return checkpoints.stock_model()


@pytest.fixture(scope="module")
def plain(stock: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    return checkpoints.per_expert(stock)


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a few rows, as real matrices have."""
    monkeypatch.setattr(crew, "_UNIT", 256 * 20)


def library(folder: Path, expected: dict[str, Tensor]) -> None:
    """compressed-tensors decodes each packed weight to the values of `expected`."""
    tensors = read(folder)
    packed = [name for name in tensors if name.endswith("weight_packed")]
    assert packed
    for name in packed:
        stem = name.removesuffix("_packed")
        codes = unpack_from_int32(tensors[name], 4, torch.Size(tensors[f"{stem}_shape"].tolist()))
        scale = tensors[f"{stem}_scale"].repeat_interleave(
            codes.shape[1] // tensors[f"{stem}_scale"].shape[1], 1
        )
        assert torch.equal(codes.to(torch.bfloat16) * scale, expected[stem]), name


def test_bf16(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    """The textbook's groups, compressed-tensors' packer, and everything else byte for byte."""
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    for name in (
        "tokenizer_config.json",
        "chat_template.jinja",
        "tiktoken.model",
        "LICENSE",
        "modeling_x.py",
        "a.pkl",
    ):
        (src / name).write_text("{}" if name.endswith(".json") else f"content of {name}")
    summary = quantize(src, tmp_path / "dst")
    same(stray(read(tmp_path / "dst")), checkpoints.to_int4(plain))
    assert summary.num_changed == 3 * 36
    assert summary.num_bytes == sum(tensor.nbytes for tensor in read(tmp_path / "dst").values())
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert names == {
        *(
            "config.json",
            "conversion.json",
            "model.safetensors",
            "tokenizer_config.json",
            "chat_template.jinja",
            "tiktoken.model",
            "LICENSE",
        )
    }
    assert (tmp_path / "dst/chat_template.jinja").read_text() == "content of chat_template.jinja"
    config = json.loads((tmp_path / "dst/config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == checkpoints.INT4_CONFIG["ignore"]
    before = checkpoints.hub_config()
    del before["auto_map"]
    assert config == before
    assert inspect(tmp_path / "dst").layout == "hub_int4"
    assert problems(tmp_path / "dst") == []


def test_fp8_as_the_loader_dequantises(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    fp8 = checkpoints.to_fp8(plain)
    config = checkpoints.hub_config(quantization_config=checkpoints.FP8_CONFIG)
    src = checkpoints.write(tmp_path / "src", fp8, config)
    quantize(src, tmp_path / "dst", shard_bytes=500_000)
    same(stray(read(tmp_path / "dst")), checkpoints.to_int4(checkpoints.decoded(fp8, torch.bfloat16)))
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) > 3
    assert problems(tmp_path / "dst") == []
    # The same as the loaded model, quantised expert by expert.
    model = checkpoints_model(src)
    tensors = read(tmp_path / "dst")
    for index, stack in enumerate(model.model.layers[1].mlp.experts.down_proj):
        codes, scale = int4.quantize(stack)
        stem = f"model.layers.1.mlp.experts.{index}.down_proj.weight"
        assert torch.equal(tensors[f"{stem}_packed"], pack_to_int32(codes, 4))
        assert torch.equal(tensors[f"{stem}_scale"], scale)


def checkpoints_model(folder: Path, **options: Any) -> Any:
    from transformers_k2 import KimiK2ForCausalLM

    return KimiK2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def test_k25_prefix_and_vision_tower(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    vision = {
        "vision_tower.blocks.0.wqkv.weight": torch.randn(24, 16),
        "mm_projector.proj.0.bias": torch.randn(7),
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in plain.items()} | vision
    config = {"model_type": "kimi_k25", "text_config": checkpoints.hub_config(), "dtype": "bfloat16"}
    src = checkpoints.write(tmp_path / "src", tensors, config, stray=False)
    quantize(src, tmp_path / "dst")
    packed = {f"language_model.{name}": tensor for name, tensor in checkpoints.to_int4(plain).items()}
    same(read(tmp_path / "dst"), packed | vision)
    written = json.loads((tmp_path / "dst/config.json").read_text())
    assert "quantization_config" not in written
    assert written["text_config"]["quantization_config"]["format"] == "pack-quantized"
    assert inspect(tmp_path / "dst").layout == "k25_int4"


def test_fused_experts(tmp_path: Path, stock: DeepseekV3ForCausalLM, plain: dict[str, Tensor]) -> None:
    src = checkpoints.write(tmp_path / "src", dict(stock.state_dict()), checkpoints.hub_config(), stray=False)
    quantize(src, tmp_path / "dst")
    same(read(tmp_path / "dst"), checkpoints.to_int4(plain))


def test_mtp_layers(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    """Their experts are packed too; their projections, which no published pattern ignores, are not."""
    config = checkpoints.hub_config(num_nextn_predict_layers=1)
    wanted = expected_tensors(config)
    tensors = plain | {
        name: torch.randn(shape).bfloat16() for name, (shape, _) in wanted.items() if ".layers.3." in name
    }
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].float()
    assert tensors.keys() == wanted.keys()
    quantize(checkpoints.write(tmp_path / "src", tensors, config, stray=False), tmp_path / "dst")
    same(read(tmp_path / "dst"), checkpoints.to_int4(tensors))
    assert problems(tmp_path / "dst") == []
    ignore = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]["ignore"]
    added = ["model.layers.3.eh_proj", "model.layers.3.shared_head.head"]
    assert ignore == [*checkpoints.INT4_CONFIG["ignore"], *added]


def test_float32_is_quantised_from_float32(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    wide = {name: tensor.float() * 1.001 for name, tensor in plain.items()}
    src = checkpoints.write(
        tmp_path / "src", wide, checkpoints.hub_config(torch_dtype="float32"), stray=False
    )
    quantize(src, tmp_path / "dst")
    expected = {
        name: tensor if tensor.dtype != torch.float32 or name.endswith("_bias") else tensor.bfloat16()
        for name, tensor in checkpoints.to_int4(wide).items()
    }
    same(read(tmp_path / "dst"), expected)
    assert json.loads((tmp_path / "dst/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert problems(tmp_path / "dst") == []


@pytest.mark.parametrize("group_size", [8, 32])
def test_convention_and_group_size(tmp_path: Path, plain: dict[str, Tensor], group_size: int) -> None:
    """compressed-tensors' own grid, by its own decoder."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    quantize(src, tmp_path / "dst", group_size=group_size, convention="compressed_tensors")
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=group_size, symmetric=True)
    tensors = read(tmp_path / "dst")
    for name in (EXPERT, "model.layers.2.mlp.experts.5.down_proj.weight"):
        groups = plain[name].unflatten(1, (-1, group_size))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        codes = library_quantize(plain[name], scale, zero, args, dtype=torch.int8)
        assert torch.equal(tensors[f"{name}_scale"], scale)
        assert torch.equal(tensors[f"{name}_packed"], pack_to_int32(codes, 4))
    assert problems(tmp_path / "dst") == []


def test_transformers_loads_it(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    quantize(src, tmp_path / "dst")
    meaning = checkpoints.decoded(checkpoints.to_int4(plain), torch.bfloat16)
    library(tmp_path / "dst", meaning)
    bf16 = checkpoints.write(tmp_path / "meaning", meaning, checkpoints.hub_config())
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(
            checkpoints_model(tmp_path / "dst", dequantize=True)(ids).logits,
            checkpoints_model(bf16)(ids).logits,
        )


def test_recover_is_lossless(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    """Packed, dequantised by the oracle, packed again: the same bytes; and what is on no grid is refused."""
    packed = checkpoints.to_int4(plain)
    steps = packed[f"{EXPERT}_scale"].view(torch.int16)
    steps[::2] += 1  # scales that amax / 7 does not give
    dense = checkpoints.decoded(packed, torch.bfloat16)
    src = checkpoints.write(tmp_path / "src", dense, checkpoints.hub_config(), stray=False)
    quantize(src, tmp_path / "dst", recover=True)
    same(read(tmp_path / "dst"), packed)
    bad = checkpoints.write(tmp_path / "bad", plain, checkpoints.hub_config(), stray=False)
    with pytest.raises(
        ValueError, match=r"experts\.\d\.\w+_proj\.weight, rows \d+ to \d+: .* on no INT4 grid"
    ):
        quantize(bad, tmp_path / "none", recover=True)
    assert not list((tmp_path / "none").glob("*"))


def test_other_modules(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config(), stray=False)
    quantize(src, tmp_path / "dst", modules=[r".*\.shared_experts\.up_proj"])
    tensors = read(tmp_path / "dst")
    packed = {name.removesuffix("_packed") for name in tensors if name.endswith("_packed")}
    assert packed == {f"model.layers.{layer}.mlp.shared_experts.up_proj.weight" for layer in (1, 2)}
    assert problems(tmp_path / "dst") == []
    library(tmp_path / "dst", checkpoints.decoded(tensors, torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 64},
            r"^model\.layers\.1\.mlp\.experts\.\d\.down_proj\.weight: INT4 group_size is 64, .* 96 weights",
        ),
        ({"convention": "gptq"}, "convention is 'gptq': expected one of kimi, compressed_tensors"),
        (
            {"modules": ["experts"]},
            "'experts', which matches no linear module: expected one for whole names such as lm_head",
        ),
        (
            {"modules": [r".*mlp\.gate"]},
            "which matches no linear module: expected one for whole names",
        ),
        ({"modules": []}, "modules is empty"),
        ({"modules": ["("]}, "expected a regular expression"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
    ],
)
def test_errors_before_work(
    tmp_path: Path, plain: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    with pytest.raises(ValueError, match=message):
        quantize(src, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_int4_is_refused(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    config = checkpoints.hub_config(quantization_config=checkpoints.INT4_CONFIG)
    src = checkpoints.write(tmp_path / "src", checkpoints.to_int4(plain), config)
    with pytest.raises(ValueError, match=r"is INT4 already \(36 weights, such as"):
        quantize(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fp8", [False, True])
def test_weights_that_are_not_finite(
    tmp_path: Path, plain: dict[str, Tensor], value: float, fp8: bool
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight" if fp8 else EXPERT
    tensors = checkpoints.to_fp8(plain) if fp8 else dict(plain)
    tensors[f"{name}_scale_inv" if fp8 else name] = tensors[f"{name}_scale_inv" if fp8 else name].clone()
    tensors[f"{name}_scale_inv" if fp8 else name][-1, -1] = value
    changes = {"quantization_config": checkpoints.FP8_CONFIG} if fp8 else {}
    src = checkpoints.write(tmp_path / "src", tensors, checkpoints.hub_config(**changes))
    with pytest.raises(ValueError, match=rf"^{name}, rows .* finite"):
        quantize(src, tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*"))


def test_dry_run_tells_the_same_and_writes_nothing(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    told = quantize(src, tmp_path / "dst", dry_run=True, shard_bytes=300_000)
    assert not (tmp_path / "dst").exists()
    assert quantize(src, tmp_path / "dst", shard_bytes=300_000) == told


def test_command(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    args = ["quantize", str(src), str(tmp_path / "dst"), "--shard-bytes", "400000"]
    told = CliRunner().invoke(app, [*args, "--dry-run"])
    assert told.exit_code == 0, told.output
    assert "would hold" in told.output
    assert not (tmp_path / "dst").exists()
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "108 of them converted" in done.output
    same(stray(read(tmp_path / "dst")), checkpoints.to_int4(plain))


def test_wrong_shape_in_the_source(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    tensors = plain | {EXPERT: torch.zeros(95, 256, dtype=torch.bfloat16)}
    src = checkpoints.write(tmp_path / "src", tensors, checkpoints.hub_config())
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj\.weight has shape \[95, 256\]"):
        quantize(src, tmp_path / "dst")
    del tensors[EXPERT]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, src / "model.safetensors")
    for path in (*src.glob("model-*"), *src.glob("*.index.json")):
        path.unlink()
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj\.weight"):
        quantize(src, tmp_path / "dst")
