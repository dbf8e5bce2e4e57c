"""Cut and grown checkpoints against transformers' own model cut in memory, and against the arithmetic of routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, TrainerControl, TrainerState

import checkpoints
from conversion_results import problems, read, same, stray
from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.conversion import convert, crew, engine, inspect, quantize
from transformers_k2.conversion.slicing import drop_experts, slice_model
from transformers_k2.conversion.upcycle import upcycle
from transformers_k2.lazy_tensors import OpenFiles
from transformers_k2.manifest import expected_tensors
from transformers_k2.moe import RouterBalance
from transformers_k2.training.expert_load import LINES, ExpertLoadMonitor

Tensor = torch.Tensor
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 240,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
    "initializer_range": 0.2,  # outputs that depend on every expert
    "torch_dtype": "float32",
    "model_type": "deepseek_v3",
    "tie_word_embeddings": False,
}
IDS = torch.arange(22).view(2, 11) * 4


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a few rows, as real matrices have."""
    monkeypatch.setattr(crew, "_UNIT", 48 * 20)


def small_config(**changes: Any) -> dict[str, Any]:
    config = checkpoints.hub_config(**(SMALL | changes))
    del config["auto_map"]
    return config


def small_model(config: dict[str, Any], seed: int = 0) -> DeepseekV3ForCausalLM:
    """transformers' model in float32 with a router bias that is not zero."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model


def small_folder(path: Path, **changes: Any) -> tuple[Path, DeepseekV3ForCausalLM]:
    config = small_config(**changes)
    model = small_model(config)
    tensors = checkpoints.per_expert(model)
    folder = checkpoints.write(path, tensors, config, stray=False)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder, model


def loaded(folder: Path) -> DeepseekV3ForCausalLM:
    """By transformers alone, nothing missing and nothing left."""
    model, told = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def cut_in_memory(
    model: DeepseekV3ForCausalLM,
    layers: Sequence[int],
    experts: dict[int, list[int]],
    **changes: Any,
) -> DeepseekV3ForCausalLM:
    """The smaller model by plain indexing of transformers' tensors, whose experts are stacks."""
    config = small_config(**(model.config.to_dict() | SMALL | {"num_hidden_layers": len(layers)} | changes))
    state = model.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    for place, layer in enumerate(layers):
        stem = f"model.layers.{layer}."
        for name in (one for one in state if one.startswith(stem)):
            tensor = state[name]
            if layer in experts and ("mlp.experts." in name or "mlp.gate." in name):
                tensor = tensor[experts[layer]]
            tensors[f"model.layers.{place}.{name.removeprefix(stem)}"] = tensor
    result = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).eval()
    result.load_state_dict(tensors)
    return result


