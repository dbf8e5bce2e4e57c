"""Which parameter gets which update: a table of regular expressions, exactly one row per trainable parameter.

The defaults follow Kimi K2 and Moonlight (arXiv 2507.20534, 2502.16982): Muon for hidden matrices, AdamW for the rest.
Router weights are hidden matrices there, and so here. LoRA factors go to AdamW: Muon equalises the singular values of
the matrix it updates, and the matrix that matters is the product of the two factors, of which each is only one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .qk_clip import Attention, public_name

ALGORITHMS = ("muon", "adamw")


@dataclass(frozen=True)
class Rule:
    """One row: parameters whose whole name matches `pattern` are updated by `algorithm`.

    Args:
        pattern: a regular expression for the full name, such as r".*\\.mlp\\.experts\\.gate_up_proj".
        algorithm: `muon` (matrices [rows, in], or stacks of them [experts, rows, in]) or `adamw`.
        num_matrices: how many matrices, one above the other, a muon parameter fuses: gate_up_proj has two.
        options: what differs from the optimizer's defaults: lr, weight_decay, ns_steps, betas, ...
    """

    pattern: str
    algorithm: str
    num_matrices: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(
                f"Rule({self.pattern!r}): algorithm is {self.algorithm!r}: expected one of {ALGORITHMS}."
            )
        if self.num_matrices < 1 or (self.algorithm == "adamw" and self.num_matrices != 1):
            raise ValueError(
                f"Rule({self.pattern!r}): num_matrices is {self.num_matrices}: expected 1 or more, and 1 for adamw."
            )


# Kimi K2, DeepSeek-V3 and the names that Llama and Qwen2 share with them.
DEFAULT_RULES: tuple[Rule, ...] = (
    Rule(r"(.*\.)?mlp\.experts\.gate_up_proj", "muon", num_matrices=2),
    Rule(r"(.*\.)?mlp\.experts\.down_proj", "muon"),
    Rule(r"(.*\.)?mlp\.(shared_experts\.|experts\.\d+\.)?(gate|up|down)_proj\.weight", "muon"),
    Rule(r"(.*\.)?mlp\.gate\.weight", "muon"),  # the router
    Rule(r"(.*\.)?self_attn\.(q|k|v|o|q_a|q_b|kv_a|kv_b)_proj(_with_mqa)?(\.base_layer)?\.weight", "muon"),
    Rule(r"(.*\.)?(norm|[a-z_]*layernorm|[qk]_norm)\.weight", "adamw"),
    Rule(
        r"(.*\.)?(embed_tokens|lm_head|score|classifier)(\.(base_layer|modules_to_save\.[^.]+))?\.weight",
        "adamw",
    ),
    # Biases, and the router's correction bias if it is trained.
    Rule(r"(?!.*\.lora_)(.*\.)?[^.]*bias", "adamw"),
    Rule(r".*\.lora_[^.]+(\..*)?", "adamw"),
)


def parameter_groups(
    model: nn.Module,
    rules: Sequence[Rule] = DEFAULT_RULES,
    attention: Mapping[str, Attention] | None = None,
    per_head: bool = False,
) -> list[dict[str, Any]]:
    """Optimizer groups for every trainable parameter: one per rule (and per way of cutting into matrices).

    Groups depend on names and shapes alone, so that they are the same on any number of ranks.

    Args:
        attention: the heads that `per_head` cuts by (see `qk_clip.find_attention`).
        per_head: cut the up-projections of queries, keys and values into one matrix a head.

    Raises:
        ValueError: a parameter matches no rule or several, or its shape does not fit the rule's algorithm.
    """
    heads = _head_blocks(attention or {}) if per_head else {}
    groups: dict[tuple[int, tuple[int, ...] | None], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = public_name(name)
        index = _only_rule(name, tuple(parameter.shape), rules)
        rule = rules[index]
        blocks = None
        if rule.algorithm == "muon":
            blocks = heads.get(name) or _equal_blocks(name, tuple(parameter.shape), rule)
        group = {"algorithm": rule.algorithm, "row_blocks": blocks, "rule": rule.pattern, **rule.options}
        groups.setdefault((index, blocks), {"params": [], **group})["params"].append((name, parameter))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: expected at least one.")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1] or ()))]


def _only_rule(name: str, shape: tuple[int, ...], rules: Sequence[Rule]) -> int:
    matching = [index for index, rule in enumerate(rules) if re.fullmatch(rule.pattern, name)]
    if len(matching) != 1:
        said = " and ".join(repr(rules[index].pattern) for index in matching) or "none"
        raise ValueError(
            f"The trainable parameter {name} {list(shape)} matches {said} of the {len(rules)} rules: expected exactly one; "
            "give rules=[Rule(pattern, 'muon' or 'adamw'), ...] that say what to do with it."
        )
    return matching[0]


def _equal_blocks(name: str, shape: tuple[int, ...], rule: Rule) -> tuple[int, ...] | None:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{name} {list(shape)} is to be updated by Muon ({rule.pattern!r}): expected a matrix or a stack; use adamw."
        )
    if rule.num_matrices == 1:
        return None
    rows = shape[-2]
    if rows % rule.num_matrices:
        raise ValueError(
            f"{name} {list(shape)}: {rows} rows cannot be cut into num_matrices={rule.num_matrices} equal parts."
        )
    return (rows // rule.num_matrices,)


def _head_blocks(attention: Mapping[str, Attention]) -> dict[str, tuple[int, ...]]:
    """Row blocks of the projections that heads are cut in: a head's query is one matrix, its key and value two."""
    blocks: dict[str, tuple[int, ...]] = {}
    for name, item in attention.items():
        prefix = f"{name}." if name else ""
        blocks[f"{prefix}{item.rows.query}.weight"] = (sum(size for size, _ in item.rows.query_runs),)
        if item.rows.key:
            blocks[f"{prefix}{item.rows.key}.weight"] = tuple(size for size, _ in item.rows.key_runs)
    return blocks
