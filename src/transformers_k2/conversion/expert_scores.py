"""Which experts of a layer matter: the loads that training measured, or, without any, the routers' weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .opened import Model
from .surgery import moe_layers

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)(?:\..*)?|(\d+)")


def read_scores(load: str | Path | Mapping[Any, Any], model: Model) -> dict[int, list[float]]:
    """Loads of a model's experts: layer -> a number for each.

    Args:
        load: an expert_load.jsonl, whose lines are summed; or a mapping of layers, or a JSON file with one.

    Raises:
        ValueError: no such file, no JSON, no or wrong numbers for a layer (those of multi-token prediction may be missing).
    """
    where = "load" if isinstance(load, Mapping) else str(load)
    records = [load] if isinstance(load, Mapping) else _records(Path(load))
    scores: dict[int, list[float]] = {}
    shape, known = model.shape, moe_layers(model)
    for record in records:
        layers = record.get("layers", record)
        if not isinstance(layers, Mapping):
            raise ValueError(f"{where} has layers {str(layers)[:60]}: expected loads by layer.")
        seen: set[int] = set()
        for name, found in layers.items():
            match = _LAYER.fullmatch(str(name))
            layer = int(match[1] or match[2]) if match else -1
            if layer < 0 or layer in seen or layer not in known:
                raise ValueError(
                    f"{where} has loads of {name!r}: expected the layers with experts, by number or router."
                )
            seen.add(layer)
            found = found.get("counts") if isinstance(found, Mapping) else found
            counts = _checked(where, name, found, shape.num_experts)
            before = scores.get(layer, [0.0] * shape.num_experts)
            scores[layer] = [one + count for one, count in zip(before, counts, strict=True)]
    wanted = [layer for layer in known if layer < shape.num_layers]
    if lacking := [layer for layer in wanted if layer not in scores]:
        raise ValueError(
            f"{where} has no loads of layer {lacking[0]} ({len(lacking)} of {len(wanted)} layers): expected all of them."
        )
    return scores


def router_norms(model: Model, layers: Iterable[int]) -> dict[int, list[float]]:
    """The length of each expert's row in the router of each layer.

    Raises:
        ValueError: one is not finite.
    """
    norms = {}
    for layer in layers:
        name = f"model.layers.{layer}.mlp.gate.weight"
        norms[layer] = model.read(name).values()[...].float().norm(dim=1).tolist()
        if not all(map(math.isfinite, norms[layer])):
            raise ValueError(f"{name} has rows that are not finite: expected finite weights.")
    return norms


def best_experts(scores: Sequence[float], keep: int, num_groups: int) -> list[int]:
    """The experts of the highest scores in ascending order, as many of each group; of equal ones the first."""
    size, each = len(scores) // num_groups, keep // num_groups
    chosen = []
    for start in range(0, size * num_groups, size):
        ranked = sorted(range(start, start + size), key=lambda expert: -scores[expert])
        chosen += sorted(ranked[:each])
    return chosen


def _records(path: Path) -> list[Mapping[str, Any]]:
    """A JSON file's content, or its lines'."""
    if not path.is_file():
        raise ValueError(
            f"{path} is no file: expected an expert_load.jsonl, or a JSON file of loads by layer."
        )
    text = path.read_text(encoding="utf-8")
    try:
        found = [json.loads(text)]
    except ValueError:
        found = [
            _line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    if not found or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{path} holds no loads: expected JSON objects, one, or one a line.")
    return found


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise ValueError(f"{path}, line {number}, is not JSON: expected loads by layer.") from None


def _checked(where: str, name: Any, counts: Any, num_experts: int) -> list[float]:
    if not isinstance(counts, Sequence) or len(counts) != num_experts:
        num = len(counts) if isinstance(counts, Sequence) else str(counts)[:40]
        raise ValueError(
            f"{where} has {num} loads for {name!r}: expected {num_experts}, one for each expert."
        )
    for count in counts:
        if type(count) not in (int, float) or not math.isfinite(count):
            raise ValueError(f"{where} has the load {count!r} for {name!r}: expected finite numbers.")
    return [float(count) for count in counts]
