"""What this package relies on in transformers, or exists because of: a test for each fact (transformers 5.23).

A failure after an upgrade says which code to look at; a defect that is gone is code to delete.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3PreTrainedModel,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    Kimi_K25Config,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    core_model_loading,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.distributed import sharding_utils
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import create_causal_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer

from conftest import TINY
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, KimiK2ForSequenceClassification, KimiK2Model

# The stock defaults are DeepSeek's: three dense layers, eight groups, an extra prediction layer.
STOCK = TINY | {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 50000.0,
    "num_mtp_layers": 0,
}


class PlainConfig(DeepseekV3Config):
    model_type = "plain_subclass_of_deepseek"


class PlainSubclass(DeepseekV3ForCausalLM):
    config_class = PlainConfig


def plain() -> PlainSubclass:
    return PlainSubclass(PlainConfig(**STOCK))


# configuration_kimi_k2.py


def test_stock_configuration_keeps_a_typo_silently() -> None:
    assert DeepseekV3Config(num_expert_per_tok=4).num_expert_per_tok == 4


def test_stock_configuration_saves_names_that_hub_readers_do_not_know(tmp_path: Path) -> None:
    DeepseekV3Config(rope_theta=50000.0, dtype="bfloat16").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 50000.0
    assert written["dtype"] == "bfloat16"
    assert not written.keys() & {"rope_theta", "rope_scaling", "torch_dtype"}


def test_stock_configuration_completes_the_callers_dict() -> None:
    scaling = {"type": "yarn", "factor": 2.0}
    DeepseekV3Config(rope_scaling=scaling)
    assert "rope_theta" in scaling


def test_saving_a_configuration_writes_its_to_json_string(tmp_path: Path) -> None:
    config = DeepseekV3Config()
    config.to_json_string = lambda use_diff=True: "text"  # type: ignore[method-assign]
    config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "text"


def test_generation_defaults_are_listed() -> None:
    assert {
        "temperature",
        "num_beams",
        "max_length",
    } <= GenerationConfig._get_default_generation_params().keys()


def test_arguments_of_from_dict_are_set_after_the_checks() -> None:
    """So an override can contradict the rest: the headers are compared with the result, not with the file."""
    config = KimiK2Config.from_dict({"num_attention_heads": 8}, num_key_value_heads=7)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 7)


def test_the_wrappers_text_part_is_found() -> None:
    wrapper = Kimi_K25Config()
    assert wrapper.get_text_config() is wrapper.text_config


# modeling_kimi_k2.py


def test_stock_model_hides_layer_61() -> None:
    assert DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected == [r"model\.layers\.61.*"]


def test_experts_implementation_is_read_from_the_source_of_the_class() -> None:
    """A subclass in another module is held to the eager loop; the answer is remembered on the class and inherited."""
    assert DeepseekV3PreTrainedModel._can_set_experts_implementation()
    source = inspect.getsource(PreTrainedModel._can_set_experts_implementation)
    assert "sys.modules.get(cls.__module__)" in source
    assert "@use_experts_implementation" not in inspect.getsource(sys.modules[KimiK2Model.__module__])
    assert KimiK2ForCausalLM._can_set_experts_implementation()


def test_the_loss_is_found_by_the_end_of_the_class_name() -> None:
    assert {"ForCausalLM", "ForSequenceClassification", "ForTokenClassification"} <= LOSS_MAPPING.keys()
    assert plain().loss_type is None or plain().loss_type == "ForCausalLM"


def test_task_heads_build_their_base_through_automodel(tiny_config: Any) -> None:
    assert type(KimiK2ForSequenceClassification(tiny_config()).model) is KimiK2Model


# registration.py


def test_transformers_has_no_kimi_k2() -> None:
    assert "kimi_k2" not in CONFIG_MAPPING_NAMES
    assert "kimi_k25" in CONFIG_MAPPING_NAMES
    assert "kimi_k25" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_a_registered_class_from_outside_wins_over_an_auto_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, PlainConfig.model_type, PlainConfig)
    content = {"model_type": PlainConfig.model_type, "auto_map": {"AutoConfig": "absent_file.AbsentConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)) is PlainConfig


def test_registering_a_model_under_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="config_class"):
        AutoModelForCausalLM.register(Kimi_K25Config, KimiK2ForCausalLM, exist_ok=True)


def test_conversions_are_not_inherited(tmp_path: Path) -> None:
    """Per-expert names are the stock class's on disk; an unregistered subclass writes, and expects, fused ones."""
    assert get_checkpoint_conversion_mapping("deepseek_v3")
    assert get_model_conversion_mapping(plain(), add_legacy=False) == []
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**STOCK))
    stock.save_pretrained(tmp_path)
    _, report = PlainSubclass.from_pretrained(tmp_path, config=plain().config, output_loading_info=True)
    assert "model.layers.1.mlp.experts.gate_up_proj" in report["missing_keys"]  # and it loads: no error