def expected_slice(
    tensors: dict[str, Tensor], layers: Sequence[int], experts: dict[int, list[int]]
) -> dict[str, Tensor]:
    """Names of a hub checkpoint, one after the other, in any codec."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "layers" not in parts:
            found[name] = tensor
            continue
        at = parts.index("layers") + 1
        source = int(parts[at])
        kept = tensor
        if "experts" in parts:
            number = parts.index("experts") + 1
            if int(parts[number]) not in experts[source]:
                continue
            parts[number] = str(experts[source].index(int(parts[number])))
        elif "gate" in parts:
            kept = tensor[experts[source]]
        for place in [place for place, layer in enumerate(layers) if layer == source]:
            parts[at] = str(place)
            found[".".join(parts)] = kept
    return found


# -- slices


@pytest.mark.parametrize(
    ("layers", "experts", "changes"),
    [
        (3, None, {}),
        ([0, 3, 2, 3], [6, 1, 4], {}),
        (None, 4, {}),
        ([2, 4], {2: [7, 0, 3, 5], 3: [1], 4: [1, 2, 6, 4]}, {"n_group": 2, "topk_group": 1}),
        ([1], None, {}),
    ],
)
def test_slices_are_the_model_cut_in_memory(
    tmp_path: Path, layers: Any, experts: Any, changes: dict[str, Any]
) -> None:
    src, model = small_folder(tmp_path / "src", **changes)
    told = slice_model(src, tmp_path / "dst", layers=layers, experts=experts, shard_bytes=60_000, quiet=True)
    chosen = list(range(5))[:layers] if layers is None or isinstance(layers, int) else layers
    rows = (
        list(range(8)) if experts is None else list(range(experts)) if isinstance(experts, int) else experts
    )
    kept = rows if isinstance(rows, dict) else dict.fromkeys((2, 3, 4), rows)
    num_dense = sum(layer < 2 for layer in chosen)
    sizes = changes | {"n_routed_experts": len(kept[2]), "first_k_dense_replace": num_dense}
    cut = cut_in_memory(model, chosen, kept, **sizes)
    assert torch.equal(logits(loaded(tmp_path / "dst")), logits(cut))
    assert problems(tmp_path / "dst") == []
    config = json.loads((tmp_path / "dst/config.json").read_text())
    assert config == small_config(**sizes, num_hidden_layers=len(chosen))
    assert (tmp_path / "dst/tokenizer_config.json").exists()
    assert told.lines[0].startswith(f"from 5 layers (3 with 8 experts) to {len(chosen)} layers (")


def with_names(spec: dict[str, Any], key: str, names: list[str]) -> dict[str, Any]:
    return spec | {key: [*spec.get(key, ()), *names]}


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4", "k25"])
def test_what_is_kept_keeps_its_bits(tmp_path: Path, form: str) -> None:
    plain = checkpoints.per_expert(checkpoints.stock_model())
    config, rename = checkpoints.hub_config(), ""
    odd = "model.layers.2.mlp.shared_experts.up_proj"  # a module that is named because it stays plain
    if form == "fp8":
        tensors = checkpoints.to_fp8(plain)
        tensors[f"{odd}.weight"] = plain[f"{odd}.weight"]
        del tensors[f"{odd}.weight_scale_inv"]
        spec = with_names(checkpoints.FP8_CONFIG, "modules_to_not_convert", [odd])
        config["quantization_config"] = spec
    elif form == "bf16":
        tensors = plain
    else:
        tensors = checkpoints.to_int4(plain)
        config["quantization_config"] = with_names(checkpoints.INT4_CONFIG, "ignore", [odd])
    if form == "k25":
        rename = "language_model."
        config = {"model_type": "kimi_k25", "text_config": config, "dtype": "bfloat16"}
    tensors = {rename + name: tensor for name, tensor in tensors.items()}
    extras = {"vision_tower.blocks.0.wqkv.weight": torch.randn(24, 16)} if form == "k25" else {}
    src = checkpoints.write(tmp_path / "src", tensors | extras, config, stray=form != "k25")
    layers, experts = [0, 2], {2: [5, 0, 3]}
    slice_model(src, tmp_path / "dst", layers=layers, experts=[5, 0, 3])
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    expected = expected_slice(kept, layers, experts)
    same(stray(read(tmp_path / "dst")), expected | extras)
    assert inspect(tmp_path / "dst").layout == ("k25_int4" if form == "k25" else f"hub_{form}")
    assert problems(tmp_path / "dst") == []
    text = json.loads((tmp_path / "dst/config.json").read_text())
    text = text.get("text_config", text)
    if form == "fp8":
        assert text["quantization_config"]["modules_to_not_convert"] == [odd.replace("2", "1")]
    elif form != "bf16":
        assert text["quantization_config"]["ignore"] == checkpoints.INT4_CONFIG["ignore"]
    assert (text["num_hidden_layers"], text["n_routed_experts"]) == (2, 3)


@pytest.mark.parametrize("layout", ["transformers_fused", "mlx", "torchtitan", "deepseek_inference"])
def test_other_layouts(tmp_path: Path, layout: str) -> None:
    """A slice of a layout is the slice of the hub's in that layout; from one layout to another as well."""
    config = small_config(torch_dtype="bfloat16")
    plain = {
        name: tensor if "bias" in name else tensor.bfloat16()
        for name, tensor in checkpoints.per_expert(small_model(config)).items()
    }
    hub = checkpoints.write(tmp_path / "hub", plain, config)
    codec = {} if layout == "transformers_fused" else {"codec": "bf16"}
    convert(hub, tmp_path / "src", layout, **codec)
    chosen: dict[str, Any] = {"layers": [0, 4, 2], "experts": [4, 1]}
    slice_model(tmp_path / "src", tmp_path / "own", **chosen)
    slice_model(tmp_path / "src", tmp_path / "back", to="hub_bf16", **chosen)
    slice_model(hub, tmp_path / "sliced", **chosen)
    convert(tmp_path / "sliced", tmp_path / "expected", layout, **codec)
    same(read(tmp_path / "own"), read(tmp_path / "expected"))
    same(read(tmp_path / "back"), read(tmp_path / "sliced"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("own", "expected")]
    assert configs[0] == configs[1]


@pytest.fixture
def with_mtp(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A model with a layer of multi-token prediction, number 5."""
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(small_config())
    tensors = checkpoints.per_expert(model) | {
        name: torch.randn(shape)
        for name, (shape, _) in expected_tensors(config).items()
        if ".layers.5." in name
    }
    return checkpoints.write(tmp_path / "mtp", tensors, config, stray=False), tensors


def test_multi_token_prediction(tmp_path: Path, with_mtp: tuple[Path, dict[str, Tensor]]) -> None:
    """It stays, its experts cut like others, with all layers only."""
    src, tensors = with_mtp
    slice_model(src, tmp_path / "experts", experts={"2": [1, 2], "3": [2, 3], "4": [7, 0], "5": [6, 5]})  # type: ignore[arg-type]
    experts = {2: [1, 2], 3: [2, 3], 4: [7, 0], 5: [6, 5]}
    same(read(tmp_path / "experts"), expected_slice(tensors, range(6), experts))
    assert problems(tmp_path / "experts") == []
    told = slice_model(src, tmp_path / "layers", layers=4)
    left_out = f"left out: {sum(name.startswith('model.layers.5.') for name in tensors)} x model.layers.5.*"
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(("model.layers.4.", "model.layers.5."))
    }
    same(read(tmp_path / "layers"), kept)
    assert any(left_out in line for line in told.lines)
    assert json.loads((tmp_path / "layers/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert problems(tmp_path / "layers") == []
    loads = {layer: list(range(8)) for layer in (2, 3, 4)}
    for number, told in enumerate(
        (
            drop_experts(src, tmp_path / "drop", keep=2, load=loads),
            upcycle(src, tmp_path / "grow", num_experts=9, load=loads),
        )
    ):
        name = ("drop", "grow")[number]
        assert any(left_out in line for line in told.lines)
        assert json.loads((tmp_path / name / "config.json").read_text())["num_nextn_predict_layers"] == 0
        assert problems(tmp_path / name) == []
    drop_experts(src, tmp_path / "norm", keep=2)
    rows = {layer: tensors[f"model.layers.{layer}.mlp.gate.weight"].norm(dim=1) for layer in (2, 3, 4, 5)}
    best = {layer: sorted(norm.topk(2).indices.tolist()) for layer, norm in rows.items()}
    same(read(tmp_path / "norm"), expected_slice(tensors, range(6), best))


def test_dry_run_from_names_alone(tmp_path: Path) -> None:
    """With the index and the config; the same as what is written then."""
    src, _ = small_folder(tmp_path / "src")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (bare / name).write_bytes((src / name).read_bytes())
    options: dict[str, Any] = {"layers": [0, 4], "experts": 3, "shard_bytes": 50_000}
    told = slice_model(bare, tmp_path / "dst", dry_run=True, **options)
    assert not (tmp_path / "dst").exists()
    done = slice_model(src, tmp_path / "dst", **options)
    assert told[:2] == done[:2]
    assert told.num_shards == done.num_shards > 1


def test_only_what_is_kept_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, _ = small_folder(tmp_path / "src")
    num_read = 0
    original = OpenFiles.read

    def counting(self: OpenFiles, path: Path, place: Tensor, offset: int) -> None:
        nonlocal num_read
        num_read += place.nbytes
        original(self, path, place, offset)

    monkeypatch.setattr(OpenFiles, "read", counting)
    monkeypatch.setattr(engine, "_MAX_THREADS", 1)
    told = slice_model(src, tmp_path / "dst", layers=[0, 4], experts=[7, 1, 2])
    assert num_read == told.num_bytes < sum(tensor.nbytes for tensor in read(src).values()) / 2


# -- fewer experts


def test_dropping_by_loads_of_a_run(tmp_path: Path) -> None:
    """The file that training writes; the experts that transformers' routers chose most often stay."""
    src, model = small_folder(tmp_path / "src")
    ours = KimiK2ForCausalLM.from_pretrained(src, dtype=torch.float32).train()
    balance = RouterBalance(ours, bias_update_speed=0.0, balance_loss=0.0)
    monitor = ExpertLoadMonitor(balance, tmp_path / "run")
    nothing: Any = None
    state, control = TrainerState(max_steps=2), TrainerControl()
    monitor.on_train_begin(nothing, state, control)
    counts = torch.zeros(5, 8, dtype=torch.long)

    def count(layer: int, chosen: Tensor) -> None:
        counts[layer] += torch.bincount(chosen.flatten(), minlength=8)

    for layer, block in enumerate(model.model.layers[2:], 2):
        block.mlp.gate.register_forward_hook(lambda module, given, out, layer=layer: count(layer, out[2]))
    for step in range(2):
        ids = torch.randint(97, (3, 17))
        with torch.no_grad():
            ours(ids)
            model(ids)
        state.global_step = step
        monitor.on_optimizer_step(nothing, state, control)
    monitor.lines.close()
    assert len((tmp_path / "run" / LINES).read_text().splitlines()) == 2
    drop_experts(src, tmp_path / "dst", keep=3, load=tmp_path / "run" / LINES)
    kept = {}
    for layer in (2, 3, 4):
        order = sorted(range(8), key=lambda one: (-int(counts[layer][one]), one))
        kept[layer] = sorted(order[:3])
    assert len({str(rows) for rows in kept.values()}) > 1
    assert torch.equal(
        logits(loaded(tmp_path / "dst")), logits(cut_in_memory(model, range(5), kept, n_routed_experts=3))
    )
    record = json.loads((tmp_path / "dst/conversion.json").read_text())
    assert record["to"]["rule"] == "load"
    assert record["to"]["experts"] == {str(layer): rows for layer, rows in kept.items()}


def test_lines_of_loads_are_summed(tmp_path: Path) -> None:
    """The first line alone says 0 and 1, the last 2 and 3."""
    src, _ = small_folder(tmp_path / "src")
    counts = ([10, 5, 4, 0, 0, 0, 0, 0], [0, 0, 7, 6, 0, 0, 0, 0])
    lines = [
        {
            "step": step,
            "layers": {f"base_model.model.model.layers.{n}.mlp.gate": {"counts": one} for n in (2, 3, 4)},
        }
        for step, one in enumerate(counts, 1)
    ]
    (tmp_path / "loads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drop_experts(src, tmp_path / "dst", keep=2, load=tmp_path / "loads.jsonl")
    record = json.loads((tmp_path / "dst/conversion.json").read_text())
    assert record["to"]["experts"] == {"2": [0, 2], "3": [0, 2], "4": [0, 2]}


def test_groups_keep_as_many_each(tmp_path: Path) -> None:
    src, model = small_folder(tmp_path / "src", n_group=2, topk_group=2)
    loads = {f"model.layers.{layer}.mlp.gate": {"counts": [9, 8, 7, 7, 1, 5, 2, 2]} for layer in (2, 3, 4)}
    (tmp_path / "loads.json").write_text(json.dumps(loads, indent=1))
    drop_experts(src, tmp_path / "dst", keep=4, load=tmp_path / "loads.json")
    groups: dict[str, Any] = {"n_group": 2, "topk_group": 2, "n_routed_experts": 4}
    cut = cut_in_memory(model, range(5), {layer: [0, 1, 5, 6] for layer in (2, 3, 4)}, **groups)
    assert torch.equal(logits(loaded(tmp_path / "dst")), logits(cut))


# -- more experts of a mixture


def test_all_copies_chosen_is_the_same_function(tmp_path: Path) -> None:
    src, model = small_folder(tmp_path / "src")
    upcycle(src, tmp_path / "dst", num_experts=24, num_experts_per_tok=6, noise=0)
    assert torch.allclose(logits(loaded(tmp_path / "dst")), logits(model), rtol=1e-4, atol=1e-4)
    assert problems(tmp_path / "dst") == []


def test_copies_push_out_the_last_experts(tmp_path: Path) -> None:
    """Each expert twice and two for a token: the best one alone."""
    src, model = small_folder(tmp_path / "src")
    upcycle(src, tmp_path / "dst", num_experts=16, noise=0)
    alone = cut_in_memory(model, range(5), {}, num_experts_per_tok=1)
    assert torch.allclose(logits(loaded(tmp_path / "dst")), logits(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(alone), logits(model), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_copies_by_load_and_their_noise(tmp_path: Path, num_groups: int) -> None:
    groups: dict[str, Any] = {"n_group": num_groups, "topk_group": num_groups}
    src, model = small_folder(tmp_path / "src", **groups)
    tensors = read(src)
    load = {layer: [1, 30, 3, 4, 9, 6, 0, 11] for layer in (2, 3, 4)}
    # 30, then 30 / 2, then 11, then 30 / 3 = 10; within halves 30, 15 and 11, 9
    origins = [*range(8), 1, 1, 7, 1] if num_groups == 1 else [0, 1, 2, 3, 1, 1, 4, 5, 6, 7, 7, 4]
    upcycle(src, tmp_path / "dst", num_experts=12, load=load, seed=3)
    found = read(tmp_path / "dst")
    exact = expected_slice(tensors, range(5), {layer: list(range(8)) for layer in (2, 3, 4)})
    fresh = [place for place, one in enumerate(origins) if one in origins[:place]]
    for layer in (2, 3, 4):
        stem = f"model.layers.{layer}.mlp"
        for place, origin in enumerate(origins):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                name = f"{stem}.experts.{place}.{projection}.weight"
                assert torch.equal(
                    found[name], exact[name.replace(f"experts.{place}.", f"experts.{origin}.")]
                )
        bias = f"{stem}.gate.e_score_correction_bias"
        assert torch.equal(found[bias], exact[bias][origins])
        before, after = exact[f"{stem}.gate.weight"][origins], found[f"{stem}.gate.weight"]
        old = [place for place in range(12) if place not in fresh]
        assert torch.equal(after[old], before[old])
        relative = (after - before)[fresh] / before[fresh].square().mean(1, keepdim=True).sqrt()
        assert 0.007 < relative.std() < 0.013  # of 192 values around 0.01
        assert relative.abs().max() < 0.05
    # transformers' model with the same rows in memory
    grown = cut_in_memory(model, range(5), dict.fromkeys((2, 3, 4), origins), n_routed_experts=12, **groups)
    for layer, block in enumerate(grown.model.layers[2:], 2):
        block.mlp.gate.weight.data = found[f"model.layers.{layer}.mlp.gate.weight"]
    assert torch.equal(logits(loaded(tmp_path / "dst")), logits(grown))
    assert problems(tmp_path / "dst") == []


def test_draws_depend_on_seed_and_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, _ = small_folder(tmp_path / "src")
    upcycle(src, tmp_path / "one", num_experts=12)
    monkeypatch.setattr(crew, "_UNIT", 1 << 20)
    monkeypatch.setattr(engine, "_MAX_THREADS", 1)
    upcycle(src, tmp_path / "two", num_experts=12, shard_bytes=40_000, to="transformers_fused")
    upcycle(src, tmp_path / "three", num_experts=12, seed=1)
    one, two, three = (read(tmp_path / name) for name in ("one", "two", "three"))
    routers = [name for name in one if name.endswith("gate.weight")]
    assert len(routers) == 3
    for name in routers:
        assert torch.equal(one[name], two[name])
        assert not torch.equal(one[name], three[name])
    draws = []
    for name in routers[:2]:
        before = one[name][:4]
        draws.append((one[name][8:] - before) / before.square().mean(1, keepdim=True).sqrt())
    assert not torch.allclose(draws[0], draws[1], atol=1e-3)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_copies_keep_codes_and_scales(tmp_path: Path, form: str) -> None:
    plain = checkpoints.per_expert(checkpoints.stock_model())
    tensors = checkpoints.to_fp8(plain) if form == "fp8" else checkpoints.to_int4(plain)
    spec = checkpoints.FP8_CONFIG if form == "fp8" else checkpoints.INT4_CONFIG
    src = checkpoints.write(tmp_path / "src", tensors, checkpoints.hub_config(quantization_config=spec))
    upcycle(src, tmp_path / "dst", num_experts=9, noise=0)
    expected = dict(tensors)
    for name, tensor in tensors.items():
        if ".mlp.gate." in name:
            expected[name] = tensor[[0, 1, 2, 3, 4, 5, 0, 1, 2]]
        for origin in range(3):
            if f".experts.{origin}." in name:
                expected[name.replace(f".experts.{origin}.", f".experts.{origin + 6}.")] = tensor
    same(stray(read(tmp_path / "dst")), expected)
    assert problems(tmp_path / "dst") == []


# -- experts of a dense model

DENSE: dict[str, Any] = {"first_k_dense_replace": 5}


@pytest.mark.parametrize(
    ("granularity", "num_experts", "num_experts_per_tok", "first", "shared"),
    [
        (1, 4, None, None, "zero"),
        (1, 4, 1, 3, "dense"),
        (3, 12, 6, 0, "dense"),
        (5, 15, 5, 4, "zero"),
        (4, 8, None, 1, "dense"),
    ],
)
def test_a_dense_model_keeps_its_function(
    tmp_path: Path,
    granularity: int,
    num_experts: int,
    num_experts_per_tok: int | None,
    first: int | None,
    shared: str,
) -> None:
    src, model = small_folder(tmp_path / "src", **DENSE)
    upcycle(
        src,
        tmp_path / "dst",
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        granularity=granularity,
        shared=shared,
        first_k_dense_replace=first,
    )
    grown = loaded(tmp_path / "dst")
    assert torch.allclose(logits(grown), logits(model), rtol=1e-4, atol=1e-4)
    assert problems(tmp_path / "dst") == []
    num_dense = 1 if first is None else first
    block = grown.model.layers[num_dense].mlp
    assert block.experts.gate_up_proj.shape == (num_experts, 2 * 240 // granularity, 48)
    router = block.gate.weight
    groups = router.view(-1, granularity, 48)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(router.unique(dim=0)) == num_experts // granularity
    assert 0.15 < router.std() < 0.25
    assert (block.shared_experts.down_proj.weight.abs().max() == 0) == (shared == "zero")
    if num_dense:
        assert grown.model.layers[0].mlp.up_proj.weight.shape == (240, 48)


def test_a_dense_model_trains_all_of_its_parts(tmp_path: Path) -> None:
    """With half of the MLP each, routed and shared experts get a gradient, and so do the routers."""
    src, _ = small_folder(tmp_path / "src", **DENSE)
    upcycle(src, tmp_path / "dst", num_experts=6, granularity=2, shared="dense")
    model = loaded(tmp_path / "dst").train()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("shared", ["zero", "dense"])
def test_dense_fp8(tmp_path: Path, shared: str) -> None:
    """Slices of whole blocks keep codes and scales; halves halve scales; other slices are refused."""
    sizes: dict[str, Any] = {
        "intermediate_size": 256,
        "hidden_size": 144,
        "first_k_dense_replace": 5,
        "torch_dtype": "bfloat16",
    }
    config = small_config(**sizes)
    plain = {
        name: tensor if "bias" in name else tensor.bfloat16()
        for name, tensor in checkpoints.per_expert(small_model(config)).items()
    }
    tensors = checkpoints.to_fp8(plain)
    config["quantization_config"] = checkpoints.FP8_CONFIG
    src = checkpoints.write(tmp_path / "src", tensors, config, stray=False)
    upcycle(src, tmp_path / "dst", num_experts=6, granularity=2, shared=shared, first_k_dense_replace=3)
    found = read(tmp_path / "dst")
    assert problems(tmp_path / "dst") == []
    for layer in (3, 4):
        stem = f"model.layers.{layer}.mlp"
        for expert in range(6):
            half = expert % 2
            for part, rows in (("weight", 128), ("weight_scale_inv", 1)):
                own = slice(half * rows, half * rows + rows)
                for projection in ("gate_proj", "up_proj"):
                    whole = tensors[f"{stem}.{projection}.{part}"].view(-1, 144 if rows > 1 else 2)
                    same({"x": found[f"{stem}.experts.{expert}.{projection}.{part}"]}, {"x": whole[own]})
                down = tensors[f"{stem}.down_proj.{part}"][:, own]
                same({"x": found[f"{stem}.experts.{expert}.down_proj.{part}"]}, {"x": down})
        stored = f"{stem}.shared_experts.down_proj.weight"
        meaning = checkpoints.from_fp8_blocks(found[stored], found[f"{stored}_scale_inv"], torch.float32)
        dense = f"{stem}.down_proj.weight"
        before = checkpoints.from_fp8_blocks(tensors[dense], tensors[f"{dense}_scale_inv"], torch.float32)
        expected = before / 2 if shared == "dense" else torch.zeros(144, 128)
        assert torch.equal(meaning, expected)
    with pytest.raises(ValueError, match=r"rows 0 to 63 of an FP8 weight: expected multiples of 128"):
        upcycle(src, tmp_path / "none", num_experts=8, granularity=4)
    assert not (tmp_path / "none").exists()


# -- errors

EVEN = {2: [1] * 8, 3: [1] * 8, 4: [1] * 8}


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (slice_model, {}, "layers and experts are None"),
        (slice_model, {"layers": 0}, "layers is 0: expected 1 to 5"),
        (slice_model, {"layers": 6}, "layers is 6: expected 1 to 5"),
        (slice_model, {"layers": [0, 5]}, "layers has 5: expected numbers from 0 to 4"),
        (slice_model, {"layers": []}, "layers is empty"),
        (slice_model, {"layers": [3, 1]}, "puts layer 1, which is dense, in place 1"),
        (slice_model, {"layers": 1, "experts": 4}, "none of the layers has experts"),
        (slice_model, {"experts": 9}, "experts is 9: expected 1 to 8"),
        (slice_model, {"experts": 1}, "num_experts_per_tok is 2: expected 1 to 1"),
        (slice_model, {"experts": [0, 8]}, "experts has 8 for layer 2: expected numbers from 0 to 7"),
        (slice_model, {"experts": [1, 1]}, r"experts has \[1, 1\] for layer 2: .* each of them once"),
        (slice_model, {"experts": {2: [0, 1], 3: [0, 1]}}, "experts lacks layer 4"),
        (slice_model, {"experts": {1: [0]}}, "experts names layer 1: expected layers with experts"),
        (slice_model, {"experts": {2: [0, 1], 3: [0, 1], 4: [0, 1, 2]}}, "3 for layer 4 and 2 for layer 2"),
        (slice_model, {"layers": 3, "num_experts_per_tok": 1}, "expected None with all experts"),
        (slice_model, {"layers": 3, "to": "gguf"}, "gguf"),
        (drop_experts, {"keep": 9}, "keep is 9: expected 1 to 8"),
        (drop_experts, {"keep": 3, "rule": "load"}, "rule is 'load' and load is None: expected loads"),
        (drop_experts, {"keep": 3, "rule": "norm", "load": EVEN}, "expected no loads"),
        (drop_experts, {"keep": 3, "rule": "random"}, "expected one of load, norm"),
        (drop_experts, {"keep": 3, "load": {2: [1] * 8}}, r"no loads of layer 3 \(2 of 3 layers\)"),
        (drop_experts, {"keep": 3, "load": EVEN | {3: [1] * 7}}, "7 loads for 3: expected 8"),
        (drop_experts, {"keep": 3, "load": EVEN | {5: [1] * 8}}, "has loads of 5"),
        (drop_experts, {"keep": 3, "load": EVEN | {3: [float("nan")] * 8}}, "the load nan for 3"),
        (drop_experts, {"keep": 3, "load": "nowhere.jsonl"}, "nowhere.jsonl is no file"),
        (upcycle, {"num_experts": 8}, "num_experts is 8: expected more than the 8"),
        (upcycle, {"num_experts": 9, "noise": -1.0}, "noise is -1.0"),
        (upcycle, {"num_experts": 9, "granularity": 2}, "granularity is 2, but .* is a mixture of experts"),
        (upcycle, {"num_experts": 9, "load": EVEN | {2: [-1] * 8}}, "negative numbers for layer 2"),
        (upcycle, {"num_experts": 9, "seed": "a"}, "seed is 'a'"),
    ],
)
def test_errors_before_a_byte(
    src: Path, tmp_path: Path, function: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(src, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 8, "load": EVEN}, "load is .*, but .* is dense: expected None"),
        ({"num_experts": 8, "granularity": 7}, "granularity is 7: expected a divisor of .* 240"),
        ({"num_experts": 8, "granularity": 3}, "num_experts is 8: expected a multiple of granularity, 3"),
        (
            {"num_experts": 8, "granularity": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3: .* granularity, 2",
        ),
        ({"num_experts": 2, "granularity": 2}, "num_experts_per_tok is 4: expected no more"),
        ({"num_experts": 8, "shared": "none"}, "shared is 'none': expected one of zero, dense"),
        ({"num_experts": 8, "first_k_dense_replace": 5}, "first_k_dense_replace is 5: expected 0 to 4"),
    ],
)
def test_errors_of_a_dense_model(dense: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(dense, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("errors") / "src")[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("errors") / "dense", **DENSE)[0]


def test_a_packed_dense_model_is_refused(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "src", group_size=16, modules=[r".*\.mlp\.\w+_proj"])
    with pytest.raises(ValueError, match="is int4: expected a dense model in bf16, fp32 or FP8 blocks"):
        upcycle(tmp_path / "src", tmp_path / "dst", num_experts=4)


def test_groups_must_divide(tmp_path: Path) -> None:
    src, _ = small_folder(tmp_path / "src", n_group=4, topk_group=2)
    for options in ({"experts": 6}, {"experts": 4}):
        with pytest.raises(ValueError, match=r"cannot form the 4 groups of config.json \(n_group\)"):
            slice_model(src, tmp_path / "dst", **options)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="num_experts_per_tok is 5: expected 1 to 4, as a token has 8 experts"
    ):
        slice_model(src, tmp_path / "dst", experts=8, num_experts_per_tok=5)
    with pytest.raises(ValueError, match="10 experts cannot form the 4 groups"):
        upcycle(src, tmp_path / "dst", num_experts=10)
    assert not (tmp_path / "dst").exists()
