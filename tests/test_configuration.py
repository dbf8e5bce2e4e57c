"""KimiK2Config: K2-Instruct's values by default, no silent typo, and a config.json that other readers understand."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, DeepseekV3Config, Kimi_K25Config
from transformers.utils import logging

from transformers_k2 import KimiK2Config
from transformers_k2.resources import find, names

SHARED = Path(__file__).resolve().parents[1].parent / "shared/data/checkpoints"
PUBLISHED = {
    "kimi_k2_instruct": "kimi_k2_instruct.config.json",
    "kimi_k2_instruct_0905": "kimi_k2_instruct_0905.config.reconstructed.json",
    "kimi_k2_thinking": "kimi_k2_thinking.config.reconstructed.json",
    "kimi_k2_5": "kimi_k2_5.config.json",
    "moonlight_16b_a3b_instruct": "moonlight_16b_a3b_instruct.config.json",
}
YARN = {
    "type": "yarn",
    "factor": 64.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
YARN |= {"original_max_position_embeddings": 4096}


def published(name: str) -> dict[str, Any]:
    path = SHARED / PUBLISHED[name]
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


def values(config: KimiK2Config) -> dict[str, Any]:
    """Without the version of the writer and what only lives in memory."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if key[0] != "_" and key != "transformers_version"
    }


def test_defaults_are_k2_instructs() -> None:
    config = published("kimi_k2_instruct")
    about_the_file = {
        "architectures",
        "auto_map",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
    }
    defaults = KimiK2Config().to_hub_dict()
    for key in config.keys() - about_the_file:
        assert defaults[key] == config[key], key


@pytest.mark.parametrize("name", PUBLISHED)
def test_hub_round_trip_keeps_every_published_key(name: str, tmp_path: Path) -> None:
    config = published(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = KimiK2Config.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again", keep_auto_map=True)
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written == json.loads(json.dumps(loaded.to_hub_dict(keep_auto_map=True)))
    text = config.get("text_config", config) | {"model_type": "kimi_k2"}
    text["torch_dtype"] = text.pop("dtype", text.get("torch_dtype"))
    keys = {key for key in text if not key.startswith("_")} - {"transformers_version"}
    if "text_config" in config:  # it also repeats every default of transformers 4's base class
        keys &= published("kimi_k2_instruct").keys() | {"pad_token_id"}
    for key in keys:
        assert written[key] == text[key], key
    assert values(KimiK2Config.from_pretrained(tmp_path / "again")) == values(loaded)


def test_written_with_the_hubs_key_names(tmp_path: Path) -> None:
    KimiK2Config(dtype="bfloat16", rope_scaling=YARN, rope_theta=50000.0).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_scaling"] == YARN
    assert written["rope_theta"] == 50000.0
    assert written["torch_dtype"] == "bfloat16"
    assert not written.keys() & {"rope_parameters", "dtype", "head_dim", "qk_head_dim"}


@pytest.mark.parametrize("name", names("configs"))
def test_a_foreign_reader_gets_the_same_numbers(name: str, tmp_path: Path) -> None:
    """transformers' own DeepSeek configuration, whose defaults differ, reads our config.json under its model type."""
    ours = KimiK2Config.from_pretrained(find("configs", name))
    written = json.loads(ours.to_json_string()) | {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    stock = AutoConfig.from_pretrained(tmp_path)
    assert type(stock) is DeepseekV3Config
    mine, theirs = ours.to_dict(), stock.to_dict()
    for key in theirs.keys() - {"architectures", "model_type", "_name_or_path"}:
        if key == "rope_parameters":  # the stock class keeps the 4.x spelling of the type beside the new one
            assert mine[key] == {name: value for name, value in theirs[key].items() if name != "type"}
        else:
            assert mine.get(key) == theirs[key], key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_expert_per_tok", 8, "'num_expert_per_tok' (value 8): did you mean 'num_experts_per_tok'?"),
        ("n_experts", 8, "'n_experts' (value 8)"),
        ("rope_scalling", None, "did you mean 'rope_scaling'?"),
        ("zzz", 1, "see KimiK2Config"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_nearest(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="Unknown KimiK2Config key") as error:
        KimiK2Config(**{key: value})
    assert message in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(KimiK2Config().to_hub_dict() | {key: value}))
    with pytest.raises(ValueError, match=key):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 8}, "num_key_value_heads must equal num_attention_heads.*8 and 64"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers.*-1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even, got 63"),
        ({"num_experts_per_tok": 385}, "385.*only 384 experts"),
        ({"n_group": 7}, "384 is not divisible by n_group 7"),
        ({"n_group": 8, "topk_group": 9}, "topk_group must be between 1 and n_group 8, got 9"),
        ({"q_lora_rank": 0}, "q_lora_rank.*0"),
        ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'.*'softmax'"),
        ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc'.*'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1.*2"),
    ],
)
def test_contradictions_are_told(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        KimiK2Config(**changes)
    assert "\n" not in str(error.value)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(Exception, match="hidden_size"):
        KimiK2Config(hidden_size="7168")


PLAIN = {"rope_type": "default", "rope_theta": 50000.0}
YARN5 = {"rope_type": "yarn", "rope_theta": 7.0} | YARN


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),  # K2-Instruct's YaRN
        ({"rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_scaling": None}, PLAIN),
        ({"rope_scaling": None, "rope_theta": 50000.0}, PLAIN),
        ({"rope_scaling": YARN}, {"rope_theta": 50000.0, "rope_type": "yarn"} | YARN),
        ({"rope_scaling": YARN, "rope_theta": 123.0}, {"rope_theta": 123.0, "rope_type": "yarn"} | YARN),
        ({"rope_parameters": PLAIN}, PLAIN),
        ({"rope_parameters": YARN5}, YARN5),
    ],
)
def test_rope_spellings(given: dict, wanted: dict | None) -> None:
    before = copy.deepcopy(given)
    config = KimiK2Config(**given)
    if wanted is None:
        wanted = {"rope_theta": 50000.0, "rope_type": "yarn"} | YARN | {"factor": 32.0, "beta_fast": 1.0}
    assert config.rope_parameters == {key: value for key, value in wanted.items() if key != "type"}
    assert given == before  # the caller's dict is not completed in place
    again = KimiK2Config(**json.loads(config.to_json_string()))
    assert again.rope_parameters == config.rope_parameters


