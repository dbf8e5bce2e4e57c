"""INT4 checkpoints whose routed experts stay packed: loaded, computed with, saved again byte for byte, and refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
)

from checkpoints import (
    FP8_CONFIG,
    INT4_CONFIG,
    decoded,
    hub_config,
    per_expert,
    stock_model,
    to_fp8,
    to_int4,
    write,
)
from transformers_k2 import Int4Config, KimiK2ForCausalLM
from transformers_k2.quantization import cpu_kernel
from transformers_k2.quantization.packed_experts import PackedExperts

STRAY = "inv_freq"
EXPERTS = "model.layers.1.mlp.experts."
# Sums of another order, in float32; logits are of order one.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@cache
def encoded(codec: str) -> dict[str, torch.Tensor]:
    tensors = per_expert(stock_model())
    if codec == "int4_int64_shape":
        return to_int4(tensors, torch.int64)
    return {"bf16": lambda same: same, "fp8": to_fp8, "int4": to_int4}[codec](tensors)


def folder_of(path: Path, codec: str = "int4", **changes: Any) -> Path:
    settings = {"bf16": {}, "fp8": {"quantization_config": FP8_CONFIG}}
    config = settings.get(codec, {"quantization_config": INT4_CONFIG}) | changes
    return write(path, dict(encoded(codec)), hub_config(**config))


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items() if STRAY not in name}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and bytes."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items()
    )


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 320, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", ["int4", "int4_int64_shape"])
def test_loads_packed_and_computes_what_the_dequantised_model_does(
    tmp_path: Path, ids: torch.Tensor, codec: str
) -> None:
    folder = folder_of(tmp_path, codec)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(model) is KimiK2ForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    experts = [layer.mlp.experts for layer in model.model.layers[1:]]
    assert all(type(module) is PackedExperts for module in experts)
    num_weights = sum(num_out * num_in * 6 for _, num_out, num_in in experts[0].shapes())
    assert sum(value.nbytes for value in experts[0].parameters()) <= 0.35 * 2 * num_weights
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, dequantize=True)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, **CLOSE)
    stacks = {name: value for name, value in model.state_dict().items() if ".experts." in name}
    assert {value.dtype for value in stacks.values()} == {torch.int32, torch.bfloat16}
    # The oracle unpacks a whole stack at a time, expert by expert.
    packed, scale = stacks[f"{EXPERTS}down_proj_packed"], stacks[f"{EXPERTS}down_proj_scale"]
    dense_state = dense.state_dict()
    for expert in range(6):
        codes = unpack_from_int32(packed[expert], 4, torch.Size([256, 96]))
        weight = codes.float() * scale[expert].float().repeat_interleave(32, 1)
        assert torch.equal(weight, dense_state[f"{EXPERTS}down_proj"][expert])


def test_in_bfloat16_it_is_as_near_to_float32_as_the_dequantised_model(
    tmp_path: Path, ids: torch.Tensor
) -> None:
    folder = folder_of(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, dequantize=True)(ids).logits
    dense = AutoModelForCausalLM.from_pretrained(folder, dequantize=True)(ids).logits.float()
    native = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.float()
    assert (native - exact).norm() <= 1.5 * (dense - exact).norm()


@pytest.mark.parametrize("codec", ["int4", "int4_int64_shape"])
def test_saving_gives_the_files_back_byte_for_byte(tmp_path: Path, ids: torch.Tensor, codec: str) -> None:
    folder = folder_of(tmp_path / "hub", codec)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model(ids).logits
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert same(files_of(tmp_path / "saved"), files_of(folder))
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_config"] == INT4_CONFIG
    assert torch.equal(model(ids).logits, before)  # the model still computes, in the form that it did
    form = torch.int32 if cpu_kernel.available() else torch.uint8
    assert model.model.layers[1].mlp.experts.gate_up_proj_packed.dtype == form
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, before)


def test_the_stock_class_reads_what_we_save(tmp_path: Path, ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder_of(tmp_path / "hub", "bf16"), quantization_config=Int4Config()
    )
    model.save_pretrained(tmp_path / "saved")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dequantize=True)
    edit(tmp_path / "saved", model_type="deepseek_v3")
    stock = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(stock(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("codec", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "asked",
    [
        Int4Config(),
        {"quant_method": "kimi_k2_int4", "group_size": 32},
        INT4_CONFIG,
        CompressedTensorsConfig(
            **{key: value for key, value in INT4_CONFIG.items() if key != "quant_method"}
        ),
    ],
    ids=["config", "dict", "hub dict", "hub config"],
)
def test_float_checkpoints_are_quantised_as_they_are_loaded(tmp_path: Path, codec: str, asked: Any) -> None:
    """Kimi's grid, by a textbook loop and compressed-tensors' packer."""
    folder = folder_of(tmp_path / "hub", codec)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=copy.deepcopy(asked))
    model.save_pretrained(tmp_path / "saved")
    assert same(files_of(tmp_path / "saved"), to_int4(decoded(encoded(codec), torch.bfloat16)))
    config = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert config["ignore"] == INT4_CONFIG["ignore"]


def test_experts_that_are_stacked_in_the_file_are_quantised_too(tmp_path: Path) -> None:
    stock = stock_model()
    folder = write(tmp_path / "fused", dict(stock.state_dict()), hub_config())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int4Config())
    model.save_pretrained(tmp_path / "saved")
    assert same(files_of(tmp_path / "saved"), to_int4(decoded(encoded("bf16"), torch.bfloat16)))


def test_other_groups_and_the_other_convention(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hub", "bf16")
    asked = Int4Config(group_size=96, convention="compressed_tensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*group_size is 96.*256"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    asked = Int4Config(group_size=16, convention="compressed_tensors")  # which ATen's kernel does not take
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    experts = model.model.layers[1].mlp.experts
    assert experts.down_proj_scale.shape == (6, 256, 6)
    model.save_pretrained(tmp_path / "saved")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dequantize=True)
    weight = encoded("bf16")[f"{EXPERTS}0.down_proj.weight"].float()
    groups = weight.unflatten(1, (6, 16))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16()
    codes = (groups.bfloat16() / scale).clamp(-8, 7).round().float()
    assert torch.equal(
        dense.state_dict()[f"{EXPERTS}down_proj"][0], (codes * scale.float()).flatten(1).bfloat16()
    )
    with pytest.raises(ValueError, match=r"groups are 16 weights.*asks for 32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=Int4Config())


@pytest.mark.parametrize("wrapped", [True, False])
def test_language_model_prefix_and_bare_decoder(tmp_path: Path, ids: torch.Tensor, wrapped: bool) -> None:
    text = hub_config(quantization_config=INT4_CONFIG)
    config = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 32}}
    tensors = {f"language_model.{name}": value for name, value in encoded("int4").items()}
    tensors["vision_tower.encoder.blocks.0.wqkv.weight"] = torch.zeros(6, 2)
    folder = write(tmp_path / "k25", tensors, config if wrapped else text, stray=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "text")
    assert same(files_of(tmp_path / "text"), encoded("int4"))
    bare = AutoModel.from_pretrained(tmp_path / "text")
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    names = {name.removeprefix("model.") for name in encoded("int4")} - {"lm_head.weight"}
    assert files_of(tmp_path / "bare").keys() == names


def test_dequantize_method(tmp_path: Path, ids: torch.Tensor) -> None:
    folder = folder_of(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    dense = AutoModelForCausalLM.from_pretrained(folder, dequantize=True)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(model(ids).logits, dense(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert same(files_of(tmp_path / "saved"), decoded(encoded("int4"), torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_generate_with_dynamic_and_static_cache(tmp_path: Path, ids: torch.Tensor) -> None:
    folder = folder_of(tmp_path)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, dequantize=True)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(ids, **settings)
    assert torch.equal(native.generate(ids, **settings), expected)
    assert torch.equal(native.generate(ids, cache_implementation="static", **settings), expected)
    beams = settings | {"num_beams": 2}
    assert torch.equal(native.generate(ids, **beams), dense.generate(ids, **beams))


COMPILED = """
import sys, torch, transformers_k2
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.randint(3, 320, (3, 9))
settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
with torch.no_grad():
    expected = model(ids, use_cache=False).logits
    tokens = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), tokens)
