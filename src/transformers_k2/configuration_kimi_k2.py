"""KimiK2Config: DeepSeek-V3's configuration with Kimi K2's defaults, checks and on-disk form.

Three things differ from the class it extends: the defaults are K2-Instruct's; an unknown key is an error (upstream keeps
it silently, so a typo trains another model); and `config.json` is written with the hub's key names and complete, because
readers of the hub's layout (vLLM, SGLang, llama.cpp, older transformers) know `rope_scaling`, `rope_theta` and
`torch_dtype`, and fill a missing key with DeepSeek's default, not Kimi's.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config, GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .files import write_text

logger = logging.get_logger(__name__)

# config.json of moonshotai/Kimi-K2-Instruct
ROPE_THETA = 50000.0
YARN_INSTRUCT = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

# Keys that published config.json files carry and that are not fields: handled by transformers, or left from 4.x.
_TRANSFORMERS_KEYS = {
    *(
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
    ),
    *(
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "tokenizer_class",
    ),
    *(
        "torch_dtype",
        "transformers_weights",
        "distributed_config",
        "fusion_config",
        "is_decoder",
        "use_return_dict",
    ),
    *(
        "add_cross_attention",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "finetuning_task",
        "prefix",
    ),
    *(
        "pruned_heads",
        "remove_invalid_values",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
    ),
    *(
        "tie_encoder_decoder",
        "torchscript",
        "use_bfloat16",
        "bad_words_ids",
        "begin_suppress_tokens",
        "max_length",
    ),
    *("num_mtp_layers", "num_nextn_predict_layers", "num_local_experts", "ignore_keys_at_rope_validation"),
    *("head_dim", "qk_head_dim", "partial_rotary_factor", "kernel_config", "adapter_config", "use_kernels"),
}
# Derived from other fields: kept out of config.json (older readers take `head_dim` for the attention width).
_DERIVED_KEYS = ("head_dim", "qk_head_dim")


@strict
class KimiK2Config(DeepseekV3Config):
    r"""Configuration of a Kimi K2 family model; the defaults are those of moonshotai/Kimi-K2-Instruct.

    `rope_scaling`/`rope_theta` (the hub's names) and `rope_parameters` (transformers 5's) are both read. Without
    either, K2-Instruct's YaRN applies; with `rope_theta` alone, or `rope_scaling=None`, plain RoPE.

    Raises:
        ValueError: an unknown key (the nearest known one is named), or values that contradict each other.

    Source: arXiv 2507.20534, section 2.3 and the published config.json.
    """

    model_type: ClassVar[str] = "kimi_k2"
    tokenizer_class: ClassVar[str] = "TikTokenTokenizer"  # for a folder without tokenizer_config.json

    vocab_size: int = 163840
    num_attention_heads: int = 64
    num_key_value_heads: int | None = None  # MLA: one per attention head
    n_routed_experts: int = 384
    routed_scaling_factor: float = 2.827
    n_group: int | None = 1
    topk_group: int | None = 1
    first_k_dense_replace: int | None = 1
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 163584
    eos_token_id: int | list[int] | None = 163585
    rope_parameters: RopeParameters | dict | None = None
    num_mtp_layers: int = 0
    # Published keys without a counterpart in DeepseekV3Config. The model computes exactly one value of the first three.
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    seq_aux: bool = True
    aux_loss_alpha: float = 0.001
    ep_size: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        known = self._known_keys()
        for key in kwargs:
            if key not in known and not key.startswith("_"):
                near = difflib.get_close_matches(key, sorted(known), n=1)
                hint = f"did you mean {near[0]!r}?" if near else "see KimiK2Config for the known keys."
                raise ValueError(f"Unknown KimiK2Config key {key!r} (value {kwargs[key]!r}): {hint}")
        if "rope_theta" not in kwargs and "rope_scaling" not in kwargs and self.rope_parameters is None:
            self.rope_parameters = dict(YARN_INSTRUCT)
        kwargs.setdefault("rope_theta", ROPE_THETA)
        self.rope_parameters = copy.deepcopy(self.rope_parameters)  # upstream completes the dict in place
        kwargs["rope_scaling"] = copy.deepcopy(kwargs.get("rope_scaling"))
        if kwargs.get("tokenizer_class") is None:
            kwargs.pop("tokenizer_class", None)
        for key in (*_DERIVED_KEYS, "model_type"):  # a relative's model_type must not outlive its file
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        if self.rope_parameters is not None:
            self.rope_parameters.pop("type", None)  # the 4.x name; `rope_type` holds it now
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As upstream's, but `quantization_config=None`, which `from_pretrained` hands on, leaves the file's alone."""
        if kwargs.get("quantization_config", ...) is None:
            del kwargs["quantization_config"]
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _known_keys(cls) -> set[str]:
        known = {field.name for field in fields(cls)} | _TRANSFORMERS_KEYS
        return known | set(GenerationConfig._get_default_generation_params())

    def _check(self) -> None:
        """Contradictions, each told in one line before a model of a trillion parameters is laid out."""

        def demand(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"KimiK2Config: {message}")

        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_hidden_layers",
        )
        sizes += ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        for name in (*sizes, "n_routed_experts", "num_experts_per_tok", "max_position_embeddings", "n_group"):
            value = getattr(self, name)
            demand(value is not None and value > 0, f"{name} must be a positive integer, got {value!r}.")
        demand(
            self.num_key_value_heads == self.num_attention_heads,
            f"num_key_value_heads must equal num_attention_heads (MLA has one key and value per head), got "
            f"{self.num_key_value_heads} and {self.num_attention_heads}.",
        )
        demand(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank must be null or > 0: {self.q_lora_rank}.",
        )
        demand(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}.")
        experts, chosen, groups = self.n_routed_experts, self.num_experts_per_tok or 0, self.n_group or 1
        demand(chosen <= experts, f"num_experts_per_tok is {chosen}, but there are only {experts} experts.")
        demand(experts % groups == 0, f"n_routed_experts {experts} is not divisible by n_group {groups}.")
        demand(
            self.topk_group is not None and 0 < self.topk_group <= groups,
            f"topk_group must be between 1 and n_group {groups}, got {self.topk_group}.",
        )
        for name, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
            demand(
                getattr(self, name) == only,
                f"{name} must be {only!r} in this family, got {getattr(self, name)!r}.",
            )

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The hub's name of `rope_parameters`. Setting it keeps the base frequency, as an edit of config.json does."""
        return self.rope_parameters  # pyright: ignore[reportReturnType]

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        value = dict(value or {})
        rope_type = value.pop("type", "default")
        theta = (self.rope_parameters or {}).get("rope_theta", ROPE_THETA)
        self.rope_parameters = {"rope_type": rope_type, "rope_theta": theta, **value}

    def to_hub_dict(self, keep_auto_map: bool = False) -> dict[str, Any]:
        """This configuration as the hub's config.json: complete, with the key names of transformers 4.x.

        Args:
            keep_auto_map: keep the `auto_map` the configuration was loaded with. It is left out by default: the remote
                code it points to is not saved beside the weights, and no longer runs on transformers 5.
        """
        hub = PreTrainedConfig.to_diff_dict(self)
        rope = dict(hub.pop("rope_parameters", None) or {})
        rope_type = rope.pop("rope_type", "default")
        hub["rope_theta"] = rope.pop("rope_theta", ROPE_THETA)
        hub["rope_scaling"] = None if rope_type == "default" else {**rope, "type": rope_type}
        if (dtype := hub.pop("dtype", None)) is not None:
            hub["torch_dtype"] = dtype
        # The class names that readers of the hub's layout know; task heads of ours have no published name.
        published = {"KimiK2ForCausalLM": "DeepseekV3ForCausalLM"}
        if architectures := hub.get("architectures"):
            hub["architectures"] = [published.get(name, name) for name in architectures]
        dropped = _DERIVED_KEYS if keep_auto_map else (*_DERIVED_KEYS, "auto_map")
        # Attributes that a program hung on the configuration: a file that has them would be refused on loading.
        kept = self._known_keys().difference(dropped)
        return {key: hub[key] for key in sorted(hub) if key in kept and not key.startswith("_")}

    def to_json_string(self, use_diff: bool = True, keep_auto_map: bool = False) -> str:
        """The text of config.json: the hub's form (see [`to_hub_dict`]), or every attribute with `use_diff=False`."""
        if not use_diff:
            return super().to_json_string(use_diff=False)
        hub = self._encode_special_floats(self.to_hub_dict(keep_auto_map))
        return json.dumps(hub, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json in the hub's form; `keep_auto_map=True` keeps a loaded `auto_map` (see [`to_hub_dict`])."""
        keep_auto_map = kwargs.pop("keep_auto_map", False)
        if strangers := sorted(
            key for key in vars(self).keys() - self._known_keys() if not key.startswith("_")
        ):
            logger.warning(
                f"config.json leaves out {', '.join(strangers)}: no KimiK2Config key, loading would refuse it."
            )
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if keep_auto_map:
            write_text(Path(save_directory) / "config.json", self.to_json_string(keep_auto_map=True))


__all__ = ["KimiK2Config"]
