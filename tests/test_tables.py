"""The data folders hold what their names say: every file is found by globbing, so a new one is tested by being there.

A size is built by transformers on the meta device: shapes without memory, a trillion parameters in a second.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.manifest import expected_tensors
from transformers_k2.resources import find, names

ROOT = Path(__file__).resolve().parents[1]
LISTINGS = ROOT.parent / "shared/data/checkpoints"
CONFIGS = sorted(ROOT.glob("configs/*.json"))
TABLES = sorted([*ROOT.glob("conversion/*.yaml"), *ROOT.glob("training_recipes/**/*.yaml")])
IDS = [path.stem for path in CONFIGS]

# arXiv 2507.20534, section 2.3: all parameters, and those used for one token.
K2 = (1.026e12, 32.6e9)
K2_SIZES = ("kimi_k2_instruct", "kimi_k2_instruct_0905", "kimi_k2_thinking", "kimi_k2_5")
# arXiv 2502.16982, table 2, where neither counts the embedding and the head.
MOONLIGHT = (15.29e9, 2.24e9)
SIZE = re.compile(r"_(\d+(?:_\d+)?)b(?:_a(\d+(?:_\d+)?)b)?")


@cache
def meta_model(name: str) -> KimiK2ForCausalLM:
    with torch.device("meta"):
        return KimiK2ForCausalLM(KimiK2Config.from_pretrained(find("configs", name)))


@cache
def saved_names(name: str) -> dict[str, tuple[int, ...]]:
    """What save_pretrained would write: transformers' own conversion of the state dict, on the meta device."""
    model = meta_model(name)
    return {
        key: tuple(tensor.shape)
        for key, tensor in revert_weight_conversion(model, model.state_dict()).items()
    }


def listing(file: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """A published list of tensors, the vision part left out: name -> (shape, dtype). Braces are {a,b} or {0-60}."""
    path = LISTINGS / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tensors = {}
    for line in path.read_text().splitlines():
        pattern, *columns = line.split("\t")
        if line.startswith("#") or ";" in pattern:
            continue
        for name in braces(pattern):
            tensors[name] = (tuple(json.loads(columns[0])), columns[1])
            if len(columns) > 2 and (scale := re.match(r"\+ weight_scale_inv (\[.*?\]) f32", columns[2])):
                tensors[f"{name}_scale_inv"] = (tuple(json.loads(scale[1])), "f32")
    return tensors


def braces(pattern: str) -> Iterator[str]:
    choices = []
    for index, part in enumerate(re.split(r"\{(.*?)\}", pattern)):
        if index % 2 and "-" in part:
            first, last = map(int, part.split("-"))
            choices.append([str(number) for number in range(first, last + 1)])
        else:
            choices.append(part.split(",") if index % 2 else [part])
    return map("".join, itertools.product(*choices))


def test_the_folder_is_the_registry() -> None:
    assert names("configs") == sorted(IDS)
    assert all(find("configs", path.stem).samefile(path) for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_every_config_is_strict_and_complete(path: Path) -> None:
    raw = json.loads(path.read_text())
    config = AutoConfig.from_pretrained(path)
    assert type(config) is KimiK2Config
    written = config.to_hub_dict(keep_auto_map=True)
    about_the_writer = {"transformers_version"}
    for key in raw.keys() - about_the_writer:
        assert key.startswith("_") or written[key] == raw[key], key
    # What a reader would fill in by itself must be a key without which every published config.json does.
    optional = {"ep_size", "output_router_logits", "pad_token_id", "rope_interleave"}
    assert written.keys() - raw.keys() <= optional


@pytest.mark.parametrize("name", IDS)
def test_parameter_counts(name: str) -> None:
    model = meta_model(name)
    config = model.config
    total = sum(weight.numel() for weight in model.parameters())
    routed = sum(weight.numel() for key, weight in model.named_parameters() if ".mlp.experts." in key)
    active = (
        total - routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    )
    table = model.model.embed_tokens.weight.numel()
    if name in K2_SIZES:
        assert (total, active) == (pytest.approx(K2[0], rel=1e-3), pytest.approx(K2[1], rel=0.01))
    elif name.startswith("moonlight"):
        assert (total - 2 * table, active - 2 * table) == pytest.approx(MOONLIGHT, rel=2e-3)
    elif size := SIZE.search(name):
        wanted_total, wanted_active = (
            float(part.replace("_", ".")) * 1e9 if part else None for part in size.groups()
        )
        assert total == pytest.approx(wanted_total, rel=0.03)
        # The embedding is looked up, not multiplied; at 3 billion parameters that decides the digit.
        assert wanted_active is None or active - table == pytest.approx(wanted_active, rel=0.05)
    else:
        assert total < 1e8  # a debug size without a number in its name trains on a laptop


@pytest.mark.parametrize("name", [name for name in IDS if name not in K2_SIZES])
def test_the_manifest_knows_what_saving_writes(name: str) -> None:
    config = meta_model(name).config.to_hub_dict()
    assert saved_names(name) == {key: shape for key, (shape, _) in expected_tensors(config, "none").items()}


def test_kimi_k2_instruct_names_and_shapes_are_the_published_ones() -> None:
    published = listing("Kimi-K2-Instruct_fp8.tsv")
    assert len(published) == 139_644  # as the hub counts them
    saved = saved_names("kimi_k2_instruct")
    stray = {name for name in published if name.endswith("rotary_emb.inv_freq")}
    scales = {name for name in published if name.endswith("_scale_inv")}
    assert saved == {name: published[name][0] for name in published.keys() - stray - scales}
    assert published == {
        name: (shape, published[name][1])
        for name, (shape, _) in expected_tensors(raw("kimi_k2_instruct")).items()
    } | {name: published[name] for name in stray}


def test_kimi_k2_5_names_and_shapes_are_the_published_ones() -> None:
    published = listing("Kimi-K2.5_int4.tsv")
    assert len(published) == 208_215
    meaning = {}
    for name, (shape, _) in published.items():
        name = name.removeprefix("language_model.")
        if name.endswith("_packed"):
            meaning[name.removesuffix("_packed")] = (shape[0], 8 * shape[1])
        elif not name.endswith((".weight_scale", ".weight_shape")):
            meaning[name] = shape
    k2_5, instruct = (meta_model(name).state_dict() for name in ("kimi_k2_5", "kimi_k2_instruct"))
    assert {key: weight.shape for key, weight in k2_5.items()} == {
        key: weight.shape for key, weight in instruct.items()
    }
    assert saved_names("kimi_k2_instruct") == meaning
    wrapped = expected_tensors({"text_config": raw("kimi_k2_5")})
    assert {name: shape for name, (shape, _) in wrapped.items()} == {
        name: shape for name, (shape, _) in published.items()
    }


def raw(name: str) -> dict:
    return json.loads(find("configs", name).read_text())


class UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is there twice in {keys}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_is_a_mapping_with_unique_keys(path: Path) -> None:
    table = yaml.load(path.read_text(), UniqueKeys)
    assert isinstance(table, dict)
    assert table
    if path.parent.name == "training_recipes" and table["model"]["config"] is not None:
        assert find("configs", table["model"]["config"]).is_file()