"""


@pytest.mark.slow
def test_compiled_without_a_graph_break(tmp_path: Path) -> None:
    """In a process of its own: the checks of types that only tests have do not compile."""
    subprocess.run([sys.executable, "-c", COMPILED, str(folder_of(tmp_path))], check=True)


DEVICES = {
    "cpu": "cpu",
    "auto": "auto",
    "disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("codec", ["int4", "fp8"])
@pytest.mark.parametrize("devices", DEVICES)
def test_device_maps_and_offloading_to_disk(
    tmp_path: Path, ids: torch.Tensor, devices: str, codec: str
) -> None:
    folder = folder_of(tmp_path / "hub", codec)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    options = {"device_map": DEVICES[devices], "offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    offloaded = model.model.layers[1].self_attn.o_proj.weight.device.type
    assert offloaded == ("meta" if devices == "disk" else "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=2e-2, atol=2e-2)
    model.save_pretrained(tmp_path / "saved")
    assert same(
        files_of(tmp_path / "saved"),
        encoded("int4") if codec == "int4" else decoded(encoded("fp8"), torch.bfloat16),
    )


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int4"])
def test_linear_layers_in_nf4_beside_experts_in_int4(tmp_path: Path, ids: torch.Tensor, codec: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    folder = folder_of(tmp_path, codec)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.float32)
    layer = model.model.layers[1]
    assert isinstance(layer.self_attn.o_proj, bnb.nn.Linear4bit)
    assert isinstance(layer.mlp.shared_experts.up_proj, bnb.nn.Linear4bit)
    assert layer.self_attn.o_proj.weight.quant_type == "nf4"
    assert type(layer.mlp.experts) is PackedExperts
    assert model.lm_head.weight.dtype == torch.float32
    expected = to_int4(decoded(encoded(codec), torch.bfloat16)) if codec != "int4" else encoded("int4")
    stack = model.state_dict()[f"{EXPERTS}down_proj_packed"]
    assert torch.equal(stack[3], expected[f"{EXPERTS}3.down_proj.weight_packed"])
    # Each linear layer computes with its own weight, rounded to NF4: not with another's.
    weight = decoded(encoded(codec), torch.float32)["model.layers.1.self_attn.o_proj.weight"]
    x = torch.randn(5, weight.shape[1])
    error = (layer.self_attn.o_proj(x) - x @ weight.T).norm() / (x @ weight.T).norm()
    assert 0.02 < error < 0.2
    assert model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"bitsandbytes have no published form.*adapter"):
        model.save_pretrained(tmp_path / "saved")


def test_linear_layers_by_quanto(tmp_path: Path, ids: torch.Tensor) -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    folder = folder_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))
    assert type(model.model.layers[1].self_attn.o_proj).__name__ == "QLinear"
    assert type(model.model.layers[1].mlp.experts) is PackedExperts
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert (model(ids).logits - dense(ids).logits).norm() < 0.1 * dense(ids).logits.norm()


def test_int4_beside_the_experts_is_dequantised_and_said(
    tmp_path: Path, ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = dict(encoded("int4"))
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    more = to_int4({name.replace("shared_experts", "experts.0"): tensors.pop(name)})
    tensors |= {key.replace("experts.0", "shared_experts"): value for key, value in more.items()}
    quantization = copy.deepcopy(INT4_CONFIG) | {"ignore": ["lm_head", "re:.*self_attn.*"]}
    folder = write(tmp_path / "hub", tensors, hub_config(quantization_config=quantization))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "1 INT4 weights that are no routed experts" in caplog.text
    expected = decoded(tensors, torch.bfloat16)
    assert torch.equal(model.state_dict()[name], expected[name])
    model.save_pretrained(tmp_path / "saved")
    saved = files_of(tmp_path / "saved")
    assert torch.equal(saved[name], expected[name])
    config = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert config["ignore"] == INT4_CONFIG["ignore"]
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits
    )


def changed_weights(**changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(INT4_CONFIG)
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_bits": 8}, r"num_bits 8: expected 4"),
        ({"symmetric": False}, r"symmetric False: expected True"),
        ({"type": "float"}, r"type 'float': expected 'int'"),
        (
            {"group_size": 64},
            r"experts\.\d\.\w+_proj\.weight_scale has shape \[\d+, \d+\].*asks for \[\d+, \d+\]",
        ),
        ({"group_size": 0}, r"group_size 0: expected a positive integer"),
        ({"strategy": "channel"}, r"strategy 'channel': expected 'group'"),
    ],
)
@pytest.mark.parametrize("dequantize", [False])
def test_configs_that_are_not_k2s(
    tmp_path: Path, changes: dict[str, Any], told: str, dequantize: bool
) -> None:
    folder = folder_of(tmp_path, quantization_config=changed_weights(**changes))
    with pytest.raises(ValueError, match=told) as error:
        AutoModelForCausalLM.from_pretrained(folder, dequantize=dequantize)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    "kind", ["scale shape", "scale missing", "scale NaN", "weight_shape", "packed shape"]
)
def test_damaged_tensors_are_named(tmp_path: Path, kind: str, dequantize: bool) -> None:
    tensors = dict(encoded("int4"))
    name = f"{EXPERTS}4.up_proj.weight"
    if kind == "scale shape":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:-1].clone()
    elif kind == "scale missing":
        del tensors[f"{name}_scale"]
    elif kind == "scale NaN":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"].clone().index_fill_(0, torch.tensor(7), torch.nan)
    elif kind == "weight_shape":
        tensors[f"{name}_shape"] = torch.tensor([96, 248], dtype=torch.int32)
    else:
        tensors[f"{name}_packed"] = tensors[f"{name}_packed"][:, :-1].clone()
    folder = write(tmp_path, tensors, hub_config(quantization_config=INT4_CONFIG))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.4\.up_proj\.weight") as error:
        AutoModelForCausalLM.from_pretrained(folder, dequantize=dequantize)
    assert "expected" in str(error.value) or "asks for" in str(error.value) or "missing" in str(error.value)


def test_weights_that_are_not_finite_are_not_quantised(tmp_path: Path) -> None:
    tensors = dict(encoded("bf16"))
    name = f"{EXPERTS}2.gate_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][5, 6] = torch.nan
    folder = write(tmp_path, tensors, hub_config())
    with pytest.raises(ValueError, match=r"experts\.2\.gate_proj\.weight.*1 weights that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int4Config())


def test_no_quantization_config_is_that_of_the_files(tmp_path: Path) -> None:
    """Scripts pass their option on, whether it is set or not; transformers would forget what config.json says."""
    folder = folder_of(tmp_path)
    for cls in (AutoModelForCausalLM, KimiK2ForCausalLM):
        model = cls.from_pretrained(folder, quantization_config=None)
        assert type(model.model.layers[1].mlp.experts) is PackedExperts


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"group_size is 0: expected a positive integer"):
        Int4Config(group_size=0)
    with pytest.raises(ValueError, match=r"convention is 'awq': expected one of kimi, compressed_tensors"):
        Int4Config(convention="awq")


def test_another_quantisation_of_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'compressed-tensors'.*asks for 'fp8': expected none"):
        AutoModelForCausalLM.from_pretrained(folder_of(tmp_path), quantization_config=FineGrainedFP8Config())
