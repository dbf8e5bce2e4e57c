"""Every published form of a checkpoint loads to exactly what its tensors mean, and comes out again in the hub's layout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
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
from transformers_k2 import KimiK2ForCausalLM, KimiK2ForSequenceClassification, KimiK2Model

CODECS = {
    "bf16": (lambda tensors: tensors, None),
    "fp8": (to_fp8, FP8_CONFIG),
    "int4": (to_int4, INT4_CONFIG),
    "int4_int64_shape": (lambda tensors: to_int4(tensors, torch.int64), INT4_CONFIG),
}


@cache
def encoded(codec: str) -> dict[str, torch.Tensor]:
    return CODECS[codec][0](per_expert(stock_model()))


def checkpoint(folder: Path, codec: str = "bf16", **changes) -> tuple[Path, dict[str, torch.Tensor]]:
    """A hub folder of that codec, and its stored tensors."""
    stored, quantization = dict(encoded(codec)), CODECS[codec][1]
    extra = {"quantization_config": quantization} if quantization else {}
    return write(folder, stored, hub_config(**extra, **changes)), stored


def assert_means(model: KimiK2ForCausalLM, meaning: dict[str, torch.Tensor]) -> None:
    """Each fused or plain weight of the model equals the hub tensors it came from, bit for bit."""
    state = model.state_dict()
    seen = set()
    for name, tensor in meaning.items():
        head, _, leaf = name.partition(".mlp.experts.")
        if leaf:
            index, projection, _ = leaf.split(".")
            if projection == "down_proj":
                got = state[f"{head}.mlp.experts.down_proj"][int(index)]
                seen.add(f"{head}.mlp.experts.down_proj")
            else:
                half = state[f"{head}.mlp.experts.gate_up_proj"][int(index)].chunk(2)
                got = half[projection == "up_proj"]
                seen.add(f"{head}.mlp.experts.gate_up_proj")
        else:
            got = state[name]
            seen.add(name)
        assert torch.equal(got, tensor), name
    assert seen == set(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_loads_exactly(tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    folder, stored = checkpoint(tmp_path / "hub", codec)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, dequantize=True, output_loading_info=True
    )
    assert type(model) is KimiK2ForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_means(model, decoded(stored, dtype))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("codec", CODECS)
def test_saving_what_was_loaded(tmp_path: Path, codec: str) -> None:
    folder, stored = checkpoint(tmp_path / "hub", codec)
    model = AutoModelForCausalLM.from_pretrained(folder, dequantize=True)
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    meaning = decoded(stored, torch.bfloat16)
    assert set(index["weight_map"]) == set(meaning)  # the hub's per-expert names, no scales, no fused weights
    for name, tensor in meaning.items():
        with safe_open(tmp_path / "saved" / index["weight_map"][name], "pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensor), name
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert "quantization_config" not in config
    assert "auto_map" not in config
    assert config["rope_scaling"]["type"] == "yarn"
    assert config["rope_theta"] == 50000.0
    assert config["torch_dtype"] == "bfloat16"
    assert_means(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), meaning)
    # A reader that is not ours: the stock class on the same files.
    config["model_type"] = "deepseek_v3"
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    stock = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(0, 320, (2, 9))
    assert torch.equal(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize("codec", ["bf16", "int4"])
@pytest.mark.parametrize("wrapped_config", [True, False])
def test_language_model_prefix(tmp_path: Path, codec: str, wrapped_config: bool) -> None:
    """K2.5's folder: every text key prefixed, vision keys beside them, the text configuration inside a wrapper."""
    stored, quantization = encoded(codec), CODECS[codec][1]
    text = hub_config(**({"quantization_config": quantization} if quantization else {}))
    config = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 32}}
    prefixed = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    prefixed["vision_tower.encoder.blocks.0.wqkv.weight"] = torch.zeros(6, 2)
    prefixed["mm_projector.proj.0.weight"] = torch.zeros(4, 4)
    folder = write(tmp_path / "k25", prefixed, config if wrapped_config else text, stray=False)
    model, report = KimiK2ForCausalLM.from_pretrained(folder, dequantize=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    meaning = decoded(stored, torch.bfloat16)
    assert_means(model, meaning)
    assert_means(AutoModelForCausalLM.from_pretrained(folder, dequantize=True), meaning)
    model.save_pretrained(tmp_path / "text")
    assert set(load_file(tmp_path / "text/model.safetensors")) == set(meaning)
    assert json.loads((tmp_path / "text/config.json").read_text())["model_type"] == "kimi_k2"


def test_stock_class_cannot_load_partial_fp8_blocks(tmp_path: Path) -> None:
    """The reason for our own decoder: the same folder under the stock model type fails."""
    folder, _ = checkpoint(tmp_path / "hub", "fp8")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"not divisible|conversion"):
        DeepseekV3ForCausalLM.from_pretrained(folder)


