"""The tables in conversion/ against conversions written out here in plain torch, and against foreign code where it is there.

Each function below makes all tensors of a layout from the hub's, as the owner of the layout does it: loops over layers, no
table. `transformers` is the oracle of its own layout; mlx-lm and torchtitan, which the tests do not require, of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM

import checkpoints
from conversion_results import read, same
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.conversion.convert import convert
from transformers_k2.conversion.layout import Shape, load
from transformers_k2.manifest import expected_tensors

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Config = dict[str, Any]

# One dense layer and two with experts in all of them.
CASES: dict[str, Config] = {
    "k2": {},
    "moonlight": {"q_lora_rank": None, "n_shared_experts": 2},
    "no_shared": {"n_shared_experts": None, "first_k_dense_replace": 2},
    "mtp": {"num_nextn_predict_layers": 1},
    "two_mtp": {"num_nextn_predict_layers": 2, "q_lora_rank": None},
}
# Two ranks get whole blocks of 128 of every split projection.
RANKS: Config = {
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}


def hub(config: Config, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random weights; an MTP layer's embedding and head are the model's, as DeepSeek publishes it."""
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape).to(torch.float32 if kind == "F32" else dtype) * 0.1
        for name, (shape, kind) in expected_tensors(config, "none").items()
    }
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] += 1
    for layer in range(*mtp_range(config)):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def mtp_range(config: Config) -> tuple[int, int]:
    num_layers = config["num_hidden_layers"]
    return num_layers, num_layers + (config.get("num_nextn_predict_layers") or 0)


def layers_of(tensors: Tensors, config: Config, mtp: bool) -> Iterator[tuple[int, Tensors]]:
    """(number, tensors by what follows the number), with or without the MTP layers."""
    for layer in range(mtp_range(config)[mtp]):
        prefix = f"model.layers.{layer}."
        yield layer, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def top(tensors: Tensors, names: dict[str, str]) -> Tensors:
    return {new: tensors[old] for old, new in names.items()}


def experts_of(layer: Tensors, config: Config, projection: str, leaf: str = "weight") -> list[Tensor]:
    num = config["n_routed_experts"]
    return [layer[f"mlp.experts.{expert}.{projection}.{leaf}"] for expert in range(num)]


# The layouts.


