"""`k2 inspect`: what a checkpoint or a config.json is, and what is wrong with it, from headers alone.

The checks are those whose failure costs the most later: a tensor that the model will initialise at random, a
scale grid that reads as another block size, a quantization_config that no longer describes the tensors, a
router bias that lost its precision. A fault of the content becomes a line of the report, never an exception,
so that one run shows them all; only a path that is not there raises. What it gives up: weights are not read,
so wrong values go unseen.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from .. import resources
from ..checkpoint import (
    DTYPE_BITS,
    Checkpoint,
    CheckpointError,
    Scan,
    file_inside,
    no_collector,
    read_header,
    read_json,
    scan,
)
from ..manifest import (
    WRAPPER_EXTRAS,
    WRAPPER_PREFIX,
    Quantization,
    Tensors,
    count_parameters,
    expected_tensors,
    optional_tensors,
    part_of,
    quantization_of,
    split_config,
)
from . import checks
from . import layout as layouts
from .found import rank_files
from .report import Problem, Report, kind_of

# (prefix of the names, method, fused experts) -> layout, a stem of conversion/*.yaml.
LAYOUTS = {
    ("", "none", False): "hub_bf16",
    ("", "fp8", False): "hub_fp8",
    ("", "int4", False): "hub_int4",
    (WRAPPER_PREFIX, "int4", False): "k25_int4",
    ("", "none", True): "transformers_fused",
}
_HUB_NAME = re.compile(
    r"(?:language_model\.)?(?:lm_head|model\.(?:embed_tokens|norm|layers\.\{\}\.(?:input_layernorm|enorm|hnorm|"
    r"post_attention_layernorm|eh_proj|shared_head|embed_tokens|mlp\.(?:gate|experts|shared_experts|\w+_proj)|"
    r"self_attn\.(?:\w+_proj|kv_a_proj_with_mqa|q_a_layernorm|kv_a_layernorm|rotary_emb))))\."
)
# Names that are no layout's.
_FOREIGN_NAMES = {
    "a LoRA adapter": re.compile(r".*\.lora_[AB]\."),
    "hub_bf16 without the prefix 'model.'": re.compile(r"layers\.\{\}\.self_attn\."),
    "hub_bf16 under the prefix 'model.language_model.'": re.compile(r"model\.language_model\."),
}


@dataclass(frozen=True)
class Recognised:
    """What the tensors' names and dtypes prove; `checkable`: in hub names, so the manifest applies."""

    layout: str
    nearest: str | None = None
    prefix: str = ""
    method: str = "none"
    fused: bool = False
    checkable: bool = True


@no_collector()
def inspect(path_or_config: str | Path | Mapping[str, Any]) -> Report:
    """Describe a checkpoint or a configuration and list what is wrong with it, reading headers only.

    Args:
        path_or_config: a checkpoint folder, a .safetensors file, a config.json, the name of a size in
            configs/, or a config as a dict.

    Raises:
        ValueError: there is nothing of that name.
    """
    if isinstance(path_or_config, Mapping):
        return _report("a configuration", path_or_config, None, [])
    path = Path(path_or_config)
    if not path.exists():
        try:
            path = resources.find("configs", str(path))
        except ValueError as error:
            if len(path.parts) == 1 and not path.name.endswith(".safetensors"):
                raise
            told = f"{path} does not exist: expected a checkpoint or a config.json."
            raise CheckpointError(told) from error
    problems: list[Problem] = []
    if path.suffix == ".json" and path.is_file():
        return _report(str(path), _read(path.parent, path.name, problems), None, problems)
    found = _scan(path)
    folder = path if path.is_dir() else path.parent
    problems += [Problem("error", "file", str(error)) for error in found.problems]
    config = _read(folder, "config.json", problems)
    if config is None:
        told = f"No readable config.json in {folder}: the tensors are not compared with what they should be."
        problems.append(Problem("warning", "config", told))
    generation = _read(folder, "generation_config.json", problems)
    if config is not None and generation is not None:
        problems += checks.check_eos(config, generation)
    if path.is_dir() and rank_files(path) is None:
        problems += checks.check_folder(found)
    return _report(str(path), config, found, problems, alone=path.is_file())


def _scan(path: Path) -> Scan:
    """The headers; of model-parallel ranks, a tensor that several share counts once, as the first has it."""
    if not path.is_dir() or (ranked := rank_files(path)) is None:
        return scan(path)
    headers = {file: read_header(file) for file in ranked[1]}
    tensors = {name: info for header, _ in reversed(headers.values()) for name, info in header.items()}
    return Scan(Checkpoint(path, tensors, tuple(headers)), [], set())


