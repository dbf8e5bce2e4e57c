"""Which weights are INT4: patterns as compressed-tensors has them, and the quantization_config that says so to others.

Patterns see the modules of the file, where each routed expert has three linear layers of its own, although a model keeps
all of them in two stacks: what the published checkpoints list as `targets` and `ignore` means the same here. Given up:
another group size for some weights (no Kimi checkpoint has two, and its readers expect one), and a part of a stack.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..manifest import INT4

ROUTED_EXPERTS = (r"re:.*mlp\.experts\..*",)
STACKS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
_LAYER = re.compile(r"\blayers\.\d+\.")


@dataclass(frozen=True)
class Target:
    """A weight that can be quantised: [out, in] of a linear layer, or [experts, out, in].

    Attributes:
        path: of its module.
        parameter: its name there.
        aliases: what a pattern may call all of it.
        parts: the modules that it is in a file.
        classes: of the module, for patterns that name a class.
    """

    path: str
    module: nn.Module
    parameter: str
    aliases: tuple[str, ...]
    parts: tuple[str, ...]
    classes: frozenset[str]

    @property
    def name(self) -> str:
        """Of the weight in the model's state dict."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


def find_targets(model: nn.Module, targets: Iterable[str], ignore: Iterable[str] = ()) -> list[Target]:
    """The weights that some pattern of `targets` matches and none of `ignore`, in the model's order.

    Args:
        targets, ignore: "re:" and a regular expression that a module's name begins with, a whole name, or a class such as
            Linear. Names are those of the file (`model.layers.1.mlp.experts.0.up_proj`) or of the model's stacks
            (`model.layers.1.mlp.experts.gate_up_proj`, or `model.layers.1.mlp.experts` for both).

    Raises:
        ValueError: a target that matches no weight, a pattern that matches a part of a stack or is no regular expression,
            nothing left by `ignore`, or the head.
    """
    candidates = list(_candidates(model))
    wanted = {pattern: {target.name for target in _matching(pattern, candidates)} for pattern in targets}
    spared = {target.name for pattern in ignore for target in _matching(pattern, candidates)}
    chosen = set().union(*wanted.values()) - spared
    if (unmatched := [pattern for pattern, names in wanted.items() if not names]) or not chosen:
        choices = dict.fromkeys(_LAYER.sub("layers.N.", target.aliases[-1]) for target in candidates)
        what = (
            f"targets {unmatched}" if unmatched else f"targets {list(wanted)} without ignore {list(ignore)}"
        )
        raise ValueError(
            f"INT4 {what} match no weight of {type(model).__name__}: expected names, 're:' patterns or classes of "
            f"{', '.join(choices) or 'linear layers or stacked experts, of which it has none'}."
        )
    found = [target for target in candidates if target.name in chosen]
    for target in found:
        if target.path.rpartition(".")[2] == "lm_head":
            raise ValueError(
                f"INT4 targets {list(wanted)} match lm_head, whose weight the loss reads beside its forward: expected it in "
                "ignore."
            )
    return found


def hub_config(
    shapes: Mapping[str, Sequence[int]], chosen: Collection[str], group_size: int
) -> dict[str, Any]:
    """The quantization_config of a file in which the weights `chosen` are packed: pack-quantized, 4 bits, symmetric.

    If those are all routed experts and nothing else it is that of the published checkpoints; else `ignore` lists the
    others.

    Args:
        shapes: of all tensors of the model, by name.
        chosen: names of them.
    """
    config = copy.deepcopy(INT4)
    config["quantization_status"] = "compressed"
    config["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    weights = [
        name
        for name, shape in shapes.items()
        if (len(shape) == 2 and name.endswith(".weight") and not name.endswith("embed_tokens.weight"))
        or (len(shape) == 3 and name.endswith(tuple(STACKS)))
    ]
    if set(chosen) != {name for name in weights if len(shapes[name]) == 3}:
        by_template: dict[str, list[str]] = {}
        for name in weights:
            by_template.setdefault(_LAYER.sub(r"layers.N.", name), []).append(name)
        config["ignore"] = [
            pattern for names in by_template.values() for pattern in _patterns(names, set(chosen))
        ]
    return config


def _patterns(names: list[str], chosen: set[str]) -> Iterator[str]:
    """Patterns for those of `names`, the same weight in several layers, that are not chosen."""
    if not chosen.intersection(names):
        first = _LAYER.sub("layers.0.", names[0])
        yield "re:" + _regex(first).replace(r"layers\.0\.", r"layers\.\d+\.")
        return
    for name in names:
        if name not in chosen:
            yield f"re:{_regex(name)}"


def _regex(name: str) -> str:
    """Matches the modules of the file that hold the weight `name`."""
    path, _, last = name.rpartition(".")
    if last not in STACKS:
        return f"{re.escape(path)}$"
    parts = "|".join(STACKS[last])
    return rf"{re.escape(path)}\.\d+\.({parts})$"


def _candidates(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        classes = frozenset(kind.__name__ for kind in type(module).__mro__)
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and weight.is_floating_point():
            yield Target(path, module, "weight", (path,), (path,), classes)
        for stack, names in STACKS.items():
            weight = module._parameters.get(stack)
            if weight is not None and weight.dim() == 3:
                parts = tuple(
                    f"{path}.{expert}.{name}" for expert in range(weight.shape[0]) for name in names
                )
                yield Target(path, module, stack, (path, f"{path}.{stack}"), parts, classes | {"Linear"})


def _matching(pattern: str, candidates: Iterable[Target]) -> Iterator[Target]:
    matches: Callable[[str], Any] = pattern.__eq__
    if pattern.startswith("re:"):
        try:
            matches = re.compile(pattern[3:]).match
        except re.error as error:
            raise ValueError(f"INT4 pattern {pattern!r}: {error}; expected a regular expression.") from None
    for target in candidates:
        if pattern in target.classes or any(map(matches, target.aliases)):
            yield target
            continue
        hits = [part for part in target.parts if matches(part)]
        if len(hits) == len(target.parts):
            yield target
        elif hits:
            raise ValueError(
                f"INT4 pattern {pattern!r} matches {hits[0]} and {len(hits) - 1} other of {len(target.parts)} matrices in "
                f"{target.name}: expected all of a stack, or none."
            )