def transformers_fused(tensors: Tensors, config: Config) -> Tensors:
    found = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for number, layer in layers_of(tensors, config, mtp=True):
        if "mlp.gate.weight" in layer:
            pairs = zip(
                experts_of(layer, config, "gate_proj"), experts_of(layer, config, "up_proj"), strict=True
            )
            prefix = f"model.layers.{number}.mlp.experts."
            found[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            found[f"{prefix}down_proj"] = torch.stack(experts_of(layer, config, "down_proj"))
    return found


def torchtitan(tensors: Tensors, config: Config, old: bool = False) -> Tensors:
    """`old`: the names of v0.2, which knows no MTP layer."""
    found = top(
        tensors,
        {
            "model.embed_tokens.weight": "tok_embeddings.weight",
            "model.norm.weight": "norm.weight",
            "lm_head.weight": "output.weight" if old else "lm_head.weight",
        },
    )
    modules = {"kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b"}
    modules |= {"o_proj": "wo"}
    modules |= {"q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b"}
    modules |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    norms |= {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "mtp_norm"}
    experts = "moe.experts" if old else "moe.routed_experts.inner_experts"
    shapes = {"w1": "", "w2": "", "w3": ""} if old else {"w1": "_EFD", "w2": "_EDF", "w3": "_EFD"}
    num_layers = config["num_hidden_layers"]
    for number, layer in layers_of(tensors, config, mtp=True):
        to = f"layers.{number}." if number < num_layers else f"mtp_layers.{number - num_layers}."
        for name, tensor in layer.items():
            module, _, leaf = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            if leaf == "e_score_correction_bias":
                found[f"{to}moe.expert_bias{'' if old else '_E'}"] = tensor
            elif module in norms:
                found[f"{to}{norms[module]}.weight"] = tensor
            elif parent == "self_attn":
                found[f"{to}attention.{modules[last]}.weight"] = tensor
            elif module == "mlp.gate":
                found[f"{to}moe.router.gate.weight"] = tensor
            elif parent == "mlp.shared_experts":
                found[f"{to}moe.shared_experts.{modules[last]}.weight"] = tensor
            elif parent == "mlp":
                found[f"{to}feed_forward.{modules[last]}.weight"] = tensor
            elif parent == "mlp.experts.0":
                stack = torch.stack(experts_of(layer, config, last))
                found[f"{to}{experts}.{modules[last]}{shapes[modules[last]]}"] = stack
    return found


def megatron(tensors: Tensors, config: Config, local: bool = False) -> Tensors:
    """`local`: without Transformer Engine, whose linear layers hold the norm before them and the experts of a layer.

    There, too, an MTP layer has its earlier name, which Megatron's distributed checkpoints keep.
    """
    found = top(
        tensors,
        {
            "model.embed_tokens.weight": "embedding.word_embeddings.weight",
            "model.norm.weight": "decoder.final_layernorm.weight",
            "lm_head.weight": "output_layer.weight",
        },
    )
    attention = {
        "q_proj": "linear_q_proj.weight",
        "q_a_proj": "linear_q_down_proj.weight",
        "q_a_layernorm": "q_layernorm.weight" if local else "linear_q_up_proj.layer_norm_weight",
        "q_b_proj": "linear_q_up_proj.weight",
        "kv_a_proj_with_mqa": "linear_kv_down_proj.weight",
        "kv_a_layernorm": "kv_layernorm.weight" if local else "linear_kv_up_proj.layer_norm_weight",
        "kv_b_proj": "linear_kv_up_proj.weight",
        "o_proj": "linear_proj.weight",
    }
    beside = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "final_layernorm"}
    num_layers = config["num_hidden_layers"]
    for number, layer in layers_of(tensors, config, mtp=True):
        outer = f"mtp.layers.{number - num_layers}."
        inner = f"{outer}{'transformer_layer' if local else 'mtp_model_layer'}."
        to = f"decoder.layers.{number}." if number < num_layers else inner
        found[f"{to}input_layernorm.weight"] = layer["input_layernorm.weight"]
        for module, name in attention.items():
            if f"self_attn.{module}.weight" in layer:
                found[f"{to}self_attention.{name}"] = layer[f"self_attn.{module}.weight"]
        sparse = "mlp.gate.weight" in layer
        norm = "pre_mlp_layernorm.weight" if sparse or local else "mlp.linear_fc1.layer_norm_weight"
        found[f"{to}{norm}"] = layer["post_attention_layernorm.weight"]
        places = {part: f"{part}linear_fc{{}}.weight" for part in ("mlp.", "mlp.shared_experts.")}
        for expert in range(config["n_routed_experts"]):
            module, leaf = (f"local_experts.{expert}.", "weight") if local else ("", f"weight{expert}")
            places[f"mlp.experts.{expert}."] = f"mlp.experts.{module}linear_fc{{}}.{leaf}"
        for source, place in places.items():
            if f"{source}gate_proj.weight" in layer:
                both = [layer[f"{source}{projection}.weight"] for projection in ("gate_proj", "up_proj")]
                found[to + place.format(1)] = torch.cat(both)
                found[to + place.format(2)] = layer[f"{source}down_proj.weight"]
        if sparse:
            found[f"{to}mlp.router.weight"] = layer["mlp.gate.weight"]
            found[f"{to}mlp.router.expert_bias"] = layer["mlp.gate.e_score_correction_bias"]
        for module, name in beside.items():
            if number >= num_layers:
                found[f"{outer}{name}.weight"] = layer[f"{module}.weight"]
    return found


