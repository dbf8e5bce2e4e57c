"""LoRA adapters on disk, of PEFT's form for fused experts or the per-expert form that serving engines read: opened alike.

PEFT keeps one pair of matrices for all experts of a layer: A is (experts * rank, in), one expert after the other; B is
(out, experts * rank) with B.view(out, rank, experts)[:, :, e] for expert e. gate_proj and up_proj share A, and halve the
rows of B. Serving engines want `experts.{e}.{gate,up,down}_proj.lora_{A,B}.weight`. `expert_views` is that mapping, once:
read through it, a PEFT file becomes per-expert; written through it (adapter_export.py), the reverse.

Files are mapped, not read: the experts of one B lie apart in the whole of it. Given up: what is more than a plain LoRA
(DoRA, biases, embeddings, modules_to_save, initialisations that change the base weights); it is refused.
"""

from __future__ import annotations

import math
import mmap
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, TensorInfo, file_inside, read_json
from ..lazy_tensors import DTYPES
from ..manifest import WRAPPER_PREFIX

# Fused parameter -> the projections in it, in the order in which transformers concatenates them.
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# In the header of a serving file: the adapter_config.json it came from.
METADATA = "transformers_k2.peft_config"
_KEY = re.compile(r"(.*)\.lora_([AB])\.weight")
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_EXPERTS, _ROUTER = ".mlp.experts", ".mlp.gate"
# Options that make an adapter more than W + scaling * B A, and what they must be.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        (
            *(
                "use_dora",
                "lora_bias",
                "fan_in_fan_out",
                "use_qalora",
                "use_bdlora",
                "modules_to_save",
                "mica",
            ),
            *("trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config"),
            *("velora_config", "kasa_config", "monteclora_config"),
        ),
        (None, False, [], {}),
    ),
}


class Lora(NamedTuple):
    """W + scaling * b @ a on one matrix of the hub's layout.

    Attributes:
        a: [rank, in], a view of the file.
        b: [out, rank], a view of the file.
        alpha: of this rank; scaling is alpha / rank, or alpha / sqrt(rank) if rank-stabilised.
        on_parameter: PEFT adapts a parameter (experts, router) and no linear module; it rounds elsewhere then.
    """

    a: Tensor
    b: Tensor
    alpha: float
    scaling: float
    on_parameter: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its pairs by the hub's module names, and its form, None if it has no routed experts."""

    folder: Path
    config: dict[str, Any]
    loras: dict[str, Lora]
    form: str | None
    metadata: dict[str, str]


