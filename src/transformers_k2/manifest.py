"""Which tensors a config.json promises: names, shapes and dtypes in the hub layout, without building a model.

A converter, a planner and `k2 inspect` all need the same list before a byte is read. It is derived here once,
from a plain dict with the hub's key names, for the DeepSeek-V3 architecture that the Kimi K2 family shares:
bf16, FP8 with 128x128 blocks, packed INT4 experts, the K2.5 wrapper (`text_config`, prefix
`language_model.`), Moonlight (no query LoRA), MTP layers as DeepSeek-V3 publishes them. It gives up the
vision tower of K2.5 (its tensors are known by prefix only).

Sources of the names and shapes: the tensor listings of moonshotai/Kimi-K2-Instruct (139,644 tensors),
Kimi-K2.5 (208,215 text tensors) and deepseek-ai/DeepSeek-V3 (91,991 tensors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Tensors = dict[str, tuple[tuple[int, ...], str]]

WRAPPER_PREFIX = "language_model."
WRAPPER_EXTRAS = ("vision_tower.", "mm_projector.")

SIZE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "num_experts_per_tok"),
)
NULLABLE_KEYS = ("q_lora_rank", "n_shared_experts", "first_k_dense_replace")
COUNT_KEYS = ("num_nextn_predict_layers", "moe_layer_freq")  # may be absent
MAX_EXPERTS = 1_000_000  # K2 has 23,040; a config that asks for more is a mistake or an attack on memory
MAX_LAYERS, MAX_EXPERTS_OF_A_LAYER = 1_000, 8_192  # K2 has 61 and 384; likewise

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
# quantization_config of the published checkpoints, for a config that has none.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
}
METHODS = ("none", "fp8", "int4")
# Linear modules that no FP8 release of this family quantises.
_FP8_KEEPS = ("lm_head", "eh_proj", "shared_head.head")

PARTS: tuple[str, ...] = (
    *(
        "embedding",
        "lm_head",
        "attention",
        "dense_mlp",
        "router",
        "routed_experts",
        "shared_experts",
        "norms",
    ),
)
_LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(\d{1,9})\.")
_PATTERNS = {
    "vision": re.compile(r"vision_tower\.|mm_projector\."),
    "embedding": re.compile(r"model\.embed_tokens\."),
    "lm_head": re.compile(r"lm_head\."),
    "norms": re.compile(r".*norm\.weight$"),
    "attention": re.compile(r".*\.self_attn\."),
    "router": re.compile(r".*\.mlp\.gate\."),
    "routed_experts": re.compile(r".*\.mlp\.experts\."),
    "shared_experts": re.compile(r".*\.mlp\.shared_experts\."),
    "dense_mlp": re.compile(r".*\.mlp\.(?:gate|up|down)_proj\."),
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of linear modules are stored: `method` is one of METHODS, the rest are its options."""

    method: str = "none"
    block: tuple[int, int] = (128, 128)  # fp8: rows and columns of one scale
    group: int = 32  # int4: input features of one scale
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def stores(self, module: str, out_features: int, in_features: int, dtype: str) -> Tensors:
        """The tensors of the linear module `module`, whose plain form is a [out, in] weight of `dtype`.

        Raises:
            ValueError: int4 groups or words do not fill the input features.
        """
        if self.method == "fp8" and not self._fp8_keeps(module):
            grid = (-(-out_features // self.block[0]), -(-in_features // self.block[1]))
            return {
                f"{module}.weight": ((out_features, in_features), "F8_E4M3"),
                f"{module}.weight_scale_inv": (grid, "F32"),
            }
        if self.method == "int4" and self._int4_packs(module):
            if in_features % self.group or in_features % 8:
                wanted = f"a multiple of the group size {self.group} and of 8 codes per int32"
                raise ValueError(f"{module} has {in_features} input features: expected {wanted}.")
            return {
                f"{module}.weight_packed": ((out_features, in_features // 8), "I32"),
                f"{module}.weight_scale": ((out_features, in_features // self.group), "BF16"),
                f"{module}.weight_shape": ((2,), "I32"),
            }
        return {f"{module}.weight": ((out_features, in_features), dtype)}

    def _fp8_keeps(self, module: str) -> bool:
        # transformers' reading of modules_to_not_convert: a regex from the start to a dot or the end, or a suffix.
        if module.endswith((*_FP8_KEEPS, *self.ignore)):
            return True
        return any(re.match(rf"(?:{pattern})(?:\.|$)", module) for pattern in self.ignore)

    def _int4_packs(self, module: str) -> bool:
        chosen = any(match(module) for match in self._targeted)
        return chosen and not any(match(module) for match in self._ignored)

    @cached_property
    def _targeted(self) -> list[Callable[[str], Any]]:
        return list(map(_matcher, self.targets))

    @cached_property
    def _ignored(self) -> list[Callable[[str], Any]]:
        return list(map(_matcher, self.ignore))


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The language model's part of a config.json, and the prefix of its tensors ("" or "language_model.").

    Raises:
        ValueError: a size is missing, of the wrong kind or out of range; all of them are named.
    """
    wrapped = "text_config" in config
    text = dict(_object(config["text_config"], "text_config") if wrapped else config)
    if wrapped:
        for key in ("quantization_config", "dtype", "torch_dtype"):
            text[key] = text.get(key) or config.get(key)
    if missing := [key for key in (*SIZE_KEYS, *NULLABLE_KEYS) if key not in text]:
        wanted = "expected the keys of a kimi_k2 or deepseek_v3 config.json"
        raise ValueError(f"The config lacks {', '.join(missing)}: {wanted}.")
    wrong = [key for key in SIZE_KEYS if type(text[key]) is not int or text[key] <= 0]
    for key in (*NULLABLE_KEYS, *COUNT_KEYS):
        value = text.get(key)
        if value is not None and (type(value) is not int or value < (key == "q_lora_rank")):
            wrong.append(key)
    if wrong:
        values = ", ".join(f"{key} {str(text[key])[:40]}" for key in wrong)
        raise ValueError(f"The config cannot describe a model: it has {values}; expected positive integers.")
    if text["num_experts_per_tok"] > text["n_routed_experts"]:
        chosen = f"{text['num_experts_per_tok']} experts per token, of {text['n_routed_experts']}"
        raise ValueError(
            f"The config cannot describe a model: it has {chosen}; expected no more than there are."
        )
    layers = text["num_hidden_layers"] + (text.get("num_nextn_predict_layers") or 0)
    if layers * text["n_routed_experts"] > MAX_EXPERTS:
        sizes = f"{layers} layers of {text['n_routed_experts']} experts"
        raise ValueError(f"The config has {sizes}: expected at most {MAX_EXPERTS:,} experts in all.")
    if layers > MAX_LAYERS or text["n_routed_experts"] > MAX_EXPERTS_OF_A_LAYER:
        sizes = f"{layers} layers of {text['n_routed_experts']} experts"
        raise ValueError(
            f"The config has {sizes}: expected at most {MAX_LAYERS:,} layers of {MAX_EXPERTS_OF_A_LAYER:,} experts."
        )
    return text, WRAPPER_PREFIX if wrapped else ""


def quantization_of(config: Mapping[str, Any]) -> Quantization:
    """The quantization_config of a config.json (of its text part, for K2.5).

    Raises:
        ValueError: a method, format or option that this family's checkpoints do not use.
    """
    text = _object(config.get("text_config"), "text_config")
    spec = _object(
        config.get("quantization_config") or text.get("quantization_config"), "quantization_config"
    )
    if not spec:
        return Quantization()
    method = spec.get("quant_method")
    if method == "fp8":
        block = spec.get("weight_block_size") or []
        sizes = tuple(block) if isinstance(block, list) else ()
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(
                f"quantization_config has weight_block_size {block!r}: expected two sizes, as [128, 128]."
            )
        ignore = _patterns(spec.get("modules_to_not_convert"), "modules_to_not_convert")
        return Quantization("fp8", block=(sizes[0], sizes[1]), ignore=ignore)
    if method != "compressed-tensors":
        raise ValueError(
            f"quantization_config has quant_method {method!r}: expected 'fp8' or 'compressed-tensors'."
        )
    groups = list(_object(spec.get("config_groups"), "config_groups").values())
    if spec.get("format") != "pack-quantized" or len(groups) != 1:
        found = f"format {spec.get('format')!r} with {len(groups)} config_groups"
        raise ValueError(f"quantization_config has {found}: expected 'pack-quantized' with one.")
    scheme = _object(groups[0], "a config group")
    weights = _object(scheme.get("weights"), "weights")
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    for key, value in wanted.items():
        if weights.get(key) != value:
            raise ValueError(
                f"quantization_config has weights with {key} {weights.get(key)!r}: expected {value!r}, as K2."
            )
    group = weights.get("group_size")
    if type(group) is not int or group <= 0:
        raise ValueError(f"quantization_config has group_size {group!r}: expected a positive integer, as 32.")
    targets = _patterns(scheme.get("targets"), "targets")
    return Quantization("int4", group=group, targets=targets, ignore=_patterns(spec.get("ignore"), "ignore"))


def expected_tensors(
    config: Mapping[str, Any], quantization: str | None = None, fused: bool = False
) -> Tensors:
    """What a checkpoint of `config` holds: name -> (shape, dtype as safetensors spells it), in layer order.

    Args:
        config: a config.json as a dict, with hub key names; a K2.5 wrapper gives names under `language_model.`.
        quantization: "none", "fp8" or "int4" instead of what the config says; the options come from the config
            where it has that method, else from the published checkpoints.
        fused: one `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I] per layer, as transformers
            keeps them in memory, instead of one tensor per expert. Only unquantised.

    Raises:
        ValueError: the config is incomplete or contradicts itself, or `quantization` is not one of the three.
    """
    if quantization not in (None, *METHODS):
        raise ValueError(f"Unknown quantization {quantization!r}: expected one of {', '.join(METHODS)}.")
    text, prefix = split_config(config)
    if quantization == "none":
        chosen = Quantization()
    else:
        try:
            chosen = quantization_of(text)
        except ValueError:
            if quantization is None:
                raise
            chosen = Quantization()
        if quantization not in (None, chosen.method):
            chosen = quantization_of({"quantization_config": FP8 if quantization == "fp8" else INT4})
    if fused and chosen.method != "none":
        raise ValueError(
            f"Fused experts have no {chosen.method} form: expected quantization 'none' with fused=True."
        )

    dtype = base_dtype(text)
    result: Tensors = {}
    for name, shape, kind in _tensors(text, fused):
        if kind == "linear":
            stored = chosen.stores(name, shape[0], shape[1], dtype)
            result.update({prefix + key: value for key, value in stored.items()} if prefix else stored)
        else:
            result[prefix + name] = (shape, "F32" if kind == "float32" and dtype != "F64" else dtype)
    return result


def optional_tensors(config: Mapping[str, Any]) -> Tensors:
    """Names a checkpoint may hold besides, which every reader ignores.

    `rotary_emb.inv_freq`: a buffer that Moonshot's exporter wrote; its 56 entries in K2 (hidden / heads / 2)
    are not even this model's rope dimension. `lm_head.weight` of a tied model repeats the embedding.
    """
    text, prefix = split_config(config)
    num = text["hidden_size"] // text["num_attention_heads"] // 2
    dtype = base_dtype(text)
    result: Tensors = {
        f"{prefix}model.layers.{layer}.self_attn.rotary_emb.inv_freq": ((num,), dtype)
        for layer in range(text["num_hidden_layers"])
    }
    if text.get("tie_word_embeddings"):
        result[f"{prefix}lm_head.weight"] = ((text["vocab_size"], text["hidden_size"]), dtype)
    return result


def count_parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Parameters per part: name -> (all, used for one token); router biases are counted, scales are not.

    "All" of K2-Instruct is 1,026.4e9. Moonshot's "32.6 B activated" counts the embedding table and lm_head:
    with both and everything else it is 32.86e9, without the router matrices 32.69e9; without the embedding (a
    row of which is looked up, not multiplied) 31.69e9. An MTP layer is not used when the next token is
    predicted: (n, 0).
    """
    text, _ = split_config(config)
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, (shape, _) in expected_tensors(text, "none", fused=True).items():
        part = part_of(name, text["num_hidden_layers"])
        counts[part] = counts.get(part, 0) + math.prod(shape)
    active = dict(counts)
    active["routed_experts"] = (
        counts["routed_experts"] * text["num_experts_per_tok"] // text["n_routed_experts"]
    )
    if "mtp" in counts:
        active["mtp"] = 0
    return {part: (size, active[part]) for part, size in counts.items()}


def part_of(name: str, num_layers: int) -> str:
    """The part of the model a tensor belongs to: a key of `count_parameters`, "mtp", "vision" or "other"."""
    if (layer := _LAYER.match(name)) and int(layer[1]) >= num_layers:
        return "mtp"
    name = name.removeprefix(WRAPPER_PREFIX)
    return next((part for part, pattern in _PATTERNS.items() if pattern.match(name)), "other")


def base_dtype(text: Mapping[str, Any]) -> str:
    """The dtype of what is not quantised, as safetensors spells it; by default bf16, as all are published."""
    name = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"The config has dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _tensors(text: Mapping[str, Any], fused: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind): a module's name for kind "linear", whose weight codecs split, else a tensor's."""
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    num_layers, num_mtp = text["num_hidden_layers"], text.get("num_nextn_predict_layers") or 0
    yield "model.embed_tokens.weight", (vocab, hidden), "plain"
    for layer in range(num_layers + num_mtp):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,), "plain"
        yield f"{name}.post_attention_layernorm.weight", (hidden,), "plain"
        yield from _attention(f"{name}.self_attn", text)
        sparse = (
            layer >= (text["first_k_dense_replace"] or 0) and layer % (text.get("moe_layer_freq") or 1) == 0
        )
        if sparse:
            yield from _experts(f"{name}.mlp", text, fused)
        else:
            yield from _mlp(f"{name}.mlp", hidden, text["intermediate_size"])
        if layer >= num_layers:
            yield f"{name}.embed_tokens.weight", (vocab, hidden), "plain"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{name}.{norm}.weight", (hidden,), "plain"
            yield f"{name}.eh_proj", (hidden, 2 * hidden), "linear"
            yield f"{name}.shared_head.head", (vocab, hidden), "linear"
    yield "model.norm.weight", (hidden,), "plain"
    if not text.get("tie_word_embeddings"):
        yield "lm_head", (vocab, hidden), "linear"


def _attention(name: str, text: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    nope, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    q_rank, kv_rank = text["q_lora_rank"], text["kv_lora_rank"]
    biased = [("o_proj", hidden), ("kv_a_proj_with_mqa", kv_rank + rope)]
    if q_rank is None:
        yield f"{name}.q_proj", (heads * (nope + rope), hidden), "linear"
    else:
        biased.append(("q_a_proj", q_rank))
        yield f"{name}.q_a_proj", (q_rank, hidden), "linear"
        yield f"{name}.q_a_layernorm.weight", (q_rank,), "plain"
        yield f"{name}.q_b_proj", (heads * (nope + rope), q_rank), "linear"
    yield f"{name}.kv_a_proj_with_mqa", (kv_rank + rope, hidden), "linear"
    yield f"{name}.kv_a_layernorm.weight", (kv_rank,), "plain"
    yield f"{name}.kv_b_proj", (heads * (nope + value), kv_rank), "linear"
    yield f"{name}.o_proj", (hidden, heads * value), "linear"
    if text.get("attention_bias"):
        for module, size in biased:
            yield f"{name}.{module}.bias", (size,), "plain"


def _experts(name: str, text: Mapping[str, Any], fused: bool) -> Iterator[tuple[str, tuple[int, ...], str]]:
    hidden, width, num_experts = text["hidden_size"], text["moe_intermediate_size"], text["n_routed_experts"]
    yield f"{name}.gate.weight", (num_experts, hidden), "plain"
    if text.get("topk_method", "noaux_tc") == "noaux_tc":
        yield f"{name}.gate.e_score_correction_bias", (num_experts,), "float32"
    if fused:
        yield f"{name}.experts.gate_up_proj", (num_experts, 2 * width, hidden), "plain"
        yield f"{name}.experts.down_proj", (num_experts, hidden, width), "plain"
    else:
        for expert in range(num_experts):
            yield from _mlp(f"{name}.experts.{expert}", hidden, width)
    if text["n_shared_experts"]:
        yield from _mlp(f"{name}.shared_experts", hidden, width * text["n_shared_experts"])


def _mlp(name: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield f"{name}.gate_proj", (width, hidden), "linear"
    yield f"{name}.up_proj", (width, hidden), "linear"
    yield f"{name}.down_proj", (hidden, width), "linear"


def _matcher(pattern: str) -> Callable[[str], Any]:
    """compressed-tensors' rule: the class name, `re:` and a regex from the start, or the whole name."""
    if pattern.startswith("re:"):
        return re.compile(pattern[3:]).match
    return (lambda module: True) if pattern == "Linear" else pattern.__eq__


def _object(value: Any, name: str) -> Mapping[str, Any]:
    """A JSON object; nothing (null) is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"The config has {name} {str(value)[:60]!r}: expected a JSON object.")
    return value or {}


def _patterns(value: Any, name: str) -> tuple[str, ...]:
    """A list of module names and regular expressions, proven to compile."""
    value = [] if value is None else value
    if type(value) is not list or not all(type(pattern) is str and pattern for pattern in value):
        raise ValueError(f"quantization_config has {name} {str(value)[:60]!r}: expected a list of patterns.")
    for pattern in value:
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"quantization_config has the pattern {pattern!r} in {name}: {error}.") from None
    return tuple(value)