def test_conversion_rules_are_copies() -> None:
    first, second = (get_checkpoint_conversion_mapping("deepseek_v3") for _ in range(2))
    assert first[0] is not second[0]


def test_a_mapping_is_registered_once_without_overwrite() -> None:
    with pytest.raises(ValueError, match="kimi_k2"):
        register_checkpoint_conversion_mapping("kimi_k2", [])


def test_a_prefix_is_not_added_when_a_new_model_is_saved(tiny_model: KimiK2ForCausalLM) -> None:
    rules = get_model_conversion_mapping(tiny_model, add_legacy=False)
    assert any(isinstance(rule, PrefixChange) for rule in rules)
    names = revert_weight_conversion(tiny_model, tiny_model.state_dict())
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in names


def test_quantizers_are_two_dictionaries() -> None:
    with pytest.raises(ValueError, match="already registered"):
        quantizers.register_quantizer("fp8")(HfQuantizer)
    assert (
        type(quantizers.AUTO_QUANTIZER_MAPPING) is type(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING) is dict
    )


def test_trainer_shifts_labels_by_a_table_of_class_names() -> None:
    from transformers import Trainer

    assert "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()" in inspect.getsource(Trainer.compute_loss)


# loading.py


def test_a_loaded_model_remembers_how_it_was_converted(tmp_path: Path, tiny_model: KimiK2ForCausalLM) -> None:
    tiny_model.save_pretrained(tmp_path)
    hub = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    stock, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert stock._weight_conversions
    assert set(report) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


def test_stock_fp8_rejects_a_partial_block_and_misreads_another() -> None:
    dequantise = Fp8Dequantize(None)._dequantize_one
    with pytest.raises(ValueError, match=r"\(576, 128\) not divisible by scale grid \(5, 1\)"):
        dequantise(torch.ones(576, 128).to(torch.float8_e4m3fn), torch.ones(5, 1))
    got = dequantise(torch.ones(192, 128).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]]))
    assert got[:, 0].tolist() == [1.0] * 96 + [2.0] * 96  # 128 and 64 rows were meant


def test_files_are_read_in_one_step_that_can_be_given_other_weights() -> None:
    """loading.load_weights stands in for it, with objects that are asked like safetensors' slices."""
    step = PreTrainedModel._load_pretrained_model
    names = list(inspect.signature(step).parameters)
    assert names[:4] == ["model", "state_dict", "checkpoint_files", "load_config"]
    assert "if state_dict is not None:\n                merged_state_dict = state_dict" in inspect.getsource(
        step
    )
    assert "tensor = tensor[...]" in inspect.getsource(core_model_loading._materialize_copy)
    shard = inspect.getsource(sharding_utils.DtensorShardOperation.shard_tensor)
    assert "source.get_shape()" in shard
    assert "source[tuple(slice_parts)]" in shard


def test_weights_that_are_offloaded_to_disk_are_written_there_if_no_file_has_them() -> None:
    source = inspect.getsource(core_model_loading.offload_and_maybe_resave_param)
    assert "if target_name not in disk_offload_index or" in source