def recognise(tensors: Tensors) -> Recognised:
    """The layout of a checkpoint by its names and dtypes; "unknown" and the nearest if it is none of conversion/."""
    names = Counter(layouts.kind_of(name) for name in tensors if not name.startswith(WRAPPER_EXTRAS))
    if (table := layouts.detect(names)) is not None and table.name not in LAYOUTS.values():
        return Recognised(table.name, checkable=False)
    kinds = Counter(kind_of(name) for name in tensors if not name.startswith(WRAPPER_EXTRAS))
    fitting = sum(count for kind, count in kinds.items() if _HUB_NAME.match(kind + "."))
    if 2 * fitting <= kinds.total():
        votes = {
            layout: sum(count for kind, count in kinds.items() if name.match(kind))
            for layout, name in _FOREIGN_NAMES.items()
        }
        nearest = max(votes, key=lambda layout: votes[layout])
        return Recognised("unknown", nearest if votes[nearest] else "none", checkable=False)
    wrapped = sum(count for kind, count in kinds.items() if kind.startswith(WRAPPER_PREFIX))
    prefix = WRAPPER_PREFIX if 2 * wrapped > kinds.total() else ""
    fused = any(kind.endswith((".experts.gate_up_proj", ".experts.down_proj")) for kind in kinds)
    method = "none"
    if any(kind.endswith(".weight_packed") for kind in kinds):
        method = "int4"
    elif any(dtype == "F8_E4M3" for _, dtype in tensors.values()):
        method = "fp8"
    layout = LAYOUTS.get((prefix, method, fused), "unknown")
    nearest = None
    if layout == "unknown":
        like = LAYOUTS.get(("", method, fused), LAYOUTS["", "none", True])
        nearest = f"{like} with {method} weights" if fused else f"{like} under the prefix {prefix!r}"
    return Recognised(layout, nearest, prefix, method, fused, checkable=not (fused and method != "none"))


def _report(
    source: str,
    config: Mapping[str, Any] | None,
    found: Scan | None,
    problems: list[Problem],
    alone: bool = False,
) -> Report:
    """The report on a config (None: unreadable) and a checkpoint (None: no weights; `alone`: one file)."""
    text, prefix, quantization, counts = None, "", None, {}
    if config is not None:
        try:
            text, prefix = split_config(config)
            counts = count_parameters(config)
            problems += checks.check_config(text)
        except ValueError as error:
            text = None
            problems.append(Problem("error", "config", f"config.json: {error}"))
        try:
            quantization = quantization_of(config)
        except ValueError as error:
            problems.append(Problem("error", "quantization", f"config.json: {error}"))

    recognised, tensors = None, {}
    if found is not None:
        tensors = {name: (info.shape, info.dtype) for name, info in found.checkpoint.tensors.items()}
        if tensors:
            recognised = recognise(tensors)
            problems += _tensor_problems(text, prefix, quantization, recognised, tensors, found, alone)
    elif text is not None and quantization is not None:
        try:
            tensors = expected_tensors(config or {})
            layout = LAYOUTS.get((prefix, quantization.method, False), "unknown")
            recognised = Recognised(layout, None, prefix, quantization.method)
        except ValueError as error:
            problems.append(Problem("error", "config", f"config.json: {error}"))

    bytes_by_part, dtypes = _sizes(tensors, text)
    parts = {
        part: {"parameters": counts.get(part, (0, 0))[0], "active": counts.get(part, (0, 0))[1], "bytes": 0}
        | {"bytes": bytes_by_part[part]}
        for part in dict.fromkeys((*counts, *sorted(bytes_by_part)))
    }
    return Report(
        source=source,
        model_type=str(config["model_type"]) if config and "model_type" in config else None,
        layout=recognised.layout if recognised else None,
        nearest_layout=recognised.nearest if recognised else None,
        quantization=_quantization_facts(recognised, quantization),
        shape=_shape_facts(text) if text else {},
        context=_context_facts(text) if text else {},
        parts={part: entry for part, entry in parts.items() if any(entry.values())},
        num_parameters=sum(total for total, _ in counts.values()),
        num_active=sum(active for _, active in counts.values()),
        num_bytes=sum(bytes_by_part.values()),
        num_tensors=len(tensors),
        dtypes=dtypes,
        shards=_shard_facts(found.checkpoint) if found else [],
        problems=problems,
    )


