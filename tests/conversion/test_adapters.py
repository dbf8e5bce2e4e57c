"""Adapters in both forms and merges, against PEFT: its loader, its sums bit for bit, its scalings."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM
from typer.testing import CliRunner

import checkpoints
from conversion_results import problems, read, same, stray
from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.cli import app
from transformers_k2.conversion import crew, export_adapter, lora, merge_adapter, quantize, verify
from transformers_k2.conversion.adapters import Lora, open_adapter
from transformers_k2.quantization.codecs import fp8_block

pytestmark = [
    # PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
Tensor = torch.Tensor
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_a_proj", "kv_b_proj", "o_proj"]
IDS = torch.arange(22).view(2, 11) * 13 % 320
# What a LoraConfig may say: ranks, scalings and targets that a mapping could get wrong.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": [*EXPERTS, *ATTENTION]},
    "rslora": {"target_modules": [*EXPERTS, "o_proj"], "use_rslora": True},
    "ranks": {
        "target_modules": [*EXPERTS, *ATTENTION],
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"o_proj": 10},
    },
    "scalings": {
        "target_modules": [*EXPERTS, "o_proj"],
        "alpha_pattern": {"o_proj": 1, r".*\.shared_experts\.up_proj": 7},
    },
    "gate and up": {"target_modules": None, "target_parameters": ["experts.gate_up_proj"]},
    "down": {"target_modules": ["o_proj"], "target_parameters": ["model.layers.2.mlp.experts.down_proj"]},
    "router": {"target_modules": [*EXPERTS, "gate"]},
    "dense": {"target_modules": ["q_a_proj", "lm_head"]},
}


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_UNIT", 256 * 20)


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    stock: DeepseekV3ForCausalLM = checkpoints.stock_model()
    return checkpoints.per_expert(stock)


@pytest.fixture(scope="module")
def base(plain: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "bf16"
    return checkpoints.write(folder, plain, checkpoints.hub_config(), stray=False)


@pytest.fixture(scope="module")
def model(base: Path) -> KimiK2ForCausalLM:
    return KimiK2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def trained(model: KimiK2ForCausalLM, **options: Any) -> Any:
    """A PEFT model whose adapter does something."""
    peft = get_peft_model(
        copy.deepcopy(model), LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return peft


class Made(NamedTuple):
    """A trained adapter's folder and what PEFT makes of it."""

    folder: Path
    merged: dict[str, Tensor]  # under the hub's names
    deltas: dict[str, Tensor]  # by the hub's module names
    logits: Tensor  # in float32


Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(model: KimiK2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(name)`: the adapter of OPTIONS[name], made once."""

    @cache
    def build(name: str) -> Made:
        folder = tmp_path_factory.mktemp("adapter")
        peft = trained(model, **OPTIONS[name])
        peft.save_pretrained(folder, save_embedding_layers=False)
        wide = copy.deepcopy(peft).float()
        return Made(folder, merged(peft), dict(deltas_of(wide)), logits(wide))

    return build


def deltas_of(peft: Any) -> Iterator[tuple[str, Tensor]]:
    """PEFT's own update of each hub weight."""
    for key, module in peft.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta, stem = module.get_delta_weight("default").detach(), key.removesuffix(".base_layer")
        if not stem.endswith(".experts"):
            yield stem, delta
            continue
        parts = {"gate_up_proj": EXPERTS[:2], "down_proj": EXPERTS[2:]}[module.parameter_name]
        for expert, each in enumerate(delta):
            for part, rows in zip(parts, each.chunk(len(parts)), strict=True):
                yield f"{stem}.{expert}.{part}", rows


def merged(peft: Any) -> dict[str, Tensor]:
    """What PEFT makes of it, under the hub's names."""
    return checkpoints.per_expert(peft.merge_and_unload())


@torch.no_grad()
def logits(peft: Any) -> Tensor:
    return peft(IDS).logits


@pytest.mark.parametrize("name", OPTIONS)
def test_serving_form(name: str, make: Make, tmp_path: Path) -> None:
    """One rank for all, each product PEFT's, and the way back restores every byte."""
    folder, _, deltas, _ = make(name)
    config = export_adapter(folder, tmp_path / "serving")
    tensors = load_file(tmp_path / "serving/adapter_model.safetensors")
    assert {tensor.shape["lora_B" in key] for key, tensor in tensors.items()} == {config["r"]}
    assert bool(config["alpha_pattern"]) == (name == "scalings")
    assert len(tensors) == 2 * len(deltas)
    for module, expected in deltas.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        alpha = next(
            (v for k, v in config["alpha_pattern"].items() if re.fullmatch(k, module)), config["lora_alpha"]
        )
        scaling = alpha / (config["r"] ** (0.5 if config["use_rslora"] else 1))
        torch.testing.assert_close(scaling * b @ a, expected, rtol=1e-5, atol=1e-6)
    if open_adapter(folder).form is None:  # no experts: one form serves both
        return
    export_adapter(tmp_path / "serving", tmp_path / "back", "peft")
    same(
        load_file(tmp_path / "back/adapter_model.safetensors"),
        load_file(folder / "adapter_model.safetensors"),
    )
    before, after = (
        json.loads((one / "adapter_config.json").read_text()) for one in (folder, tmp_path / "back")
    )
    assert after == before


@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if name != "gate and up"]
)  # PEFT's limit: peft_mapping.py
def test_peft_loads_the_serving_form(name: str, make: Make, model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    made = make(name)
    export_adapter(made.folder, tmp_path / "serving")
    wide = copy.deepcopy(model).float()
    before = logits(wide)
    after = logits(PeftModel.from_pretrained(wide, tmp_path / "serving"))
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(after, made.logits, rtol=1e-4, atol=1e-5)


def per_expert_file(folder: Path, base: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """An adapter of remote code's model: gate and up with matrices of their own."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in base.items():
        if name.endswith("_proj.weight") and (".mlp." in name or "o_proj" in name):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(3, weight.shape[1], generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 3, generator=generator)
    config = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": [*EXPERTS, "o_proj"]}
    LoraConfig(**config | options).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["alpha / r", "rslora"])
def test_a_foreign_per_expert_file_becomes_what_peft_makes_of_it(
    options: dict[str, Any], plain: dict[str, Tensor], model: KimiK2ForCausalLM, tmp_path: Path
) -> None:
    per_expert_file(tmp_path / "foreign", plain, **options)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "foreign")
    loaded.save_pretrained(tmp_path / "theirs")
    export_adapter(tmp_path / "foreign", tmp_path / "ours", "peft")
    ours, theirs = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    same(ours, theirs)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", ["peft", "serving"])
def test_merge_is_pefts_bit_for_bit(name: str, form: str, make: Make, base: Path, tmp_path: Path) -> None:
    made = make(name)
    folder = made.folder
    if form == "serving":
        folder = tmp_path / "serving"
        export_adapter(made.folder, folder)
    merge_adapter(base, folder, tmp_path / "dst", shard_bytes=600_000)
    found = read(tmp_path / "dst")
    same(found, made.merged)
    before = read(base)
    assert any(not torch.equal(found[name], before[name]) for name in found)
    assert problems(tmp_path / "dst") == []
    assert verify(tmp_path / "dst", base, adapter=folder, quiet=True).ok
    assert not verify(tmp_path / "dst", base, quiet=True).ok


def test_merge_of_bf16_adapters(make: Make, base: Path, model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    """PEFT raises them to float32 when it loads them."""
    folder = shutil.copytree(make("plain").folder, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    merge_adapter(base, folder, tmp_path / "dst")
    same(read(tmp_path / "dst"), merged(PeftModel.from_pretrained(copy.deepcopy(model), folder)))


@pytest.fixture
def int4(plain: dict[str, Tensor], tmp_path: Path) -> Path:
    config = checkpoints.hub_config(quantization_config=checkpoints.INT4_CONFIG)
    packed = checkpoints.to_int4(plain, torch.int64)
    renamed = {f"language_model.{name}": tensor for name, tensor in packed.items()}
    return checkpoints.write(tmp_path / "int4", renamed, {"model_type": "kimi_k25", "text_config": config})


@pytest.mark.parametrize("to", [None, "bf16"])
def test_merge_into_packed_experts(
    to: str | None, int4: Path, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """PEFT's sums on the dequantised model, on the textbook's grid again; layer 1 and gate_up are not touched."""
    meaning = checkpoints.decoded(checkpoints.to_int4(plain), torch.bfloat16)
    dense = checkpoints.write(tmp_path / "dense", meaning, checkpoints.hub_config())
    peft = trained(KimiK2ForCausalLM.from_pretrained(dense, dtype=torch.bfloat16), **OPTIONS["down"])
    peft.save_pretrained(tmp_path / "adapter")
    merge_adapter(int4, tmp_path / "adapter", tmp_path / "dst", to=to)
    found = {
        name.removeprefix("language_model."): tensor for name, tensor in stray(read(tmp_path / "dst")).items()
    }
    sums = merged(peft)
    if to == "bf16":
        same(found, sums)
    else:
        before = checkpoints.to_int4(plain, torch.int64)
        touched = {name for name in before if "layers.2.mlp.experts." in name and "down_proj" in name}
        same(
            {name: found[name] for name in touched},
            {name: checkpoints.to_int4(sums)[name] for name in touched},
        )
        assert any(not torch.equal(found[name], before[name]) for name in touched)
        dense = {name for name in before if "o_proj" in name}
        same({name: found[name] for name in dense}, {name: sums[name] for name in dense})
        rest = before.keys() - touched - dense
        same({name: found[name] for name in rest}, {name: before[name] for name in rest})
        assert problems(tmp_path / "dst") == []


def test_merge_then_quantise_is_the_same(int4: Path, make: Make, tmp_path: Path) -> None:
    folder = make("plain").folder
    merge_adapter(int4, folder, tmp_path / "direct")
    merge_adapter(int4, folder, tmp_path / "dense", to="bf16")
    quantize(tmp_path / "dense", tmp_path / "packed")
    direct, packed = read(tmp_path / "direct"), read(tmp_path / "packed")
    same(direct, packed)


def test_merge_into_fp8_gives_bf16(make: Make, plain: dict[str, Tensor], tmp_path: Path) -> None:
    fp8 = checkpoints.to_fp8(plain)
    config = checkpoints.hub_config(quantization_config=checkpoints.FP8_CONFIG)
    src = checkpoints.write(tmp_path / "src", fp8, config)
    meaning = checkpoints.decoded(fp8, torch.bfloat16)
    dense = checkpoints.write(tmp_path / "dense", meaning, checkpoints.hub_config())
    folder = make("plain").folder
    peft = PeftModel.from_pretrained(KimiK2ForCausalLM.from_pretrained(dense, dtype=torch.bfloat16), folder)
    merge_adapter(src, folder, tmp_path / "dst")
    same(stray(read(tmp_path / "dst")), merged(peft))
    assert problems(tmp_path / "dst") == []


def test_merge_within_fp8(make: Make, plain: dict[str, Tensor], tmp_path: Path) -> None:
    """What is touched is the textbook's FP8 of PEFT's sum; the rest keeps its bytes."""
    fp8 = checkpoints.to_fp8(plain)
    config = checkpoints.hub_config(quantization_config=checkpoints.FP8_CONFIG)
    src = checkpoints.write(tmp_path / "src", fp8, config)
    dense = checkpoints.write(
        tmp_path / "dense", checkpoints.decoded(fp8, torch.bfloat16), checkpoints.hub_config()
    )
    folder = make("plain").folder
    sums = merged(
        PeftModel.from_pretrained(KimiK2ForCausalLM.from_pretrained(dense, dtype=torch.bfloat16), folder)
    )
    merge_adapter(src, folder, tmp_path / "dst", to="fp8")
    found, before = stray(read(tmp_path / "dst")), checkpoints.decoded(fp8, torch.bfloat16)
    touched = {name for name in sums if not torch.equal(sums[name], before[name])}
    assert touched
    for name in fp8:
        weight = name.removesuffix("_scale_inv")
        if weight not in touched:
            assert torch.equal(found[name].view(torch.uint8), fp8[name].view(torch.uint8)), name
        elif name == weight and f"{name}_scale_inv" in fp8:
            codes, scale = fp8_block.encode(sums[name])
            assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(found[f"{name}_scale_inv"], scale)
        elif name == weight:
            assert torch.equal(found[name], sums[name]), name
    assert problems(tmp_path / "dst") == []
    assert verify(tmp_path / "dst", src, adapter=folder, quiet=True).ok


def test_merge_into_fused_experts(make: Make, model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    """transformers' own layout comes out as the hub's, in the dtype it had."""
    src = checkpoints.write(tmp_path / "src", dict(model.state_dict()), checkpoints.hub_config(), stray=False)
    merge_adapter(src, make("plain").folder, tmp_path / "dst")
    same(read(tmp_path / "dst"), make("plain").merged)
    wide = {name: tensor.float() for name, tensor in model.state_dict().items()}
    config = checkpoints.hub_config(torch_dtype="float32")
    src = checkpoints.write(tmp_path / "wide", wide, config, stray=False)
    merge_adapter(src, make("plain").folder, tmp_path / "float32")
    peft = PeftModel.from_pretrained(copy.deepcopy(model).float(), make("plain").folder)
    same(read(tmp_path / "float32"), merged(peft))
    assert problems(tmp_path / "float32") == []
    with pytest.raises(ValueError, match="wide is F32: expected to=None, which keeps that"):
        merge_adapter(src, make("plain").folder, tmp_path / "none", to="bf16")


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"
STACK = "base_model.model.model.layers.1.mlp.experts"
FAULTS: dict[str, tuple[Change, str]] = {
    "dora": (lambda config, tensors: config.update(use_dora=True), "use_dora True: expected a plain LoRA"),
    "bias": (lambda config, tensors: config.update(bias="all"), "bias 'all': expected a plain LoRA"),
    "pissa": (lambda config, tensors: config.update(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "other method": (lambda config, tensors: config.update(peft_type="LOHA"), "peft_type 'LOHA'"),
    "other tensors": (
        lambda config, tensors: tensors.update({f"{O_PROJ}.lora_magnitude_vector": torch.ones(256)}),
        "lora_magnitude_vector F32 .*expected floating lora_A.weight and lora_B.weight",
    ),
    "half": (lambda config, tensors: tensors.pop(f"{O_PROJ}.lora_B.weight"), r"o_proj has no lora_B\.weight"),
    "rank": (
        lambda config, tensors: tensors.update({f"{O_PROJ}.lora_A.weight": torch.ones(4, 128)}),
        r"o_proj has lora_A \[4, 128\] and lora_B \[256, 3\]: expected \[3, in\]",
    ),
    "expert rank": (
        lambda config, tensors: config["rank_pattern"].clear(),
        r"different numbers of experts \(12 in .*gate_up_proj, 6 in",
    ),
    "shape": (
        lambda config, tensors: tensors.update({f"{O_PROJ}.lora_A.weight": torch.ones(3, 99)}),
        r"o_proj is \[256, 128\] in .*, but the adapter's product is \[256, 99\]",
    ),
    "unknown": (
        lambda config, tensors: tensors.update(
            {name.replace("layers.0", "layers.9"): tensor.clone() for name, tensor in tensors.items() if O_PROJ in name}
        ),
        r"adapts model\.layers\.9\.self_attn\.o_proj, which .* lacks \(1 of",
    ),
    "experts": (
        lambda config, tensors: tensors.update(
            {f"{STACK}.lora_A.weight": torch.ones(15, 96), f"{STACK}.lora_B.weight": torch.ones(256, 15)}
        ),
        "different numbers of experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_adapters_are_refused_before_a_byte_is_written(
    fault: str, make: Make, base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(make("plain").folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change, message = FAULTS[fault]
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        merge_adapter(base, folder, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name: ".experts.3.up_proj." in name,
            r"lacks .*experts\.3\.up_proj \(2 missing\)|lacks .*3\.up_proj \(1 missing\)",
        ),
        (lambda name: ".experts.3.up_proj.lora_A" in name, r"experts\.3\.up_proj has no lora_A\.weight"),
    ],
)
def test_incomplete_experts_have_no_peft_form(
    change: Callable[[str], bool], message: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = per_expert_file(tmp_path / "foreign", plain)
    kept = {name: tensor for name, tensor in tensors.items() if not change(name)}
    save_file(kept, tmp_path / "foreign/adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        export_adapter(tmp_path / "foreign", tmp_path / "dst", "peft")
    assert not (tmp_path / "dst/adapter_config.json").exists()


def test_mixed_ranks_have_no_peft_form(plain: dict[str, Tensor], tmp_path: Path) -> None:
    options = {"rank_pattern": {r"experts\.4\.up_proj": 2}}
    tensors = per_expert_file(tmp_path / "foreign", plain, **options)
    for name in tensors:
        if ".experts.4.up_proj" in name:
            tensors[name] = (tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]).contiguous()
    save_file(tensors, tmp_path / "foreign/adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"gate_up_proj is one parameter in PEFT, but its experts have rank 2, .*rank 3"
    ):
        export_adapter(tmp_path / "foreign", tmp_path / "dst", "peft")


def test_destinations(make: Make, base: Path, tmp_path: Path) -> None:
    folder = make("plain").folder
    with pytest.raises(ValueError, match="is the adapter itself"):
        export_adapter(folder, folder)
    with pytest.raises(ValueError, match="is in the peft form already: expected form='serving'"):
        export_adapter(folder, tmp_path / "dst", "peft")
    with pytest.raises(ValueError, match="form is 'vllm': expected one of serving, peft"):
        export_adapter(folder, tmp_path / "dst", "vllm")
    export_adapter(folder, tmp_path / "dst")
    with pytest.raises(ValueError, match="holds an adapter already"):
        export_adapter(folder, tmp_path / "dst")
    export_adapter(folder, tmp_path / "dst", overwrite=True)
    with pytest.raises(ValueError, match="is not INT4: expected to='bf16'"):
        merge_adapter(base, folder, tmp_path / "merged", to="int4")
    with pytest.raises(ValueError, match="to is 'fp4': expected one of bf16, fp8, int4"):
        merge_adapter(base, folder, tmp_path / "merged", to="fp4")


def test_an_adapter_of_a_model_with_fewer_experts(make: Make, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(make("down").folder, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    stack = STACK.replace("layers.1", "layers.2")
    tensors |= {f"{stack}.lora_A.weight": torch.ones(15, 96), f"{stack}.lora_B.weight": torch.ones(256, 15)}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.experts\.down_proj has 6 experts in .*, but 5 in the adapter"
    ):
        merge_adapter(base, folder, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_folders_that_are_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bf16 has no adapter_config\.json: expected an adapter folder"):
        merge_adapter(base, base, tmp_path / "dst")
    with pytest.raises(ValueError, match=r"nowhere has no adapter_config\.json"):
        export_adapter(tmp_path / "nowhere", tmp_path / "dst")


def test_an_adapter_on_a_full_disk(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ValueError, match="serving is full"):
        export_adapter(make("plain").folder, tmp_path / "serving")
    assert list((tmp_path / "serving").iterdir()) == []


def test_commands(make: Make, base: Path, tmp_path: Path) -> None:
    folder, sums, *_ = make("scalings")
    told = CliRunner().invoke(app, ["adapter", str(folder), str(tmp_path / "serving")])
    assert told.exit_code == 0, told.output
    assert "serving form, rank 6" in told.output
    assert "alpha_pattern" in told.output
    told = CliRunner().invoke(
        app, ["merge", str(base), str(tmp_path / "serving"), str(tmp_path / "dst"), "--quiet"]
    )
    assert told.exit_code == 0, told.output
    same(read(tmp_path / "dst"), sums)


def test_products_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands over blocks of other sizes, in order, and again from the start."""
    monkeypatch.setattr(lora, "_AT_ONCE", 7 * 20)
    b, a = torch.randn(50, 3), torch.randn(3, 20)
    product = lora._Product(Lora(a, b, 1.5, 0.5, on_parameter=False))
    expected = b.double() @ a.double() * 0.5
    for step in (1, 6, 7, 20, 50):
        rows = torch.cat([product.rows(start, min(start + step, 50)) for start in range(0, 50, step)])
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
    assert len(product.blocks) <= lora._KEPT