def test_rope_scaling_attribute() -> None:
    config = KimiK2Config(rope_theta=123.0)
    config.rope_scaling = YARN
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.to_hub_dict()["rope_scaling"] == YARN
    assert config.to_hub_dict()["rope_theta"] == 123.0
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 123.0}
    assert config.to_hub_dict()["rope_scaling"] is None


def test_auto_map_is_kept_only_when_asked(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config = KimiK2Config(auto_map=auto_map)
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    config.save_pretrained(tmp_path, keep_auto_map=True)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == auto_map


def test_wrapper_of_k2_5(tmp_path: Path) -> None:
    """The text part is found, with its quantization; AutoConfig keeps the wrapper, which transformers knows."""
    config = published("kimi_k2_5")
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = KimiK2Config.from_pretrained(tmp_path)
    assert type(text) is KimiK2Config
    assert text.rms_norm_eps == 1e-5
    assert text.rope_parameters["beta_fast"] == 32.0
    assert text.quantization_config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    wrapper = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(wrapper, Kimi_K25Config)
    assert wrapper.text_config.n_routed_experts == 384


def test_copies_are_equal_and_separate() -> None:
    config = KimiK2Config(num_hidden_layers=4, num_labels=3, dtype="bfloat16", rope_scaling=YARN)
    assert KimiK2Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is KimiK2Config
        assert twin == config
        twin.rope_parameters["factor"] = 2.0
        assert twin != config
        assert config.rope_parameters["factor"] == 64.0
    assert config != KimiK2Config(num_hidden_layers=5, num_labels=3, dtype="bfloat16", rope_scaling=YARN)


def test_common_behaviour_of_a_configuration(tmp_path: Path) -> None:
    """What upstream's ConfigTester asks of every configuration."""
    config = KimiK2Config(
        hidden_size=74, num_labels=5, return_dict=False, output_hidden_states=True, dtype="float16"
    )
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3
    config.to_json_file(tmp_path / "config.json")
    assert KimiK2Config.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "sub")
    loaded = KimiK2Config.from_pretrained(tmp_path, subfolder="sub")
    assert values(loaded) == values(config)
    changed, unused = KimiK2Config.from_pretrained(tmp_path, vocab_size=20, foo=1, return_unused_kwargs=True)
    assert changed.vocab_size == 20
    assert unused == {"foo": 1}
    with pytest.raises(OSError, match="nowhere"):
        KimiK2Config.from_pretrained(tmp_path / "nowhere")
    assert config.num_local_experts == config.n_routed_experts
    assert config.num_mtp_layers == 0


def test_strange_attributes_are_left_out_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may hang anything on a configuration; a file that has it could not be loaded again."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    config = KimiK2Config()
    config.note_of_mine = [1, 2]
    config.save_pretrained(tmp_path)
    assert "note_of_mine" in caplog.text
    assert KimiK2Config.from_pretrained(tmp_path).to_dict().keys() == KimiK2Config().to_dict().keys()