def expert_views(
    a: Tensor, b: Tensor, num_experts: int, fused: str, shared: bool = True
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """(expert, projection, its A [rank, in], its B [out, rank]): views of a fused parameter's pair, to read or to write.

    Args:
        a: [experts * rank, in].
        b: [out, experts * rank].
        fused: of PROJECTIONS.
        shared: the parts use the same A; if not, each has its part of the ranks (and zeros in the rest of b).
    """
    parts = PROJECTIONS[fused]
    each_a = a.unflatten(0, (num_experts, -1))  # (experts, rank, in)
    each_b = b.unflatten(1, (-1, num_experts))  # (out, rank, experts)
    num_rows, rank = b.shape[0] // len(parts), each_a.shape[1]
    for expert in range(num_experts):
        for index, projection in enumerate(parts):
            own = (
                slice(None) if shared else slice(index * rank // len(parts), (index + 1) * rank // len(parts))
            )
            rows = slice(index * num_rows, (index + 1) * num_rows)
            yield expert, projection, each_a[expert, own], each_b[rows, own, expert]


def open_adapter(path: str | Path) -> Adapter:
    """A PEFT LoRA folder of either form, its matrices mapped.

    Raises:
        ValueError: no plain LoRA, a pair without its other half, or ranks and shapes that contradict each other.
    """
    folder = Path(path)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {missing[0]}: expected an adapter folder as PEFT saves it.")
    config = read_json(file_inside(folder, CONFIG))
    for option, allowed in _PLAIN.items():
        if option in config and config[option] not in allowed:
            raise ValueError(
                f"{folder}/{CONFIG} has {option} {config[option]!r}: expected a plain LoRA, {option} {allowed[0]!r}."
            )
    checkpoint = Checkpoint.open(file_inside(folder, WEIGHTS))
    (shard,) = checkpoint.shards
    pairs = _pairs(checkpoint.tensors)
    loras: dict[str, Lora] = {}
    forms: set[str] = set()
    counts: dict[int, str] = {}  # number of experts -> a parameter that has a pair for each
    with shard.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing is written back
    for module, (info_a, info_b) in pairs.items():
        a, b = mapped(content, info_a), mapped(content, info_b)
        stem = module.removesuffix(".base_layer")
        if stem.endswith(_EXPERTS):
            forms.add("peft")
            name = f"{stem}.{_fused_name(config, stem, module, pairs)}"
            rank, alpha = rank_and_alpha(config, name)
            if (
                a.shape[0] % rank
                or a.shape[0] != b.shape[1]
                or b.shape[0] % len(PROJECTIONS[name.rpartition(".")[2]])
            ):
                raise ValueError(
                    f"{name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}: expected [experts * {rank}, in] and "
                    f"[out, experts * {rank}], the rank that {CONFIG} gives it."
                )
            counts[a.shape[0] // rank] = name
            for expert, part, part_a, part_b in expert_views(
                a, b, a.shape[0] // rank, name.rpartition(".")[2]
            ):
                loras[f"{stem}.{expert}.{part}"] = Lora(
                    part_a, part_b, alpha, _scaling(config, rank, alpha), True
                )
            continue
        is_expert = EXPERT.fullmatch(module) is not None
        if is_expert:
            forms.add("serving")
        rank, alpha = rank_and_alpha(config, f"{module}.weight" if module.endswith(_ROUTER) else module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}: expected [{rank}, in] and [out, {rank}], "
                f"the rank that {CONFIG} gives it."
            )
        on_parameter = is_expert or module.endswith(_ROUTER)
        loras[module] = Lora(a, b, alpha, _scaling(config, rank, alpha), on_parameter)
    if len(forms) > 1:
        raise ValueError(f"{folder} has fused and per-expert matrices: expected one form, serving or peft.")
    if len(counts) > 1:
        told = ", ".join(f"{num} in {name}" for num, name in counts.items())
        raise ValueError(
            f"{folder} has pairs for different numbers of experts ({told}): expected one; r and rank_pattern of {CONFIG} "
            "divide the matrices."
        )
    return Adapter(folder, config, loras, next(iter(forms), None), checkpoint.shard_metadata[shard])


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Module as in the file, without PEFT's prefix -> its A and B."""
    halves: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for key, info in tensors.items():
        match = _KEY.fullmatch(key)
        if key.endswith(".base_layer.weight"):
            raise ValueError(
                f"{info.shard} holds {key}, a weight of the model: expected LoRA matrices only; save the adapter with "
                "save_embedding_layers=False."
            )
        if match is None or len(info.shape) != 2 or info.dtype not in ("F32", "BF16", "F16", "F64"):
            raise ValueError(
                f"{info.shard} holds {key} {info.dtype} {list(info.shape)}: expected floating lora_A.weight and "
                "lora_B.weight matrices only."
            )
        halves[match[1].removeprefix(PREFIX).removeprefix(WRAPPER_PREFIX)][match[2]] = info
    for module, pair in halves.items():
        if missing := {"A", "B"} - pair.keys():
            raise ValueError(f"{module} has no lora_{missing.pop()}.weight: expected lora_A and lora_B.")
    if not halves:
        raise ValueError("The adapter holds no matrices: expected lora_A.weight and lora_B.weight.")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _fused_name(config: Mapping[str, Any], stem: str, module: str, pairs: Mapping[str, Any]) -> str:
    """Which parameter a pair on `experts` adapts: PEFT wraps gate_up_proj first, so it lies under `base_layer`."""
    if f"{stem}.base_layer" in pairs:
        return "gate_up_proj" if module.endswith(".base_layer") else "down_proj"
    entries = config.get("target_parameters") or []
    named = [
        fused for fused in PROJECTIONS if any(f".{stem}.{fused}".endswith(f".{entry}") for entry in entries)
    ]
    if len(named) != 1:
        raise ValueError(
            f"{module} has one pair, but target_parameters {entries} names {len(named)} of {stem}'s parameters: expected "
            f"one of {', '.join(PROJECTIONS)}, or a pair for each."
        )
    return named[0]


def rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """PEFT's rule: the first pattern that matches the end of the name after a dot."""
    found = [
        next(
            (value for key, value in (config.get(f"{option}_pattern") or {}).items() if _matches(key, name)),
            default,
        )
        for option, default in (("rank", config.get("r")), ("alpha", config.get("lora_alpha")))
    ]
    rank, alpha = found
    if type(rank) is not int or rank <= 0 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{CONFIG} gives {name} rank {rank!r} and alpha {alpha!r}: expected a positive rank and a number."
        )
    return rank, alpha


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _scaling(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def mapped(content: mmap.mmap, info: TensorInfo) -> Tensor:
    """A tensor in a mapped file."""
    num = math.prod(info.shape)
    dtype = DTYPES[info.dtype]
    return torch.frombuffer(content, dtype=dtype, count=num, offset=info.start).view(info.shape)