def test_parallel_plans_grow_by_the_names_of_a_quantizer() -> None:
    source = inspect.getsource(HfQuantizer.update_parallel_plan)
    assert "for p, names in self.serialized_names.items()" in source
    assert "if key in params and key not in plan" in source


def test_conversions_are_undone_when_a_model_is_saved() -> None:
    """hf_quantizer.py sets `_weight_conversions`; the operations get the configuration."""
    source = inspect.getsource(revert_weight_conversion)
    assert 'getattr(model, "_weight_conversions", None)' in source
    assert "config=model.config" in source


# saving.py


def test_saving_names_the_class_and_writes_its_configuration_first(tmp_path: Path) -> None:
    model = plain()
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["PlainSubclass"]
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert source.index("config.save_pretrained(save_directory)") < source.index("safe_save_file(")


def test_ranks_agree_on_who_writes_and_wait() -> None:
    model = plain()
    assert model.should_save_on_this_rank(True) is True
    assert model.should_save_on_this_rank(False) is False
    model.barrier_after_gathered_checkpoint_save(None)
    one_rank = SimpleNamespace(tp_size=1, dp_size=1, ep_size=1)
    model.barrier_after_gathered_checkpoint_save(
        one_rank
    )  # a barrier here would fail: there is no process group


def test_a_registered_class_counts_as_custom_but_not_as_remote_code() -> None:
    """Custom: conversions only if registered. Remote: its source file would be copied beside the weights."""
    assert KimiK2ForCausalLM.is_custom_code()
    assert not KimiK2ForCausalLM.is_remote_code()
    assert not DeepseekV3ForCausalLM.is_custom_code()


def test_plain_attributes_of_a_configuration_are_saved_by_upstream() -> None:
    config = PreTrainedConfig()
    config.note_of_mine = 1
    assert "note_of_mine" in config.to_diff_dict()


def test_attention_expands_the_whole_cache_at_every_step(tiny_config: Any) -> None:
    """Why attention.py exists: kv_b_proj runs over all cached latents for one query."""
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(tiny_config().to_dict())).eval()
    seen: list[int] = []
    model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[-2])
    )
    with torch.no_grad():
        cache = model(torch.arange(3, 40)[None]).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
    assert seen == [37, 38]


def test_dynamic_caches_are_copied_at_every_step() -> None:
    """Why latent_cache.py exists."""
    cache = DynamicCache()
    first, _ = cache.update(torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 2), 0)
    second, _ = cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 2), 0)
    assert first.data_ptr() != second.data_ptr()


def test_generate_has_a_step_that_prefills_and_one_that_makes_the_cache() -> None:
    """generation.py overrides both."""
    assert list(inspect.signature(GenerationMixin._prefill).parameters)[1:4] == [
        "input_ids",
        "generation_config",
        "model_kwargs",
    ]
    assert list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)[1:3] == [
        "generation_config",
        "model_kwargs",
    ]
    assert GenerationConfig().prefill_chunk_size is None


def test_masks_for_sdpa_are_boolean_and_left_out_where_causality_is_enough(tiny_config: Any) -> None:
    """attention.py: no mask means causal; for the first tokens of a static cache too, though there are more keys."""
    config = tiny_config()
    config._attn_implementation = "sdpa"

    def mask(cache: Any, num_queries: int, padding: torch.Tensor | None = None) -> Any:
        return create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(1, num_queries, 8),
            attention_mask=padding,
            past_key_values=cache,
        )

    dynamic, static = DynamicCache(), StaticCache(config, max_cache_len=12)
    for cache in (dynamic, static):
        assert mask(cache, 5, torch.ones(1, 5, dtype=torch.int64)) is None
        cache.update(torch.zeros(1, 1, 5, 24), torch.zeros(1, 1, 5, 12), 0)
    assert mask(dynamic, 1) is None
    later = mask(dynamic, 3)
    assert later.dtype == torch.bool
    assert later.shape == (1, 1, 3, 8)
    padded = mask(static, 1, torch.ones(1, 6, dtype=torch.int64))
    assert padded[0, 0, 0].tolist() == [True] * 6 + [False] * 6
