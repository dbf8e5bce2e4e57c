"""`inspect`: a clean checkpoint gives no complaint, each fault its own, and a terabyte takes seconds."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

import checkpoints
from transformers_k2 import resources
from transformers_k2.checkpoint import DTYPE_BITS
from transformers_k2.conversion import Problem, Report, convert, inspect, render
from transformers_k2.conversion.report import fold, ranges
from transformers_k2.manifest import Tensors, expected_tensors, optional_tensors

Tensor = torch.Tensor
GATE_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
LAST = "model-3-of-3.safetensors"


@pytest.fixture(scope="module")
def stock() -> DeepseekV3ForCausalLM:
    return checkpoints.stock_model()


@pytest.fixture(scope="module")
def fp8(stock: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    return checkpoints.to_fp8(checkpoints.per_expert(stock))


def fp8_config(**changes: Any) -> dict[str, Any]:
    return (
        checkpoints.hub_config(quantization_config=checkpoints.FP8_CONFIG, num_nextn_predict_layers=0)
        | changes
    )


def complaints(report: Report) -> list[Problem]:
    return [problem for problem in report.problems if problem.severity != "note"]


def only(report: Report) -> Problem:
    """The one problem that is no note."""
    assert len(complaints(report)) == 1, report.lines()
    return complaints(report)[0]


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "DELETE"}))


def test_clean_checkpoints_of_every_layout(
    tmp_path: Path, stock: DeepseekV3ForCausalLM, fp8: dict[str, Tensor]
) -> None:
    plain = checkpoints.per_expert(stock)
    int4 = checkpoints.to_int4(plain)
    packed = checkpoints.hub_config(quantization_config=checkpoints.INT4_CONFIG)
    wrapper = {"model_type": "kimi_k25", "text_config": packed}
    for layout, tensors, config, rename in (
        ("hub_bf16", plain, checkpoints.hub_config(), str),
        ("hub_fp8", fp8, fp8_config(), str),
        ("hub_int4", int4, packed, str),
        ("k25_int4", int4, wrapper, lambda name: f"language_model.{name}"),
    ):
        report = inspect(checkpoints.write(tmp_path / layout, tensors, config, rename=rename))
        assert (report.layout, complaints(report)) == (layout, [])
        (note,) = report.problems
        assert note.count == 3
        assert "model.layers.{0-2}.self_attn.rotary_emb.inv_freq" in note.text
        assert sum(part["parameters"] for part in report.parts.values()) == report.num_parameters
        files = (tmp_path / layout).glob("*.safetensors")
        assert report.num_bytes == sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    stock.save_pretrained(tmp_path / "fused", save_original_format=False)
    report = inspect(tmp_path / "fused")
    assert (report.layout, report.problems) == ("transformers_fused", [])
    stock.save_pretrained(tmp_path / "saved")
    assert (inspect(tmp_path / "saved").layout, inspect(tmp_path / "saved").problems) == ("hub_bf16", [])


@pytest.mark.parametrize("name", resources.names("configs"))
def test_every_size_is_described_without_complaint(name: str) -> None:
    report = inspect(name)
    assert complaints(report) == []
    config = json.loads(resources.find("configs", name).read_text())
    assert report.shape["layers"] == config["num_hidden_layers"]
    assert report.num_active < report.num_parameters
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert len(report.lines()) > 15


def test_a_config_by_name_by_path_and_as_a_dict() -> None:
    path = resources.find("configs", "debug_0_2b")
    report = inspect("debug_0_2b").to_dict()
    assert inspect(path).to_dict() == report
    assert inspect(json.loads(path.read_text())).to_dict() | {"source": str(path)} == report


def test_k2_instruct_by_its_config() -> None:
    report = inspect("kimi_k2_instruct")
    assert (report.num_parameters, report.layout) == (1_026_408_232_448, "hub_fp8")
    assert report.quantization == {"method": "fp8", "bits": 8, "block": [128, 128]}
    assert report.context["factor"] == 32.0
    assert (report.context["beta_fast"], report.context["max positions"]) == (1.0, 131072)
    console = Console(record=True, width=100, file=StringIO())
    console.print(render(report))
    text = console.export_text()
    assert "1,026.41 B" in text
    assert "1,014,686,023,680" in text
    assert "No problems found." in text


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(name)


def add(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def drop_if(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def cast(part: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if part in name})

    return change


EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"
EXTRA_LAYER = "model.layers.3.input_layernorm.weight"
# Change of the tensors, severity, kind, count, what the one line says.
TENSOR_FAULTS = {
    "expert": (drop(EXPERT), "error", "missing", 1, f"1 tensor is missing: {EXPERT}."),
    "experts": (drop_if("up_proj.weight_scale_inv"), "error", "missing", 15, None),
    "layer": (drop_if("layers.2."), "error", "missing", 58, "Layer 2 is missing altogether, 58 tensors"),
    "surplus": (add("model.layers.1.mlp.bias", torch.zeros(2)), "warning", "unexpected", 1, "not expected"),
    "beyond": (add(EXTRA_LAYER, torch.zeros(256)), "warning", "unexpected", 1, "Layer 3 is beyond"),
    "mtp": (add("model.layers.3.eh_proj.weight", torch.zeros(2)), "warning", "unexpected", 1, "multi-token"),
    "shape": (add("model.norm.weight", torch.zeros(255, dtype=torch.bfloat16)), "error", "shape", 1,
              "1 tensor is [255], expected [256]: model.norm.weight."),
    "grid": (add(f"{EXPERT}_scale_inv", torch.zeros(2, 2)), "error", "shape", 1, "[2, 2], expected [1, 2]"),
    "router": (cast("e_score_correction_bias", torch.bfloat16), "warning", "dtype", 2,
               "2 tensors are BF16, expected F32 (rounding it sends tokens to other experts): model.layers.{1-2}."),
    "norms": (cast("layernorm", torch.float16), "warning", "dtype", 12, "12 tensors are F16, expected BF16"),
    "scales": (cast("experts.0.up_proj.weight_scale_inv", torch.float16), "warning", "dtype", 2,
               "2 tensors are F16, expected F32"),
    "thawed": (cast(EXPERT, torch.bfloat16), "error", "dtype", 2, None),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faults_of_tensors(tmp_path: Path, fp8: dict[str, Tensor], fault: str) -> None:
    change, severity, kind, count, told = TENSOR_FAULTS[fault]
    tensors = dict(fp8)
    change(tensors)
    report = inspect(checkpoints.write(tmp_path, tensors, fp8_config()))
    found = complaints(report)
    if fault == "thawed":  # both the weight and its scale were cast: two pairs of dtypes, two lines
        assert [(p.severity, p.kind) for p in found] == [("error", "dtype"), ("warning", "dtype")]
        assert EXPERT in found[0].text
        return
    assert {(problem.severity, problem.kind) for problem in found} == {(severity, kind)}
    assert sum(problem.count for problem in found) == count
    assert told is None or told in found[0].text
    if fault == "experts":
        assert len(found) == 3  # dense, shared, routed: a line for each kind
        routed = "12 tensors are missing: model.layers.{1-2}.mlp.experts.{0-5}.up_proj.weight_scale_inv."
        assert routed in [problem.text for problem in found]


def test_stale_quantisation_is_one_line_not_one_for_each_tensor(
    tmp_path: Path, stock: DeepseekV3ForCausalLM, fp8: dict[str, Tensor]
) -> None:
    plain = checkpoints.per_expert(stock)
    stale = checkpoints.write(tmp_path / "1", plain, fp8_config())
    assert (
        only(inspect(stale)).text
        == "Stale quantization_config: config.json says fp8, the files hold unquantised."
    )
    bare = checkpoints.write(tmp_path / "2", fp8, checkpoints.hub_config())
    assert (
        only(inspect(bare)).text
        == "Stale quantization_config: config.json says unquantised, the files hold fp8."
    )
    other = checkpoints.write(tmp_path / "3", checkpoints.to_int4(plain), fp8_config())
    assert (only(inspect(other)).kind, inspect(other).layout) == ("quantization", "hub_int4")
    stock.save_pretrained(tmp_path / "4", save_original_format=False)
    edit_json(tmp_path / "4" / "config.json", quantization_config=checkpoints.FP8_CONFIG)
    assert only(inspect(tmp_path / "4")).kind == "quantization"


@pytest.mark.parametrize(
    ("changes", "severity", "told"),
    [
        (
            {"num_attention_heads": 8},
            "error",
            "has 256 rows, 4 heads of 64, but config.json says num_attention_heads 8",
        ),
        ({"num_key_value_heads": 2}, "warning", "num_key_value_heads is 2; expected 4"),
        ({"num_hidden_layers": 4}, "error", "Layer 3 is missing altogether"),
        ({"num_nextn_predict_layers": 1}, "warning", "Layer 3 is missing altogether"),
        (
            {"num_hidden_layers": 2},
            "warning",
            "Layer 2 is beyond the last one by config.json (num_hidden_layers)",
        ),
        ({"n_routed_experts": 8}, "error", "model.layers.{1-2}.mlp.experts.{6-7}.up_proj.weight"),
        ({"hidden_size": "DELETE"}, "error", "lacks hidden_size"),
        ({"hidden_size": "256"}, "error", "hidden_size 256; expected positive integers"),
        (
            {"num_expert_per_tok": 2},
            "warning",
            "'num_expert_per_tok' is unknown; did you mean 'num_experts_per_tok'?",
        ),
        (
            {"rope_theta": "DELETE", "n_group": "DELETE"},
            "warning",
            "lacks n_group, rope_theta; readers fill in",
        ),
        ({"max_position_embeddings": 262144}, "warning", "YaRN reaches 32 x 4,096 = 131,072 positions, but"),
        ({"rope_scaling": "yarn"}, "error", "rope_scaling is no object"),
        ({"rope_scaling": {"type": "yarn", "factor": "32"}}, "error", "YaRN has factor '32' over None"),
        ({"n_group": 4}, "error", "n_group is 4; expected a divisor of n_routed_experts 6"),
        ({"model_type": "llama"}, "warning", "model_type is 'llama'; expected one of kimi_k2, deepseek_v3"),
        ({"quantization_config": {"quant_method": "awq"}}, "error", "quant_method 'awq': expected 'fp8'"),
        ({"torch_dtype": "float32"}, "warning", "tensors are BF16, expected F32 (the dtype in config.json)"),
        ({"torch_dtype": "int8"}, "error", "dtype 'int8': expected one of bfloat16"),
        ({"text_config": {}}, "error", "lacks vocab_size"),
        ({"text_config": []}, "error", "text_config '[]': expected a JSON object"),
    ],
)
def test_faults_of_the_config(
    tmp_path: Path, fp8: dict[str, Tensor], changes: dict[str, Any], severity: str, told: str
) -> None:
    folder = checkpoints.write(tmp_path, fp8, fp8_config())
    edit_json(folder / "config.json", **changes)
    report = inspect(folder)
    assert any(told in problem.text for problem in complaints(report) if problem.severity == severity), (
        report.lines()
    )
    assert all("\n" not in problem.text for problem in report.problems)
    assert report.num_tensors == len(fp8) + 3


def test_notes_are_no_complaints(tmp_path: Path, stock: DeepseekV3ForCausalLM) -> None:
    int4 = checkpoints.to_int4(checkpoints.per_expert(stock), shape_dtype=torch.int64)
    config = checkpoints.hub_config(quantization_config=checkpoints.INT4_CONFIG, my_key=1, _private=2)
    folder = checkpoints.write(tmp_path, int4, config, stray=False)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    report = inspect(folder)
    assert complaints(report) == []
    eos, key, shapes = (problem.text for problem in report.problems)
    assert eos.startswith("eos_token_id is 1 in config.json, [2, 3] in generation_config.json")
    assert "'my_key' is unknown" in key
    assert shapes.startswith("36 tensors are I64, expected I32 (as compressed-tensors itself writes")


def test_faults_of_the_folder(tmp_path: Path, fp8: dict[str, Tensor]) -> None:
    folder = checkpoints.write(tmp_path / "a", fp8, fp8_config())
    index = folder / "model.safetensors.index.json"
    edit_json(index, metadata={"total_size": 12})
    assert "total_size 12, the tensors have" in only(inspect(folder)).text
    edit_json(index, metadata={})
    save_file({"old": torch.zeros(1)}, folder / "model-9-of-9.safetensors")
    assert "1 files are not named by" in only(inspect(folder)).text
    (folder / "model-9-of-9.safetensors").unlink()
    index.rename(tmp_path / "index")
    assert "3 shards without an index" in only(inspect(folder)).text
    (tmp_path / "index").rename(index)
    save_file(load_file(folder / LAST), folder / LAST)  # without metadata
    assert complaints(inspect(folder)) == []
    assert any("1 shards do not say format: pt" in problem.text for problem in inspect(folder).problems)
    os.truncate(folder / LAST, 100)
    assert (only(inspect(folder)).kind, only(inspect(folder)).severity) == ("file", "error")
    (folder / LAST).unlink()
    lost = only(inspect(folder))  # what the missing shard holds is not told again tensor by tensor
    assert "lacks 1 of the 3 files that its index names" in lost.text
    (folder / "config.json").write_text("{")
    assert {problem.severity for problem in complaints(inspect(folder))} == {"error", "warning"}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    report = inspect(folder)
    assert any("lacks 3 of the 3 files" in problem.text for problem in report.problems)
    assert (report.num_tensors, report.layout) == (0, None)


def test_one_shard_alone_is_no_incomplete_model(tmp_path: Path, fp8: dict[str, Tensor]) -> None:
    folder = checkpoints.write(tmp_path, fp8, fp8_config())
    report = inspect(folder / LAST)
    assert (report.layout, complaints(report)) == ("hub_fp8", [])
    missing = len(fp8) - sum("inv_freq" not in name for name in load_file(folder / LAST))
    assert any(f"This one file lacks {missing:,} tensors" in problem.text for problem in report.problems)
    # A shard with nothing that is quantised contradicts no quantization_config.
    save_file(
        {"model.norm.weight": fp8["model.norm.weight"]},
        folder / "norm.safetensors",
        metadata={"format": "pt"},
    )
    assert complaints(inspect(folder / "norm.safetensors")) == []


FOREIGN = {
    "a LoRA adapter": ["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"],
    "hub_bf16 without the prefix 'model.'": ["layers.0.self_attn.o_proj.weight", "embed_tokens.weight"],
    "none": ["a", "b"],
}


@pytest.mark.parametrize("nearest", FOREIGN)
def test_foreign_names_are_unknown_with_the_nearest(tmp_path: Path, nearest: str) -> None:
    save_file(
        {name: torch.zeros(2) for name in FOREIGN[nearest]}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text(json.dumps(fp8_config()))
    report = inspect(tmp_path)
    assert (report.layout, report.nearest_layout, report.quantization) == ("unknown", nearest, {})
    assert only(report).text == f"The names follow no known layout; the nearest is {nearest}."


@pytest.mark.parametrize("layout", ["deepseek_inference", "megatron", "torchtitan", "mlx"])
def test_other_layouts_have_their_name(tmp_path: Path, stock: DeepseekV3ForCausalLM, layout: str) -> None:
    src = checkpoints.write(tmp_path / "src", checkpoints.per_expert(stock), checkpoints.hub_config())
    ranks = 2 if layout == "deepseek_inference" else 1
    convert(src, tmp_path / "dst", layout, codec="bf16", num_ranks=ranks)
    report = inspect(tmp_path / "dst")
    assert (report.layout, report.nearest_layout, complaints(report)) == (layout, None, [])


def test_a_prefix_that_the_config_does_not_have(tmp_path: Path, fp8: dict[str, Tensor]) -> None:
    prefixed = checkpoints.write(tmp_path, fp8, fp8_config(), rename=lambda name: f"language_model.{name}")
    report = inspect(prefixed)
    assert (report.layout, report.nearest_layout) == ("unknown", "hub_fp8 under the prefix 'language_model.'")
    assert [problem.severity for problem in complaints(report)] == ["warning", "error"]
    assert "begin with 'language_model.', but config.json has no text_config" in complaints(report)[1].text


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"x.safetensors does not exist"):
        inspect("x.safetensors")
    with pytest.raises(ValueError, match="Did you mean 'kimi_k2_instruct'"):
        inspect("kimi_k2_instrukt")


def test_nothing_from_a_file_is_printed_as_markup(tmp_path: Path) -> None:
    names = [
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    names += ["[red]x[/red]\n\x1b[2J", "model.layers." + "9" * 5000 + ".x"]
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(checkpoints.hub_config(model_type="[bold]kimi[/bold]\x1b[2J"))
    )
    console = Console(record=True, width=200, force_terminal=True, file=StringIO())
    console.print(render(inspect(tmp_path)))
    text = console.export_text(styles=True)
    assert "[bold]kimi[/bold]" in text
    assert "[red]x[/red]\\n\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert all(line.isprintable() for line in inspect(tmp_path).lines())


def test_folding() -> None:
    names = [f"l.{layer}.e.{expert}.w1" for expert in range(3) for layer in (0, 1, 2, 5)]
    (group,) = fold(names)
    assert (group.pattern, group.count, group.exact) == ("l.{0-2,5}.e.{0-2}.w1", 12, True)
    assert group.examples == ("l.0.e.0.w1", "l.0.e.1.w1", "l.0.e.2.w1")
    (holed,) = fold(names[1:])
    assert (holed.pattern, holed.count, holed.exact) == ("l.{0-2,5}.e.{0-2}.w1", 11, False)
    assert [group.pattern for group in fold(["a.1.b", "c.2.b", "a.3.b", "norm.weight"])] == [
        *("a.{1,3}.b", "c.2.b", "norm.weight"),
    ]
    assert ranges([9, 1, 3, 5, 7]) == "1,3,5,7,..."


def write_sparse(folder: Path, tensors: Tensors, num_shards: int) -> None:
    """Shards with true headers and holes for data: their full length, a few megabytes of disk."""
    items = list(tensors.items())
    per_shard = -(-len(items) // num_shards)
    weight_map, total = {}, 0
    for shard in range(num_shards):
        name, end = f"model-{shard + 1}-of-{num_shards}.safetensors", 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for key, (shape, dtype) in items[shard * per_shard : (shard + 1) * per_shard]:
            start, end = end, end + torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            weight_map[key] = name
        encoded = json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(encoded)) + encoded)
        os.truncate(folder / name, 8 + len(encoded) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def demand_sparse_files(folder: Path) -> None:
    probe = folder / "probe"
    try:
        probe.write_bytes(b"x")
        os.truncate(probe, 1 << 35)
        taken = probe.stat().st_blocks * 512
    except OSError as error:
        pytest.skip(f"this file system has no large sparse files: {error}")
    finally:
        probe.unlink(missing_ok=True)
    if taken > 1 << 20:
        pytest.skip("this file system has no sparse files")


def test_a_full_size_k2_instruct(tmp_path: Path) -> None:
    """61 shards, 139,644 tensors, a terabyte (of holes): clean first, then broken in eight ways at once."""
    demand_sparse_files(tmp_path)
    config = json.loads(resources.find("configs", "kimi_k2_instruct").read_text())
    tensors = expected_tensors(config) | optional_tensors(config)
    write_sparse(tmp_path, tensors, 61)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"max_length": 131072, "eos_token_id": 163586}')
    start = time.perf_counter()
    report = inspect(tmp_path)
    print(f"inspect took {time.perf_counter() - start:.1f} s for {report.num_bytes / 1e12:.2f} TB")
    assert (report.layout, len(report.shards), report.num_tensors) == ("hub_fp8", 61, 139_644)
    assert report.num_bytes == 1_029_173_256_720
    kinds = {dtype: entry["tensors"] for dtype, entry in report.dtypes.items()}
    assert kinds == {"BF16": 368, "F32": 69_668, "F8_E4M3": 69_608}
    assert [(problem.severity, problem.count) for problem in report.problems] == [("note", 1), ("note", 61)]

    broken: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        if ".layers.20." in name and ".gate_proj.weight" in name and ".experts." in name:
            continue
        if name.endswith("kv_a_proj_with_mqa.weight_scale_inv"):
            shape = (4, 56)  # 576 rows are four and a half blocks
        if name.endswith("e_score_correction_bias"):
            dtype = "BF16"
        if ".layers.30.mlp.shared_experts." in name:
            name = name.replace("shared_experts", "shared_expert")
        broken[name] = (shape, dtype)
    write_sparse(tmp_path, broken, 61)
    lost, cut = tmp_path / "model-7-of-61.safetensors", tmp_path / "model-40-of-61.safetensors"
    lost.unlink()
    os.truncate(cut, cut.stat().st_size - 1)
    save_file({"x": torch.zeros(1)}, tmp_path / "model-62-of-62.safetensors")
    edit_json(tmp_path / "config.json", num_nextn_predict_layers=1)
    report = inspect(tmp_path)
    found = [(problem.severity, problem.kind, problem.count) for problem in report.sorted_problems()]
    told = "\n".join(report.lines())
    assert found[:2] == [("error", "file", 1)] * 2
    assert "lacks 1 of the 61 files that its index names ('model-7-of-61.safetensors')" in told
    assert "model-40-of-61.safetensors is 1 bytes too short" in told
    # Of the tensors in the two unreadable shards nothing more is said.
    unreadable = len(broken) - report.num_tensors
    assert unreadable == 2 * -(-len(broken) // 61)
    for part in ("weight", "weight_scale_inv"):
        pattern = f"384 tensors are missing: model.layers.20.mlp.experts.{{0-383}}.gate_proj.{part}."
        assert pattern in told
        assert f"1 tensor is missing: model.layers.30.mlp.shared_experts.up_proj.{part}." in told
        assert f"not read: model.layers.30.mlp.shared_expert.up_proj.{part}." in told
    (grids,) = [problem for problem in report.problems if problem.kind == "shape"]
    assert 55 <= grids.count <= 61
    assert "tensors are [4, 56], expected [5, 56]: model.layers.{0-" in grids.text
    (router,) = [problem for problem in report.problems if problem.kind == "dtype"]
    assert (router.severity, 55 <= router.count <= 60) == ("warning", True)
    assert "Layer 61 is missing altogether, 2,332 tensors; num_nextn_predict_layers promises it" in told
    assert len(report.problems) < 30