def mlx(tensors: Tensors, config: Config) -> Tensors:
    """Of plain weights, or of packed ones: the same words, and offsets that make 8 of a code zero."""
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    found = {name: t for name, t in tensors.items() if not name.startswith("model.layers.")}
    for number, layer in layers_of(tensors, config, mtp=False):
        to = f"model.layers.{number}."
        taken = ("mlp.experts.", "self_attn.kv_b_proj.")
        found |= {to + name: t for name, t in layer.items() if not name.startswith(taken)}
        by_head = layer["self_attn.kv_b_proj.weight"].unflatten(0, (-1, nope + value))
        found[f"{to}self_attn.embed_q.weight"] = by_head[:, :nope].transpose(1, 2)
        found[f"{to}self_attn.unembed_out.weight"] = by_head[:, nope:]
        for projection in ("gate_proj", "up_proj", "down_proj"):
            stem = f"{to}mlp.switch_mlp.{projection}."
            if f"mlp.experts.0.{projection}.weight" in layer:
                found[f"{stem}weight"] = torch.stack(experts_of(layer, config, projection))
            elif f"mlp.experts.0.{projection}.weight_packed" in layer:
                packed = experts_of(layer, config, projection, "weight_packed")
                scales = torch.stack(experts_of(layer, config, projection, "weight_scale"))
                found[f"{stem}weight"] = torch.stack(packed).view(torch.uint32)
                found |= {f"{stem}scales": scales, f"{stem}biases": -8 * scales}
    return found


