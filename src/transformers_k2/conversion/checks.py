"""The checks of `inspect`: a config.json by itself, a folder's files, and the tensors against the manifest.

Each returns `Problem`s and raises nothing for what it finds. An error means that the model cannot be loaded
as the config says, or would be loaded wrong; a warning, that a reader may take it another way than it was
meant; a note is harmless.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from ..checkpoint import Scan
from ..manifest import COUNT_KEYS, NULLABLE_KEYS, SIZE_KEYS, WRAPPER_EXTRAS, Tensors
from .report import Fold, Problem, fold, kind_of, ranges

MODEL_TYPES = ("kimi_k2", "deepseek_v3")
# Absent, these are filled with DeepSeek's default instead of Kimi's.
WANTED_KEYS = (
    *("model_type", "rms_norm_eps", "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group"),
    *("max_position_embeddings", "num_key_value_heads", "eos_token_id"),
)
# The other keys of published config.json files; the second half is what transformers 4 wrote into every
# text_config.
OTHER_KEYS = """
    architectures attention_bias attention_dropout attn_implementation auto_map aux_loss_alpha bos_token_id
    dtype ep_size experts_implementation head_dim hidden_act initializer_range name_or_path num_mtp_layers
    output_router_logits pad_token_id pretraining_tp qk_head_dim quantization_config rope_interleave
    rope_parameters rope_scaling rope_theta scoring_func seq_aux tie_word_embeddings topk_method torch_dtype
    transformers_version use_cache

    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p
    use_bfloat16
"""
KNOWN_KEYS = {*SIZE_KEYS, *NULLABLE_KEYS, *COUNT_KEYS, *WANTED_KEYS, *OTHER_KEYS.split()}

_NUMBER = (int, float)
_LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(\d{1,9})\.")


def check_config(text: Mapping[str, Any]) -> list[Problem]:
    """A language model's configuration whose sizes are known to be sound (see manifest.split_config)."""
    problems = []

    def add(severity: str, told: str) -> None:
        problems.append(Problem(severity, "config", f"config.json: {told}."))

    if (model_type := text.get("model_type", "kimi_k2")) not in MODEL_TYPES:
        add("warning", f"model_type is {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")
    for key in sorted(text.keys() - KNOWN_KEYS):
        if key.startswith("_"):
            continue
        near = difflib.get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.85)
        if near:
            add("warning", f"the key {key!r} is unknown; did you mean {near[0]!r}?")
        else:
            add("note", f"the key {key!r} is unknown and read by nothing of this family")
    missing = [key for key in WANTED_KEYS if key not in text]
    if "rope_theta" not in text and "rope_parameters" not in text:
        missing.append("rope_theta")
    if missing:
        add("warning", f"it lacks {', '.join(missing)}; readers fill in DeepSeek's defaults")
    heads, kv_heads = text["num_attention_heads"], text.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        add("warning", f"num_key_value_heads is {kv_heads!r}; expected {heads}, MLA has a key for each head")
    experts, groups = text["n_routed_experts"], text.get("n_group")
    if groups is not None and (type(groups) is not int or groups < 1 or experts % groups):
        add("error", f"n_group is {groups!r}; expected a divisor of n_routed_experts {experts}")
    rope = rope_of(text)
    if rope is None:
        add("error", "rope_scaling is no object; expected one, or null")
    elif rope.get("rope_type") == "yarn":
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        length = text.get("max_position_embeddings")
        if not (
            isinstance(factor, _NUMBER) and isinstance(original, _NUMBER) and isinstance(length, _NUMBER)
        ):
            add("error", f"YaRN has factor {factor!r} over {original!r} for {length!r}; expected numbers")
        elif factor * original != length:
            reach = f"{factor:g} x {original:,} = {factor * original:,.0f}"
            add("warning", f"YaRN reaches {reach} positions, but max_position_embeddings is {length:,}")
    return problems


