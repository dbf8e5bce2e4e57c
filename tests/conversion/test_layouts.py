"""Every layout in conversion/, found by its file: there and back through the engine, and planned for the real models.

Names and values of single layouts are compared with foreign readings in test_tables_foreign.py.
"""

from __future__ import annotations

import json
import re
import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
from conversion_results import problems, read, same, stray
from transformers_k2.conversion import convert, verify
from transformers_k2.conversion import layout as layouts
from transformers_k2.quantization import int4
from transformers_k2.quantization.codecs import fp8_block

Tensor = torch.Tensor
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "checkpoints"
ENCODE = {
    "bf16": lambda plain: plain,
    "fp8": checkpoints.to_fp8,
    "int4": checkpoints.to_int4,
    "affine": checkpoints.to_int4,
}
PAIRS = [(name, codec) for name in layouts.names() for codec in layouts.load(name).codecs]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return checkpoints.per_expert(checkpoints.stock_model())


@pytest.fixture(scope="module")
def sources(plain: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A hub checkpoint whose weights lie on the grid of each codec, decoded to bf16, and the same packed."""
    folder = tmp_path_factory.mktemp("sources")
    result = {}
    for codec, encode in ENCODE.items():
        meaning = checkpoints.decoded(encode(plain), torch.bfloat16)
        result[codec] = checkpoints.write(folder / codec, meaning, checkpoints.hub_config())
    return result


def ranks(name: str, codec: str = "bf16") -> dict[str, int]:
    """Two where the tiny model's matrices can be cut: not into FP8's blocks."""
    return {"num_ranks": 2} if layouts.load(name).files and codec != "fp8" else {}


@pytest.mark.parametrize(("name", "codec"), PAIRS)
def test_there_and_back(name: str, codec: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Weights that lie on a codec's grid lose nothing in it."""
    src = sources[codec]
    exact = {"recover": True} if codec != "bf16" else {}
    convert(src, tmp_path / "there", name, codec=codec, **exact, **ranks(name, codec))
    back = convert(tmp_path / "there", tmp_path / "back", "hub_bf16")
    assert back.lines[0].startswith(f"{name} ({codec}) -> hub_bf16 (bf16)")
    same(read(tmp_path / "back"), stray(read(src)))
    assert problems(tmp_path / "back") == []
    for folder in (tmp_path / "there", tmp_path / "back"):
        alone, pair = verify(folder, quiet=True), verify(src, folder, quiet=True)
        assert alone.ok, alone.lines()
        assert alone.num_checked == alone.num_tensors > 40
        assert pair.ok, pair.lines()
        assert pair.num_rounded == 0


@pytest.mark.parametrize("name", [name for name, codec in PAIRS if codec == "bf16"])
def test_float32_and_small_shards(name: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    """Other dtypes pass, in any number of files; the hub's layouts round once and leave the router's bias alone."""
    wide = {
        key: tensor.float() + 1e-4 if tensor.ndim > 1 else tensor.float() for key, tensor in plain.items()
    }
    config = checkpoints.hub_config() | {"torch_dtype": "float32"}
    src = checkpoints.write(tmp_path / "src", wide, config)
    convert(src, tmp_path / "there", name, shard_bytes=300_000, codec="bf16", **ranks(name))
    convert(tmp_path / "there", tmp_path / "back", "hub_bf16", dtype="float32", shard_bytes=10**6)
    expected = stray(wide)
    if layouts.load(name).dtype == "BF16":
        bias = ".e_score_correction_bias"
        expected = {
            key: value if key.endswith(bias) else value.bfloat16().float() for key, value in expected.items()
        }
    same(read(tmp_path / "back"), expected)
    if layouts.load(name).files is None:
        assert len(list((tmp_path / "there").glob("*.safetensors"))) > 4


@pytest.mark.parametrize("name", [name for name, codec in PAIRS if codec in ("int4", "affine")])
def test_packed_bits_pass_unchanged(name: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    """Whatever the names, codes and scales are those of the file, such as no quantiser of ours would choose."""
    packed = checkpoints.to_int4(plain)
    generator = torch.Generator().manual_seed(3)
    for key, value in packed.items():
        if key.endswith("_packed"):
            packed[key] = torch.randint(-(2**31), 2**31, value.shape, generator=generator).to(torch.int32)
    src = checkpoints.write(
        tmp_path / "src", packed, checkpoints.hub_config() | {"quantization_config": checkpoints.INT4_CONFIG}
    )
    convert(src, tmp_path / "there", name)
    convert(tmp_path / "there", tmp_path / "back", "hub_int4")
    same(read(tmp_path / "back"), stray(packed))


def test_fp8_to_int4_goes_through_the_loaders_bf16(plain: dict[str, Tensor], tmp_path: Path) -> None:
    stored = checkpoints.to_fp8(plain)
    src = checkpoints.write(
        tmp_path / "src", stored, checkpoints.hub_config() | {"quantization_config": checkpoints.FP8_CONFIG}
    )
    convert(src, tmp_path / "dst", "hub_int4", convention="compressed_tensors")
    found, meaning = read(tmp_path / "dst"), checkpoints.decoded(stored, torch.bfloat16)
    num = 0
    for key, value in stray(meaning).items():
        if ".mlp.experts." not in key:
            assert torch.equal(found[key], value), key
            continue
        codes, scale = int4.quantize(value, 32, "compressed_tensors")
        assert torch.equal(found[f"{key}_packed"], int4.pack(codes)), key
        assert torch.equal(found[f"{key}_scale"], scale)
        num += 1
    assert num == 36
    assert problems(tmp_path / "dst") == []


def test_int4_to_fp8(plain: dict[str, Tensor], tmp_path: Path) -> None:
    stored = checkpoints.to_int4(plain)
    config = checkpoints.hub_config() | {"quantization_config": checkpoints.INT4_CONFIG}
    src = checkpoints.write(tmp_path / "src", stored, config)
    convert(src, tmp_path / "dst", "hub_fp8")
    found, meaning = read(tmp_path / "dst"), checkpoints.decoded(stored, torch.bfloat16)
    coded = [key for key in meaning if f"{key}_scale_inv" in found]
    assert len(coded) == 60
    for key in coded:
        weight, scale = fp8_block.encode(meaning[key])
        assert torch.equal(found[key].view(torch.uint8), weight.view(torch.uint8)), key
        assert torch.equal(found[f"{key}_scale_inv"], scale)
    assert problems(tmp_path / "dst") == []


def test_a_new_layout_is_one_file(sources: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text(
        "about: an example\nnames: hub\ncodecs: [bf16]\nprefix: net.\ntensors:\n"
        "  - hub: model.layers.<layer>.self_attn.o_proj.weight\n    here: model.layers.<layer>.out.weight\n"
    )
    convert(sources["bf16"], tmp_path / "there", str(table))
    names = read(tmp_path / "there").keys()
    assert "net.model.layers.0.out.weight" in names
    assert all(name.startswith("net.") for name in names)
    convert(tmp_path / "there", tmp_path / "back", "hub_bf16", layout=str(table))
    same(read(tmp_path / "back"), stray(read(sources["bf16"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("codecs: [bf17]", "codecs is .*expected a list of bf16, fp8, int4, affine"),
        ("names: theirs", "names is 'theirs', expected own or hub"),
        ("mtp: maybe", "mtp is 'maybe'"),
        ("colour: red", "unknown keys colour"),
        ("tensors: [{hub: a}]", "a row is .*expected hub, here"),
        ("tensors: [{hub: a, here: b}, {hub: a, here: c}]", "a has two rows"),
        ("tensors: [{hub: a.<rank>, here: b}]", "variable <rank>"),
        ("tensors: [{hub: a, here: [b, c]}]", "a has 2 names here, expected 1"),
        ("tensors: [{hub: a, here: b, split: sideways}]", "split is 'sideways'"),
        ("drop: [x]", "drop has 'x', expected name and why"),
        ("a: [", "no YAML"),
    ],
)
def test_tables_are_checked(change: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "mine.yaml"
    content = {"about": "about: x", "codecs": "codecs: [bf16]"} | {change.partition(":")[0]: change}
    table.write_text("\n".join(content.values()))
    with pytest.raises(ValueError, match=message):
        layouts.parse(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hub_bf17"}, "No conversion file called 'hub_bf17'. Did you mean 'hub_bf16'"),
        ({"to": "megatron", "codec": "fp8"}, "codec is 'fp8': expected one of bf16, which megatron holds"),
        ({"to": "hub_bf16", "dtype": "int8"}, "dtype is 'int8': expected one of bfloat16"),
        (
            {"to": "hub_bf16", "num_ranks": 2},
            "num_ranks is 2: expected 1 for hub_bf16; .* deepseek_inference",
        ),
        ({"to": "deepseek_inference", "num_ranks": 2, "codec": "fp8"}, r"would give each .* rows.* of 128"),
        ({"to": "deepseek_inference", "num_ranks": 4}, "6 experts cannot be shared by 4 ranks"),
        ({"to": "hub_int4", "group_size": 36}, "INT4 group_size is 36"),
        ({"to": "hub_int4", "convention": "gptq"}, "convention is 'gptq'"),
        ({"to": "hub_fp8", "recover": True}, r"model\..*rows 0 to .*on no FP8 grid"),
        ({"to": "hub_bf16", "layout": "megatron"}, "lacks .* of the model that config.json describes"),
    ],
)
def test_errors(options: dict[str, Any], message: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    with pytest.raises(ValueError, match=message):
        convert(src, tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_unclaimed_and_missing(plain: dict[str, Tensor], tmp_path: Path) -> None:
    """Both are listed, folded, before anything is written."""
    more = plain | {
        f"model.layers.{layer}.self_attn.indexer.wk.weight": torch.ones(2, 2) for layer in (0, 1, 2)
    }
    src = checkpoints.write(tmp_path / "more", more, checkpoints.hub_config())
    with pytest.raises(
        ValueError, match=r"3 tensors \(model\.layers\.\{0-2\}\.self_attn\.indexer\.wk\.weight\) that no row"
    ):
        convert(src, tmp_path / "dst", "hub_bf16")
    less = {key: value for key, value in plain.items() if ".experts.4." not in key}
    src = checkpoints.write(tmp_path / "less", less, checkpoints.hub_config())
    with pytest.raises(
        ValueError, match=r"lacks 6 tensors \(model\.layers\.\{1-2\}\.mlp\.experts\.4\.gate_proj"
    ):
        convert(src, tmp_path / "dst", "hub_bf16")
    assert not (tmp_path / "dst").exists()


def listed(table: Path) -> list[str]:
    """The names in a published listing, its ranges unfolded."""
    names = []
    for line in table.read_text().splitlines():
        name, _, rest = line.partition("\t")
        if line.startswith("#") or not re.fullmatch(r"\S+", name) or "*" in name:
            continue
        choices = [
            [str(number) for number in range(int(first), int(last) + 1)] if last else words.split(",")
            for words, first, last in (
                (body, *re.fullmatch(r"(\d+)-(\d+)|.*", body).groups(default=""))
                for body in re.findall(r"\{([^}]*)\}", name)
            )
        ]
        template = re.sub(r"\{[^}]*\}", "{}", name)
        for chosen in product(*choices):
            key = template.format(*chosen)
            names += [key, f"{key}_scale_inv"] if "weight_scale_inv" in rest else [key]
    return names


def beside_k25() -> list[str]:
    """The vision tower and the projector, as the listing's last lines have them."""
    parts = ("mlp.fc0", "mlp.fc1", "norm0", "norm1", "wo", "wqkv")
    blocks = [f"vision_tower.encoder.blocks.{block}.{part}" for block in range(27) for part in parts]
    modules = [
        *(
            "mm_projector.pre_norm",
            "mm_projector.proj.0",
            "mm_projector.proj.2",
            "vision_tower.patch_embed.proj",
        ),
        *("vision_tower.encoder.final_layernorm", *blocks),
    ]
    names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    return [*names, "vision_tower.patch_embed.pos_emb.weight"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the index and the config of the real models alone."""
    if not SHARED.is_dir():
        pytest.skip("the published listings are not here")
    found = {}
    for table, config, num in (
        ("Kimi-K2-Instruct_fp8.tsv", "kimi_k2_instruct.config.json", 139_644),
        ("Kimi-K2.5_int4.tsv", "kimi_k2_5.config.json", 208_550),
    ):
        names = listed(SHARED / table) + (beside_k25() if "K2.5" in table else [])
        assert len(names) == num
        folder = tmp_path_factory.mktemp(config)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1-of-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text((SHARED / config).read_text())
        found[config.partition(".")[0]] = folder
    return found


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("kimi_k2_instruct", "transformers_fused"),
        ("kimi_k2_5", "mlx"),
        *(
            pytest.param(model, name, marks=pytest.mark.slow)
            for model in ("kimi_k2_instruct", "kimi_k2_5")
            for name in layouts.names()
        ),
    ],
)
def test_the_real_models_plan(
    model: str, name: str, published: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From the index alone: nothing unclaimed, nothing lost, in seconds; a plan takes tens of megabytes."""
    measured = request.node.get_closest_marker("slow") is not None
    if measured:
        tracemalloc.start()
    summary = convert(published[model], tmp_path / "dst", name, dry_run=True, **ranks(name))
    if measured:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 300e6
    if name in ("hub_int4", "k25_int4") and model == "kimi_k2_instruct":
        assert summary.num_bytes == 594_205_904_896
    elif (model, name) == (
        "kimi_k2_5",
        "hub_tp",
    ):  # both ranks have norms, routers and down-projections whole
        whole = (
            60 * 384 * (7168 * 2 + 4) + 61 * (1536 + 576 + 2) * 7168 * 2 + 61 * (1536 + 512) * 2 + 7168 * 2
        )
        assert summary.num_bytes == 2_052_816_510_976 + whole
    elif summary.lines[0].endswith("decoded from fp8") or "(bf16):" in summary.lines[0]:
        assert summary.num_bytes == 2_052_816_510_976  # 1,026.4 B parameters, 23,040 of them float32
    elif name == "mlx":
        assert summary.num_bytes == 657_623_228_416  # INT4's 594 GB, and a bias of two bytes for each group
    beside = any("335 tensors beside the language model (" in line for line in summary.lines)
    counted = not any(line.startswith("not counted: 335") for line in summary.lines)
    assert (beside, counted) == (
        model == "kimi_k2_5" and name != "k25_int4",
        (model, name) != ("kimi_k2_5", "k25_int4"),
    )
    assert not (tmp_path / "dst").exists()


def test_what_stands_beside_the_weights(plain: dict[str, Tensor], tmp_path: Path) -> None:
    """The hub's spelling of a config that transformers saved; what readers assume otherwise is said; no code is named."""
    rope = {"rope_theta": 5e4, "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    config = checkpoints.hub_config()
    for key in ("rope_scaling", "rope_theta", "torch_dtype", "scoring_func", "topk_method"):
        config.pop(key, None)
    config |= {"rope_parameters": rope, "dtype": "bfloat16", "auto_map": {"AutoConfig": "x.Y"}}
    src = checkpoints.write(tmp_path / "src", plain, config | {"architectures": ["KimiK2ForCausalLM"]})
    named = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.T", None]},
    }
    (src / "tokenizer_config.json").write_text(json.dumps(named))
    convert(src, tmp_path / "dst", "hub_fp8")
    told = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert told["rope_scaling"] == {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    assert (told["rope_theta"], told["torch_dtype"]) == (5e4, "bfloat16")
    assert (told["scoring_func"], told["topk_method"]) == ("sigmoid", "noaux_tc")
    assert told["architectures"] == ["DeepseekV3ForCausalLM"]
    assert told["quantization_config"]["weight_block_size"] == [128, 128]
    assert not {"rope_parameters", "dtype", "auto_map"} & told.keys()
    tokenizer = json.loads((tmp_path / "dst" / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "TikTokenTokenizer"}


def test_ranks_hold_what_torch_would_cut(plain: dict[str, Tensor], tmp_path: Path) -> None:
    src = checkpoints.write(tmp_path / "src", plain, checkpoints.hub_config())
    cut = {"embed_tokens": 0, "lm_head": 0, "q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1}
    cut |= {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    for name in ("hub_tp", "hub_ep"):
        convert(src, tmp_path / name, name, codec="bf16", num_ranks=2)
        for rank in range(2):
            found = load_file(tmp_path / name / f"model-{name[-2:]}{rank}-of-2.safetensors")
            expected = {}
            for key, value in plain.items():
                expert = re.search(r"experts\.(\d+)\.", key)
                if name == "hub_ep":
                    if expert is None or int(expert[1]) // 3 == rank:
                        expected[key] = value
                else:
                    dim = cut.get(key.split(".")[-2])
                    expected[key] = value if dim is None else value.chunk(2, dim)[rank].contiguous()
            same(found, expected)