def deepseek_inference(tensors: Tensors, config: Config, num_ranks: int = 1) -> list[Tensors]:
    """One dictionary for each model-parallel rank: (new name, dimension that is split) by the last module's name."""
    leaves: dict[str, tuple[str, int | None]] = {
        "embed_tokens": ("embed", 0),
        "input_layernorm": ("attn_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "q_proj": ("wq", 0),
        "q_a_proj": ("wq_a", None),
        "q_a_layernorm": ("q_norm", None),
        "q_b_proj": ("wq_b", 0),
        "kv_a_proj_with_mqa": ("wkv_a", None),
        "kv_a_layernorm": ("kv_norm", None),
        "kv_b_proj": ("wkv_b", 0),
        "o_proj": ("wo", 1),
        "gate": ("gate", None),
        "gate_proj": ("w1", 0),
        "down_proj": ("w2", 1),
        "up_proj": ("w3", 0),
        "norm": ("norm", None),
        "lm_head": ("head", 0),
    }
    words = {"self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale"}
    words |= {"e_score_correction_bias": "bias"}
    per_rank = config["n_routed_experts"] // num_ranks
    ranks: list[Tensors] = [{} for _ in range(num_ranks)]
    for name, tensor in tensors.items():
        *parents, module, leaf = name.removeprefix("model.").split(".")
        if parents[:1] == ["layers"] and int(parents[1]) >= config["num_hidden_layers"]:
            continue
        new, dim = leaves[module]
        to = ".".join([*(words.get(part, part) for part in parents), new, words.get(leaf, leaf)])
        for rank, found in enumerate(ranks):
            if "experts" in parents:
                if int(parents[-1]) // per_rank == rank:
                    found[to] = tensor
            elif dim is None:
                found[to] = tensor
            else:
                found[to] = tensor.chunk(num_ranks, dim)[rank]
    return ranks


TEXTBOOK: dict[str, Callable[[Tensors, Config], Tensors]] = {
    "transformers_fused": transformers_fused,
    "torchtitan": torchtitan,
    "megatron": megatron,
    "mlx": mlx,
    "deepseek_inference": lambda tensors, config: deepseek_inference(tensors, config)[0],
}
# Layouts with MTP layers, but no place in them for an embedding and a head of their own.
SHARING = ("torchtitan", "megatron")
WITHOUT_MTP = ("mlx", "deepseek_inference")


def is_copy(name: str) -> bool:
    """Of what an MTP layer has in common with the model."""
    return name.startswith("model.layers.") and name.endswith(
        (".embed_tokens.weight", ".shared_head.head.weight")
    )


def made(folder: Path, tensors: Tensors, config: Config, to: str, **options: Any) -> Path:
    """The folder `to` beside a new one that holds `tensors`."""
    if not (src := folder / "src").exists():
        checkpoints.write(src, tensors, config)
    convert(src, folder / to, to=to, quiet=True, **options)
    return folder / to


# Names.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", TEXTBOOK)
def test_a_table_makes_the_names_that_its_owner_makes(layout: str, case: str) -> None:
    config = checkpoints.hub_config(**CASES[case])
    tensors = hub(config)
    named = [name for name in tensors if not (layout in SHARING and is_copy(name))]
    groups = list(load(layout).groups(named, Shape.of(config)))
    found = [name for group in groups for name in group.here]
    assert len(found) == len(set(found))
    assert set(found) == TEXTBOOK[layout](tensors, config).keys()
    claimed = [name for group in groups for name in group.members]
    depth = config["num_hidden_layers"]
    beyond = {name for name in named if any(f".{layer}." in name[:16] for layer in (depth, depth + 1))}
    assert sorted(claimed) == sorted(set(named) - beyond if layout in WITHOUT_MTP else named)


@pytest.mark.parametrize("case", ["k2", "moonlight"])
@pytest.mark.parametrize("layout", ["torchtitan", "megatron"])
def test_a_table_reads_its_owners_other_spellings(layout: str, case: str) -> None:
    config = checkpoints.hub_config(**CASES[case])
    tensors = hub(config)
    groups = load(layout).groups(tensors, Shape.of(config))
    spellings = {name for group in groups for names in (group.here, *group.also) for name in names}
    other = (torchtitan if layout == "torchtitan" else megatron)(tensors, config, True)
    assert other.keys() <= spellings
    assert other.keys() != TEXTBOOK[layout](tensors, config).keys()


# Values.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", TEXTBOOK)
def test_values_there_and_back(layout: str, case: str, tmp_path: Path) -> None:
    config = checkpoints.hub_config(**CASES[case])
    tensors = hub(config)
    there = made(tmp_path, tensors, config, layout)
    same(read(there), TEXTBOOK[layout](tensors, config))
    convert(there, tmp_path / "back", to="hub_bf16", quiet=True)
    depth = config["num_hidden_layers"]
    left = [f"model.layers.{layer}." for layer in range(depth, depth + 2)] if layout in WITHOUT_MTP else []
    kept = {name: t for name, t in tensors.items() if not name.startswith(tuple(left))}
    same(read(tmp_path / "back"), kept)


@pytest.mark.parametrize(("layout", "case"), [("torchtitan", "k2"), ("megatron", "k2"), ("megatron", "mtp")])
def test_values_of_other_spellings(layout: str, case: str, tmp_path: Path) -> None:
    config = checkpoints.hub_config(**CASES[case])
    tensors = hub(config)
    if layout == "torchtitan":
        other = torchtitan(tensors, config, old=True)
    else:
        other = megatron(tensors, config, local=True)
        other["decoder.layers.1.self_attention.linear_proj._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    checkpoints.write(tmp_path / "other", other, config, stray=False)
    convert(tmp_path / "other", tmp_path / "hub", to="hub_bf16", quiet=True)
    same(read(tmp_path / "hub"), tensors)


@pytest.mark.parametrize("codec", ["bf16", "fp8"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_deepseeks_ranks(num_ranks: int, codec: str, tmp_path: Path) -> None:
    config = checkpoints.hub_config(**RANKS)
    tensors = hub(config)
    if codec == "fp8":
        tensors = checkpoints.to_fp8(tensors)
        config["quantization_config"] = checkpoints.FP8_CONFIG
    there = made(tmp_path, tensors, config, "deepseek_inference", num_ranks=num_ranks)
    for rank, expected in enumerate(deepseek_inference(tensors, config, num_ranks)):
        same(load_file(there / f"model{rank}-mp{num_ranks}.safetensors"), expected)
    convert(there, tmp_path / "back", to=f"hub_{codec}", quiet=True)
    same(read(tmp_path / "back"), tensors)


def test_packed_experts_in_mlx(tmp_path: Path) -> None:
    config = checkpoints.hub_config(quantization_config=checkpoints.INT4_CONFIG)
    tensors = checkpoints.to_int4(hub(config))
    there = made(tmp_path, tensors, config, "mlx")
    same(read(there), mlx(tensors, config))
    convert(there, tmp_path / "back", to="hub_int4", quiet=True)
    same(read(tmp_path / "back"), tensors)


# Foreign code.


@pytest.mark.parametrize("case", ["k2", "moonlight"])
def test_transformers_saves_its_own_layout(case: str, tmp_path: Path) -> None:
    model = checkpoints.stock_model(**CASES[case])
    model.save_pretrained(tmp_path / "theirs", save_original_format=False)
    config = checkpoints.hub_config(**CASES[case])
    tensors = checkpoints.per_expert(model)
    same(read(tmp_path / "theirs"), transformers_fused(tensors, config))
    there = made(tmp_path, tensors, config, "transformers_fused")
    loaded = DeepseekV3ForCausalLM.from_pretrained(there, dtype="auto")
    same(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("case", ["k2", "moonlight", "mtp", "two_mtp"])
def test_torchtitan_agrees(case: str) -> None:
    """Its adapter reads the lengths of two lists of layers, one rank and one number of experts from a model's config."""
    adapter = pytest.importorskip("torchtitan.models.deepseek_v3.state_dict_adapter")
    config = checkpoints.hub_config(**CASES[case])
    tensors = hub(config)
    attention = SimpleNamespace(q_lora_rank=config["q_lora_rank"] or 0)
    moe = SimpleNamespace(num_experts=config["n_routed_experts"])
    layers = [SimpleNamespace(attention=attention, moe=moe) for _ in range(config["num_hidden_layers"])]
    theirs = adapter.DeepSeekV3StateDictAdapter(
        SimpleNamespace(layers=layers, mtp_layers=layers[: config.get("num_nextn_predict_layers") or 0]), None
    )
    theirs._validate_hf_rope_config = lambda *_: None  # wants the folder of a checkpoint
    same(
        theirs.from_hf({name: t for name, t in tensors.items() if not is_copy(name)}),
        torchtitan(tensors, config),
    )


def to_mlx(mx: Any, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())


def from_mlx(mx: Any, array: Any) -> Tensor:
    if array.dtype == mx.bfloat16:
        bits = memoryview(array.view(mx.uint16)).tolist()
        return torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16)
    kinds = {mx.float32: torch.float32, mx.uint32: torch.uint32}
    return torch.tensor(memoryview(array).tolist(), dtype=kinds[array.dtype])


@pytest.mark.parametrize("codec", ["bf16", "int4"])
@pytest.mark.parametrize("case", ["k2", "moonlight"])
def test_mlx_agrees(case: str, codec: str, tmp_path: Path) -> None:
    """mlx-lm's own remapping of a hub checkpoint gives the table's tensors; what we write it takes without remapping."""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx.utils")
    deepseek_v3 = pytest.importorskip("mlx_lm.models.deepseek_v3")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    config = checkpoints.hub_config(**CASES[case])
    tensors = hub(config)
    if codec == "int4":
        tensors = checkpoints.to_int4(tensors)
        config["quantization_config"] = checkpoints.INT4_CONFIG
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
    theirs = model.sanitize({name: to_mlx(mx, tensor) for name, tensor in tensors.items()})
    expected = mlx(tensors, config)
    same({name: from_mlx(mx, array) for name, array in theirs.items()}, expected)

    there = made(tmp_path, tensors, config, "mlx")
    loaded, _ = load_model(there, strict=True)
    same({name: from_mlx(mx, array) for name, array in utils.tree_flatten(loaded.parameters())}, expected)


def test_mlx_computes_the_same_logits(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    config = checkpoints.hub_config(torch_dtype="float32")
    tensors = hub(config, torch.float32)
    there = made(tmp_path, tensors, config, "mlx")
    theirs, _ = utils.load_model(there, strict=True)
    ids = torch.randint(0, config["vocab_size"], (2, 9))
    ours = KimiK2ForCausalLM.from_pretrained(
        tmp_path / "src", config=KimiK2Config.from_pretrained(tmp_path / "src"), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = ours(ids).logits
    found = from_mlx(mx, theirs(mx.array(ids.numpy())).astype(mx.float32))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