def rope_of(text: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rope settings under transformers 5's key names, whoever wrote them; None if they are no object."""
    parameters, scaling = text.get("rope_parameters"), text.get("rope_scaling")
    rope = scaling if parameters is None else parameters
    if rope is not None and not isinstance(rope, Mapping):
        return None
    rope = dict(rope or {})
    old_name = rope.pop("type", None)
    rope.setdefault("rope_type", old_name or "default")
    rope.setdefault("rope_theta", text.get("rope_theta"))
    return rope


def check_eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[Problem]:
    """Two files name the token that ends a text; K2-Instruct's differ on purpose ([EOS] and <|im_end|>)."""
    ours, theirs = config.get("eos_token_id"), generation.get("eos_token_id")
    if theirs is None or ours == theirs:
        return []
    told = f"eos_token_id is {ours!r} in config.json, {theirs!r} in generation_config.json"
    return [
        Problem(
            "note", "config", f"{told}; generate() follows the second, and K2-Instruct's differ on purpose."
        )
    ]


def check_folder(found: Scan) -> list[Problem]:
    """Files and sums that the index does not account for; what cannot be read is in `found.problems`."""
    checkpoint, problems = found.checkpoint, []
    named = {path.name for path in checkpoint.shards}
    loose = sorted(
        path.name
        for path in checkpoint.folder.glob("*.safetensors")
        if path.name not in named and path.name[0] != "."
    )
    if checkpoint.index is not None and loose and not found.unread:
        told = f"{len(loose):,} files are not named by {checkpoint.index.name}, so not read: "
        told += ", ".join(map(repr, loose[:3])) + (", ..." if len(loose) > 3 else ".")
        problems.append(Problem("warning", "index", told, len(loose), tuple(loose[:3])))
    if checkpoint.index is None and len(checkpoint.shards) > 1:
        told = f"{len(checkpoint.shards):,} shards without an index: a missing one cannot be noticed by name."
        problems.append(Problem("warning", "index", told, len(checkpoint.shards)))
    size = checkpoint.index_metadata.get("total_size")
    if size is not None and not found.unread and size != checkpoint.num_bytes:
        told = f"The index says total_size {size!r}, the tensors have {checkpoint.num_bytes} bytes."
        problems.append(Problem("warning", "index", told))
    bare = [
        path.name for path, metadata in checkpoint.shard_metadata.items() if metadata.get("format") != "pt"
    ]
    if bare:
        told = (
            f"{len(bare):,} shards do not say format: pt in their metadata; some older readers insist on it."
        )
        problems.append(Problem("note", "file", told, len(bare), tuple(bare[:3])))
    return problems


def check_heads(text: Mapping[str, Any], tensors: Tensors) -> list[Problem]:
    """The number of heads that kv_b_proj has rows for, which explains three wrong shapes at once."""
    rows_per_head = text["qk_nope_head_dim"] + text["v_head_dim"]
    for name, (shape, _) in tensors.items():
        if name.endswith(".kv_b_proj.weight") and len(shape) == 2:
            if shape[0] == rows_per_head * text["num_attention_heads"]:
                return []
            told = f"{name} has {shape[0]:,} rows, {shape[0] / rows_per_head:g} heads of {rows_per_head}"
            said = f"config.json says num_attention_heads {text['num_attention_heads']}"
            return [Problem("error", "shape", f"{told}, but {said}.", examples=(name,))]
    return []


def check_missing(missing: list[str], expected: Tensors, num_layers: int) -> list[Problem]:
    """One line for all layers that are missing altogether, one for each kind of the rest."""
    if not missing:
        return []
    per_layer = Counter(map(_layer, expected))
    gone = {
        layer
        for layer, count in Counter(map(_layer, missing)).items()
        if layer >= 0 and per_layer[layer] == count
    }
    # transformers drops an MTP layer when it loads a model, and keeps the config's number when it saves it.
    mtp = {layer for layer in gone if layer >= num_layers}
    problems = []
    for severity, layers, why in (
        ("error", gone - mtp, f"num_hidden_layers is {num_layers}"),
        ("warning", mtp, "num_nextn_predict_layers promises it for multi-token prediction"),
    ):
        names = [name for name in missing if _layer(name) in layers]
        if names:
            told = f"Layer {ranges(layers)} is missing altogether, {len(names):,} tensors; {why}."
            problems.append(Problem(severity, "missing", told, len(names), tuple(names[:3])))
    rest = [name for name in missing if _layer(name) not in gone]
    return problems + [_folded("error", "missing", "missing", group) for group in fold(rest)]


def check_surplus(surplus: list[str], optional: Tensors, num_layers: int) -> list[Problem]:
    """Tensors that the manifest does not expect: stray buffers, another modality, more layers, the rest.

    `num_layers` counts the MTP layers too.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in surplus:
        if name in optional or name.endswith(".rotary_emb.inv_freq"):
            groups["stray"].append(name)
        elif name.startswith(WRAPPER_EXTRAS):
            groups["vision"].append(name)
        else:
            groups["rest" if _layer(name) < num_layers else "beyond"].append(name)
    problems = []
    for group in fold(groups["stray"]):
        problems.append(_folded("note", "unexpected", "a stray that every reader ignores", group))
    if names := groups["vision"]:
        told = f"{len(names):,} tensors of the vision tower and its projector are not checked."
        problems.append(Problem("note", "unexpected", told, len(names), tuple(names[:3])))
    if names := groups["beyond"]:
        mtp = any(".eh_proj." in name for name in names)
        hint = "multi-token prediction, num_nextn_predict_layers" if mtp else "num_hidden_layers"
        told = f"Layer {ranges(map(_layer, names))} is beyond the last one by config.json ({hint})"
        told += f": {len(names):,} tensors are not read."
        problems.append(Problem("warning", "unexpected", told, len(names), tuple(names[:3])))
    for group in fold(groups["rest"]):
        problems.append(_folded("warning", "unexpected", "not expected by config.json, and not read", group))
    return problems


def check_values(expected: Tensors, tensors: Tensors) -> list[Problem]:
    """Wrong shapes, a line for each kind of name; wrong dtypes, a line for each pair of dtypes."""
    shapes: defaultdict[Any, list[str]] = defaultdict(list)
    dtypes: defaultdict[Any, list[str]] = defaultdict(list)
    for name, (shape, dtype) in expected.items():
        found = tensors.get(name)
        if found is None or found == (shape, dtype):
            continue
        if found[0] != shape:
            shapes[shape, found[0], kind_of(name)].append(name)
        if found[1] != dtype:
            leaf = name.rpartition(".")[2]
            dtypes[
                dtype, found[1], leaf if leaf in ("e_score_correction_bias", "weight_shape") else ""
            ].append(name)
    problems = []
    for (shape, found, _), names in shapes.items():
        problems.append(_folded("error", "shape", f"{list(found)}, expected {list(shape)}", fold(names)[0]))
    for (dtype, found, leaf), names in dtypes.items():
        severity, why = "error", ""
        if leaf == "e_score_correction_bias":
            severity, why = "warning", " (rounding it sends tokens to other experts)"
        elif leaf == "weight_shape" and found == "I64":
            severity, why = "note", " (as compressed-tensors itself writes; readers accept both)"
        elif {dtype, found} <= {"BF16", "F16", "F32", "F64"}:
            severity, why = "warning", " (the dtype in config.json)"
        groups = [group.pattern for group in fold(names)]
        told = f"{_tensors(len(names))} {found}, expected {dtype}{why}: "
        told += ", ".join(groups[:3]) + (", ..." if len(groups) > 3 else ".")
        problems.append(Problem(severity, "dtype", told, len(names), tuple(names[:3])))
    return problems


def _folded(severity: str, kind: str, what: str, group: Fold) -> Problem:
    told = f"{_tensors(group.count)} {what}: {group.pattern}"
    if not group.exact:
        told += f", such as {', '.join(group.examples)}"
    return Problem(severity, kind, f"{told}.", group.count, group.examples)


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count:,} tensors are"


def _layer(name: str) -> int:
    """The layer number in a tensor name; -1 for what is in no layer."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1