def test_quantization_config_argument(tmp_path: Path) -> None:
    fp8, stored = checkpoint(tmp_path / "fp8", "fp8")
    model = AutoModelForCausalLM.from_pretrained(
        fp8, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert_means(model, decoded(stored, torch.bfloat16))
    int4, stored = checkpoint(tmp_path / "int4", "int4")
    asked = CompressedTensorsConfig(dequantize=True)
    assert_means(
        AutoModelForCausalLM.from_pretrained(int4, quantization_config=asked), decoded(stored, torch.bfloat16)
    )
    with pytest.raises(ValueError, match=r"quantised with 'compressed-tensors'.*'fp8'.*Int4Config"):
        AutoModelForCausalLM.from_pretrained(int4, quantization_config=FineGrainedFP8Config())


def test_stale_quantization_config(tmp_path: Path) -> None:
    """bf16 weights under an FP8 config, as the stock class writes them, load as what they are."""
    stored = dict(encoded("bf16"))
    folder = write(tmp_path / "stale", stored, hub_config(quantization_config=FP8_CONFIG))
    assert_means(AutoModelForCausalLM.from_pretrained(folder), decoded(stored, torch.bfloat16))


def test_model_built_from_a_quantised_config_saves_without_it(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**hub_config(quantization_config=FP8_CONFIG, num_hidden_layers=2))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert model.config.quantization_config == FP8_CONFIG  # saving changes nothing in memory
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_auto_map_is_kept_when_asked(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "kept", keep_auto_map=True)
    assert json.loads((tmp_path / "kept/config.json").read_text())["auto_map"] == hub_config()["auto_map"]


def test_task_heads(tmp_path: Path) -> None:
    folder, stored = checkpoint(tmp_path / "hub")
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert type(model) is KimiK2ForSequenceClassification
    assert model.score.weight.shape[0] == 3
    assert report["missing_keys"] == {"score.weight"}
    base = AutoModel.from_pretrained(folder)
    assert type(base) is KimiK2Model
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.score.weight, model.score.weight)
    # A bare decoder says so in its config; there a missing lm_head is a new head. In a language model it is a fault.
    base.save_pretrained(tmp_path / "bare")
    _, report = KimiK2ForCausalLM.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    del stored["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        KimiK2ForCausalLM.from_pretrained(write(tmp_path / "headless", stored, hub_config()))


def broken(folder: Path, stored: dict[str, torch.Tensor], kind: str) -> tuple[Path, dict]:
    config = hub_config()
    if kind == "missing":
        del stored["model.layers.2.mlp.experts.5.up_proj.weight"]
    elif kind == "missing norm":
        del stored["model.layers.1.self_attn.kv_a_layernorm.weight"]
    elif kind == "left over":
        stored["model.layers.3.input_layernorm.weight"] = torch.ones(256)
    elif kind == "misnamed":
        stored["model.layers.1.self_attn.q_c_proj.weight"] = torch.ones(4, 4)
    elif kind == "wrong head count":
        config |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    elif kind == "scale missing":
        stored = to_fp8(stored)
        del stored["model.layers.1.self_attn.o_proj.weight_scale_inv"]
        config["quantization_config"] = FP8_CONFIG
    elif kind == "scale grid":
        stored = to_fp8(stored)
        name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
        stored[name] = stored[name][:4].clone()  # 576 rows need 5 rows of scales
        config["quantization_config"] = FP8_CONFIG
    return write(folder, stored, config), config


EXPECTED = {
    "missing": r"model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight",
    "missing norm": r"model\.layers\.1\.self_attn\.kv_a_layernorm\.weight",
    "left over": r"model\.layers\.3\.input_layernorm\.weight",
    "misnamed": r"model\.layers\.1\.self_attn\.q_c_proj\.weight",
    "wrong head count": r"\[\d+, \d+\].*\[\d+, \d+\]",
    "scale missing": r"model\.layers\.1\.self_attn\.o_proj\.weight_scale_inv",
    "scale grid": r"kv_a_proj_with_mqa\.weight_scale_inv.*\[4, 2\].*\[5, 2\]",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_faults_are_errors_before_anything_is_allocated(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = broken(tmp_path / "hub", dict(encoded("bf16")), kind)

    def allocated(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built before the fault was told")

    monkeypatch.setattr(KimiK2ForCausalLM, "__init__", allocated)
    with pytest.raises(ValueError, match=EXPECTED[kind]) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_not_strict_is_upstreams_behaviour(tmp_path: Path) -> None:
    folder, _ = broken(tmp_path / "hub", per_expert(stock_model()), "missing norm")
    _, report = KimiK2ForCausalLM.from_pretrained(folder, strict=False, output_loading_info=True)
    assert report["missing_keys"] == {"model.layers.1.self_attn.kv_a_layernorm.weight"}


def test_the_loaders_own_report_is_checked_too(tmp_path: Path) -> None:
    """With a key_mapping the headers cannot be compared beforehand; what the loader then misses is still an error."""
    for kind, wanted in (("missing norm", "lacks"), ("left over", "no place")):
        folder, _ = broken(tmp_path / kind, dict(encoded("bf16")), kind)
        with pytest.raises(ValueError, match=rf"{wanted}.*{EXPECTED[kind]}"):
            KimiK2ForCausalLM.from_pretrained(folder, key_mapping={"^nothing": "at all"})


def test_files_that_are_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "hub")
    shard = folder / "model-2-of-3.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"model-2-of-3\.safetensors.*1,?000"):
        AutoModelForCausalLM.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"model-2-of-3\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    shard.write_bytes(whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    save_file({"lm_head.weight": torch.zeros(320, 256)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\.\./outside"):
        AutoModelForCausalLM.from_pretrained(folder)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(hub_config()))
    torch.save(encoded("bf16"), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        AutoModelForCausalLM.from_pretrained(pickled)
    with pytest.raises(ValueError, match="pickle"):
        AutoModelForCausalLM.from_pretrained(pickled, use_safetensors=False)


def test_mtp_layers_of_a_relative_are_left_aside(tmp_path: Path) -> None:
    """DeepSeek-V3 stores prediction layers after the last one; K2 has none, so there such a layer is a fault."""
    stored = dict(encoded("bf16"))
    for leaf in ("enorm.weight", "hnorm.weight"):
        stored[f"model.layers.3.{leaf}"] = torch.ones(256, dtype=torch.bfloat16)
    stored["model.layers.3.eh_proj.weight"] = torch.ones(256, 512, dtype=torch.bfloat16)
    folder = write(tmp_path / "mtp", stored, hub_config(num_nextn_predict_layers=1))
    KimiK2ForCausalLM.from_pretrained(folder)
    folder = write(tmp_path / "no_mtp", stored, hub_config(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match=r"model\.layers\.3"):
        KimiK2ForCausalLM.from_pretrained(folder)


def test_saving_replaces_the_old_files_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = checkpoint(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(folder)
    target = tmp_path / "saved"
    model.save_pretrained(target, max_shard_size="200KB")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    (target / "notes.txt").write_text("kept")

    def crash(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", crash)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(target)
    assert {name: (target / name).read_bytes() for name in before} == before
    model.save_pretrained(target)  # one file now; the old shards and their index are gone
    left = {path.name for path in target.iterdir()}
    assert left == {"model.safetensors", "config.json", "generation_config.json", "notes.txt"}
    AutoModelForCausalLM.from_pretrained(target)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in target.iterdir()} == {(tmp_path / "plain").stat().st_mode}
