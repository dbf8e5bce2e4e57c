"""Write a LoRA adapter in the other of its two forms (see adapters.py), every matrix with its bits.

Engines want one rank and one scaling for all modules. In the serving form, pairs of lower rank are filled up with zeros,
which add nothing. What the PEFT form was is kept in the file's metadata, so the way back restores it byte by byte. A
per-expert file of another origin, whose gate and up do not share A, comes out with both As under one parameter of twice the
rank, as PEFT itself loads it.

The new file is written through a map, without a copy in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import TensorInfo
from ..files import replacing, write_text
from ..lazy_tensors import DTYPES
from .adapters import (
    CONFIG,
    EXPERT,
    METADATA,
    PREFIX,
    PROJECTIONS,
    WEIGHTS,
    Adapter,
    Lora,
    expert_views,
    mapped,
    open_adapter,
    rank_and_alpha,
)
from .crew import write_at
from .found import side_files
from .staging import full_disk
from .tasks import Spec, header

FORMS = ("serving", "peft")
_FUSED_OF = {projection: fused for fused, parts in PROJECTIONS.items() for projection in parts}


def export_adapter(
    src: str | Path, dst: str | Path, form: str = "serving", overwrite: bool = False
) -> dict[str, Any]:
    """Write an adapter in another form; every matrix keeps its bits.

    Args:
        form: "serving", one pair for each expert and projection; or "peft", one pair for each fused parameter.

    Returns:
        The new adapter_config.json. Its `alpha_pattern` is empty unless modules differ in scaling, which PEFT follows and
        engines that know one scaling do not.

    Raises:
        ValueError: the adapter is of that form already or no plain LoRA (see `open_adapter`); experts or projections are
            missing, or their ranks or scalings differ; the destination is the source, or holds an adapter.
    """
    dst = Path(dst)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: expected one of {', '.join(FORMS)}.")
    adapter = open_adapter(src)
    if adapter.form == form:
        raise ValueError(
            f"{adapter.folder} is in the {form} form already: expected form={FORMS[form == 'serving']!r}."
        )
    if dst.resolve() == adapter.folder.resolve():
        raise ValueError(f"The destination {dst} is the adapter itself: expected another folder.")
    if (dst / CONFIG).exists() and not overwrite:
        raise ValueError(
            f"{dst} holds an adapter already: expected another folder, or overwrite (--overwrite)."
        )
    dst.mkdir(parents=True, exist_ok=True)
    with full_disk(dst):
        config = _write_serving(adapter, dst) if form == "serving" else _write_peft(adapter, dst)
    for name, path in side_files(adapter.folder).items():
        with replacing(dst / name) as temporary:
            temporary.write_bytes(path.read_bytes() if isinstance(path, Path) else path)
    write_text(dst / CONFIG, json.dumps(config, indent=2) + "\n")
    return config


def _write_serving(adapter: Adapter, dst: Path) -> dict[str, Any]:
    rank = max(lora.a.shape[0] for lora in adapter.loras.values())
    specs = []
    for module, lora in adapter.loras.items():
        specs += _specs(module, (rank, lora.a.shape[1]), (lora.b.shape[0], rank), lora)
    alphas = {
        EXPERT.sub(r"\1.#.\3", module): _alpha(adapter.config, lora, rank)
        for module, lora in adapter.loras.items()
    }
    common = max(set(alphas.values()), key=list(alphas.values()).count)
    pattern = {
        re.escape(module).replace(r"\#", r"\d+"): alpha
        for module, alpha in sorted(alphas.items())
        if alpha != common
    }
    metadata = {"format": "pt"}
    if adapter.form == "peft":
        metadata[METADATA] = json.dumps(adapter.config)
    with _writing(dst / WEIGHTS, specs, metadata) as tensors:
        for module, lora in adapter.loras.items():
            own = lora.a.shape[0]
            tensors[_key(module, "A")][:own].copy_(lora.a)
            tensors[_key(module, "B")][:, :own].copy_(lora.b)
    return adapter.config | {
        "r": rank,
        "lora_alpha": common,
        "rank_pattern": {},
        "alpha_pattern": pattern,
        "target_modules": sorted(module.replace(".#.", ".") for module in alphas),
        **dict.fromkeys(("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")),
    }


def _write_peft(adapter: Adapter, dst: Path) -> dict[str, Any]:
    before = json.loads(adapter.metadata[METADATA]) if METADATA in adapter.metadata else None
    groups = _groups(adapter)
    values: dict[str, tuple[int, float]] = {}  # module or fused parameter -> rank, alpha
    specs, shared, modules = [], {}, {}
    for name, experts in groups.items():
        parts = PROJECTIONS[name.rpartition(".")[2]]
        loras = [adapter.loras[module] for module in experts]
        first, num_experts = loras[0], len(loras) // len(parts)
        shared[name] = all(
            torch.equal(lora.a, loras[index - index % len(parts)].a) for index, lora in enumerate(loras)
        )
        times = 1 if shared[name] else len(parts)
        rank, alpha = first.a.shape[0] * times, _alpha(adapter.config, first, first.a.shape[0] * times)
        if before is not None:
            rank, alpha = rank_and_alpha(before, name)
        values[name] = rank, alpha
        out = first.b.shape[0] * len(parts)
        key = name.rpartition(".")[0]
        if name.endswith(".gate_up_proj") and f"{key}.down_proj" in groups:
            key += ".base_layer"
        modules[name] = key
        specs += _specs(key, (num_experts * rank, first.a.shape[1]), (out, num_experts * rank), first)
    plain = {module: lora for module, lora in adapter.loras.items() if not EXPERT.fullmatch(module)}
    for module, lora in plain.items():
        name = f"{module}.weight" if lora.on_parameter else module
        values[name] = (lora.a.shape[0], lora.alpha) if before is None else rank_and_alpha(before, name)
        modules[name] = module
        specs += _specs(module, (values[name][0], lora.a.shape[1]), (lora.b.shape[0], values[name][0]), lora)
    with _writing(dst / WEIGHTS, specs, {"format": "pt"}) as tensors:
        for name, experts in groups.items():
            a, b = (tensors[_key(modules[name], half)] for half in "AB")
            rank, num_experts = values[name][0], len(experts) // len(PROJECTIONS[name.rpartition(".")[2]])
            views = expert_views(a, b, num_experts, name.rpartition(".")[2], shared[name])
            for module, (*_, part_a, part_b) in zip(experts, views, strict=True):
                _copy_ranks(module, adapter.loras[module], part_a, part_b)
        for module, lora in plain.items():
            _copy_ranks(module, lora, tensors[_key(module, "A")], tensors[_key(module, "B")])
    if before is not None:
        return before
    r, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    return adapter.config | {
        "rank_pattern": {
            re.escape(name): value[0] for name, value in sorted(values.items()) if value[0] != r
        },
        "alpha_pattern": {
            re.escape(name): value[1] for name, value in sorted(values.items()) if value[1] != alpha
        },
        "target_modules": sorted(module for module, lora in plain.items() if not lora.on_parameter),
        "target_parameters": sorted(
            values.keys() - {module for module, lora in plain.items() if not lora.on_parameter}
        ),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }


def _copy_ranks(module: str, lora: Lora, a: Tensor, b: Tensor) -> None:
    """The first ranks; what is left out must be the zeros that were filled in."""
    rank = a.shape[0]
    if lora.a[rank:].any() or lora.b[:, rank:].any():
        raise ValueError(
            f"{module} has rank {lora.a.shape[0]}: expected zeros beyond rank {rank}, which its file names."
        )
    a.copy_(lora.a[:rank])
    b.copy_(lora.b[:, :rank])


def _groups(adapter: Adapter) -> dict[str, list[str]]:
    """Fused parameter -> the modules in it, in the order of `expert_views`, proven to be complete and alike."""
    found: defaultdict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for module in adapter.loras:
        if match := EXPERT.fullmatch(module):
            found[f"{match[1]}.{_FUSED_OF[match[3]]}"][int(match[2]), match[3]] = module
    groups = {}
    for name, members in sorted(found.items()):
        num_experts = max(expert for expert, _ in members) + 1
        wanted = [(e, part) for e in range(num_experts) for part in PROJECTIONS[name.rpartition(".")[2]]]
        if missing := [f"{e}.{part}" for e, part in wanted if (e, part) not in members]:
            raise ValueError(
                f"{adapter.folder} lacks {name.rpartition('.')[0]}.{missing[0]} ({len(missing)} missing): expected every "
                f"expert and projection of {name}, which is one parameter in PEFT."
            )
        groups[name] = [members[one] for one in wanted]
        alike = {
            (tuple(lora.a.shape), tuple(lora.b.shape), lora.scaling, lora.a.dtype, lora.b.dtype)
            for lora in map(adapter.loras.__getitem__, groups[name])
        }
        if len(alike) > 1:
            told = sorted(
                f"rank {a[0]}, scaling {scaling:g}, {list(a)} and {list(b)}" for a, b, scaling, *_ in alike
            )
            raise ValueError(
                f"{name} is one parameter in PEFT, but its experts have {'; '.join(told[:3])}: expected one."
            )
    return groups


def _key(module: str, half: str) -> str:
    return f"{PREFIX}{module}.lora_{half}.weight"


def _specs(module: str, shape_a: tuple[int, int], shape_b: tuple[int, int], lora: Lora) -> list[Spec]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    pairs = (("A", shape_a, lora.a), ("B", shape_b, lora.b))
    return [Spec(_key(module, half), names[tensor.dtype], shape) for half, shape, tensor in pairs]


def _alpha(config: Mapping[str, Any], lora: Lora, rank: int) -> float:
    """The alpha that gives `lora` its scaling at another rank; a whole number where that is exact."""
    own = lora.a.shape[0]
    if rank == own:
        return lora.alpha
    if config.get("use_rslora"):
        return lora.alpha * math.sqrt(rank / own)
    exact = Fraction(lora.alpha) * rank / own
    return int(exact) if exact.denominator == 1 else float(exact)


@contextmanager
def _writing(path: Path, specs: Iterable[Spec], metadata: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """The tensors of a new file, zeros at first, mapped; it takes its name when all is on the disk."""
    specs = list(specs)
    start, positions = header(specs, metadata)
    with replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_at(descriptor, start, 0)
            size = len(start) + sum(spec.num_bytes for spec in specs)
            zeros = bytes(1 << 20)
            for position in range(
                len(start), size, len(zeros)
            ):  # a full disk is an error here, and a signal in a map
                write_at(descriptor, zeros[: size - position], position)
            content = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        infos = {
            spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, path, positions[spec.name], 0)
            for spec in specs
        }
        yield {name: mapped(content, info) for name, info in infos.items()}
        content.flush()