def _tensor_problems(
    text: dict[str, Any] | None,
    prefix: str,
    quantization: Quantization | None,
    recognised: Recognised,
    tensors: Tensors,
    found: Scan,
    alone: bool,
) -> list[Problem]:
    """The checkpoint against the manifest, in the form that its names prove, not the one the config says."""
    problems = []

    def add(severity: str, kind: str, told: str) -> None:
        problems.append(Problem(severity, kind, told))

    if recognised.layout == "unknown":
        add("warning", "layout", f"The names follow no known layout; the nearest is {recognised.nearest}.")
    elif not recognised.checkable:
        add(
            "note",
            "layout",
            "Names and shapes are not compared with config.json here; `k2 verify` does that.",
        )
    if text is None or not recognised.checkable:
        return problems
    if prefix != recognised.prefix:
        names = f"begin with {recognised.prefix!r}" if recognised.prefix else "have no prefix"
        add(
            "error",
            "layout",
            f"The names {names}, but config.json has {'a' if prefix else 'no'} text_config.",
        )
    problems += checks.check_heads(text, tensors)
    try:
        bare = expected_tensors(text, recognised.method, recognised.fused)
        if quantization is not None and quantization.method != recognised.method:
            by_config = expected_tensors(text)
            bare_names = [name.removeprefix(recognised.prefix) for name in tensors]
            if any(bare.get(name) != by_config.get(name) for name in bare_names):
                words = {"none": "unquantised"}
                said, held = (
                    words.get(method, method) for method in (quantization.method, recognised.method)
                )
                told = f"config.json says {said}, the files hold {held}"
                add("error", "quantization", f"Stale quantization_config: {told}.")
            else:
                bare = by_config  # these files hold nothing that is quantised
    except ValueError as error:
        add("error", "config", f"config.json: {error}")
        return problems
    expected = {recognised.prefix + name: value for name, value in bare.items()}
    optional = {recognised.prefix + name: value for name, value in optional_tensors(text).items()}
    missing = [name for name in expected if name not in tensors and name not in found.unread]
    if alone and missing:
        add("note", "missing", f"This one file lacks {len(missing):,} tensors of the whole model.")
    else:
        problems += checks.check_missing(missing, expected, text["num_hidden_layers"])
    num_layers = text["num_hidden_layers"] + (text.get("num_nextn_predict_layers") or 0)
    problems += checks.check_surplus([name for name in tensors if name not in expected], optional, num_layers)
    return problems + checks.check_values(expected, tensors)


def _read(folder: Path, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    """A JSON file of the folder; None if it is not there or, with a problem, cannot be read."""
    if not (folder / name).exists():
        return None
    try:
        return read_json(file_inside(folder, name))
    except CheckpointError as error:
        problems.append(Problem("error", "file", str(error)))
        return None


def _sizes(
    tensors: Tensors, text: dict[str, Any] | None
) -> tuple[defaultdict[str, int], dict[str, dict[str, int]]]:
    """Bytes by part, and tensors and bytes by dtype."""
    parts: defaultdict[str, int] = defaultdict(int)
    dtypes: dict[str, dict[str, int]] = {}
    num_layers = text["num_hidden_layers"] if text else sys.maxsize
    part_of_stem: dict[str, str] = {}
    for name, (shape, dtype) in tensors.items():
        head, experts, _ = name.partition(".experts.")  # hundreds of thousands of names, a few hundred stems
        if (stem := head + experts) not in part_of_stem:
            part_of_stem[stem] = part_of(stem, num_layers)
        num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        parts[part_of_stem[stem]] += num_bytes
        entry = dtypes.setdefault(dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += num_bytes
    return parts, dict(sorted(dtypes.items()))


def _quantization_facts(recognised: Recognised | None, quantization: Quantization | None) -> dict[str, Any]:
    """The method that the tensors prove, with the config's options if it has the same method."""
    if recognised is None or not recognised.checkable:
        return {}
    method = recognised.method
    facts: dict[str, Any] = {"method": method}
    if method != "none":
        facts["bits"] = {"fp8": 8, "int4": 4}[method]
    if quantization is not None and quantization.method == method != "none":
        facts |= {"block": list(quantization.block)} if method == "fp8" else {"group": quantization.group}
    return facts


def _shape_facts(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": text["num_hidden_layers"],
        "dense layers": text["first_k_dense_replace"] or 0,
        "hidden": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "head dims": f"{text['qk_nope_head_dim']}+{text['qk_rope_head_dim']}/{text['v_head_dim']}",
        "query rank": text["q_lora_rank"] or "none",
        "key-value rank": text["kv_lora_rank"],
        "experts": text["n_routed_experts"],
        "experts per token": text["num_experts_per_tok"],
        "shared experts": text["n_shared_experts"] or 0,
        "expert width": text["moe_intermediate_size"],
        "dense width": text["intermediate_size"],
        "MTP layers": text.get("num_nextn_predict_layers") or 0,
        "vocabulary": text["vocab_size"],
    }


def _context_facts(text: dict[str, Any]) -> dict[str, Any]:
    rope = checks.rope_of(text) or {}
    return {"max positions": text.get("max_position_embeddings")} | {
        key: rope[key]
        for key in (
            "rope_type",
            "rope_theta",
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
        )
        if key in rope
    }


def _shard_facts(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    facts = {path: {"name": path.name, "tensors": 0, "bytes": 0} for path in checkpoint.shards}
    for path, infos in groupby(checkpoint.tensors.values(), key=attrgetter("shard")):
        sizes = [info.end - info.start for info in infos]
        facts[path]["tensors"] += len(sizes)
        facts[path]["bytes"] += sum(sizes)
    return list(facts.values())
