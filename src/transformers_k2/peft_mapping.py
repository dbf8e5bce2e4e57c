r"""What a `LoraConfig` means on a Kimi K2 model, by whatever way in (`get_peft_model`, `add_adapter`, ...).

transformers 5 keeps a layer's routed experts as two fused parameters, so `gate_proj`, `up_proj` and
`down_proj` name modules only in the shared experts and the dense layers. For DeepSeek's layout PEFT moves
such targets to the fused parameters and drops the shared experts and dense layers; for a model type that it
does not know, it skips the routed experts; both silently. `resolve` takes each name literally, over the
modules and the hub's per-expert names:

* A list entry matches a name, or the end of one after a dot, and must match something. A string is a regular
  expression for whole names; of what it matches, the linear layers and the experts are adapted.
  `"all-linear"` is every linear layer of the decoder layers and all routed experts: no head, and not the
  router, which is adapted only by name (`"gate"` in a list, or `target_parameters=["mlp.gate.weight"]`).
* `target_parameters`, when given, alone says which experts are adapted (`[]`: none); `target_modules` then
  means modules only. `resolve` writes its result in this form, so a saved adapter means the same when loaded.
* An expert's gate and up halves are one parameter: as in PEFT, its rank and alpha double, the scaling stays.

One function of PEFT is wrapped, `convert_peft_config_for_transformers`; other models pass through it
untouched. PEFT is never imported by registering: its module is wrapped when something else imports it.

Routed experts that stay INT4 (`PackedExperts`) are adapted under the same names; packed_lora.py has how.

Given up: on experts that are not packed PEFT applies LoRA to a fused parameter by computing W + B A for all experts
of the layer in each forward, and keeps it for the backward pass: a second copy of the experts, 34 GB a layer at K2's
size. And its loader does not find the experts of a per-expert adapter file that has no down_proj; it warns.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from .configuration_kimi_k2 import KimiK2Config
from .quantization.packed_experts import STACKS, PackedExperts

_PEFT_MODULE = "peft.utils.transformers_weight_conversion"
_EXPERTS, _ROUTER = "mlp.experts", "mlp.gate"
# Fused parameter -> the hub's projections in it, in the order in which transformers concatenates them.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The key PEFT itself writes for gate_up_proj; the other one must not match the modules named down_proj.
_PATTERN_KEYS = {"gate_up_proj": r".*\.gate_up_proj", "down_proj": r".*\.mlp\.experts\.down_proj"}
_Patterns = tuple[dict[str, Any], dict[str, Any]]  # rank_pattern, alpha_pattern
_OR_NO_EXPERTS = r"or leave the routed experts out with exclude_modules=r'.*\.mlp\.experts\..*'."


def register() -> None:
    """Make PEFT read LoRA configurations of Kimi K2 models with `resolve`. Before or after PEFT's import."""
    if _PEFT_MODULE in sys.modules:
        _wrap(sys.modules[_PEFT_MODULE])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Wraps PEFT's module as it is imported. Importing PEFT for it takes seconds if bitsandbytes is there."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _PEFT_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            spec.loader.exec_module = execute_and_wrap
        return spec


def _wrap(module: ModuleType) -> None:
    upstream: Callable[..., None] = module.convert_peft_config_for_transformers
    if upstream.__module__ == __name__:
        return

    def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if isinstance(getattr(model, "config", None), KimiK2Config) and peft_config.peft_type == "LORA":
            resolve(peft_config, model)
        else:
            upstream(peft_config, model=model, conversions=conversions)

    module.convert_peft_config_for_transformers = convert_peft_config_for_transformers


def resolve(config: Any, model: nn.Module) -> None:
    """Rewrite a `LoraConfig` in place so that PEFT adapts in `model` exactly what the configuration names.

    Sets `target_modules`, `target_parameters` and, for the fused parameters, entries of `rank_pattern` and
    `alpha_pattern`; the module's docstring has the rules. To resolve it once more changes nothing.

    Raises:
        ValueError: a name matches nothing; of a layer's experts, or of their gate and up halves, only a part
            is selected; an option has no meaning for fused parameters. Nothing is changed then.
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    targets, parameters = config.target_modules, config.target_parameters
    if targets == DUMMY_TARGET_MODULES or (targets is None and parameters is None):
        return  # an adapter without targets; PEFT's own error
    names = _Names(model)
    _check_layers_and_modules_to_save(config, names)
    patterns = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    modules, experts, routers = _select(config, names, with_experts=parameters is None)
    if parameters is None:
        others = _shortest(routers, names.routers, "weight")
        _translate_patterns(config, patterns, names, experts)
    else:
        experts, others = _select_parameters(config, names)
    parameters = {
        *others,
        *(entry for key in experts for entry in _shortest(experts[key], names.experts, key)),
    }
    adapted = [names.modules[container] for containers in experts.values() for container in containers]
    packs = [isinstance(module, PackedExperts) for module in adapted]
    if parameters:
        _check_options(config, dropout=bool(packs) and all(packs) and not others)
    if not any(packs):
        _check_saved_options(config)

    if any(packs):
        from . import packed_lora

        packed_lora.prepare(config, model)
    config.target_modules, config.target_parameters = modules, sorted(parameters)
    config.rank_pattern, config.alpha_pattern = patterns
    _silence_pattern_warnings(config, names, experts)


class _Names:
    """What a configuration can select in a model, by the names that were there before any adapter."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model = type(model).__name__
        self.num_experts: int = model.config.n_routed_experts
        self.num_layers: int = model.config.num_hidden_layers
        self.modules: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()  # the insides of one adapter's layers are not for the next
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
                module = module.get_base_layer()
            self.modules[name] = module
        self.layers = [
            name
            for name, module in self.modules.items()
            # Some quantised layers are no nn.Linear; their class names, as in PEFT, say what they are.
            if isinstance(module, nn.Linear | nn.Embedding) or "Linear" in type(module).__name__
        ]
        self.experts = [name for name in self.modules if _EXPERTS in _ends(name)]
        self.routers = [name for name in self.modules if _ROUTER in _ends(name)]
        self.parameters = [
            f"{name}.{parameter}"
            for name, module in self.modules.items()
            for parameter in _parameters(module)
        ]

    def per_expert(self, container: str, projection: str) -> list[str]:
        """The hub's names of one projection, in the order of the experts."""
        return [f"{container}.{expert}.{projection}" for expert in range(self.num_experts)]

    def unmatched(
        self, option: str, entries: Iterable[str], choices: Iterable[str], hint: str = ""
    ) -> ValueError:
        entries, choices = sorted(entries), sorted(set(choices))
        near = [
            word for entry in entries for word in difflib.get_close_matches(entry.split(".")[-1], choices)
        ]
        nearest = f"nearest: {', '.join(dict.fromkeys(near))}; " if near else ""
        return ValueError(
            f"LoRA {option} {', '.join(map(repr, entries))} matches nothing that can be adapted in "
            f"{self.model}: {nearest}choices: {', '.join(choices)}.{hint}"
        )


def _parameters(module: nn.Module) -> list[str]:
    """By the names that adapters use: packed experts have those of the parameters that they stand for."""
    if isinstance(module, PackedExperts):
        return list(STACKS)
    return [name for name, _ in module.named_parameters(recurse=False)]


def _ends(name: str) -> list[str]:
    """What a list entry must equal to match `name`: the name itself, or its end after one of its dots."""
    return [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]


def _shortest(chosen: list[str], every: list[str], parameter: str) -> list[str]:
    """Entries of target_parameters: a single one for all layers if possible, else full names."""
    if chosen and len(chosen) == len(every):
        chosen = [".".join(every[0].split(".")[-2:])]
    return [f"{name}.{parameter}" for name in chosen]


def _selected(config: Any, name: str) -> bool | None:
    """Whether the configuration selects `name`; None if exclude_modules or modules_to_save leave it out."""
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    found = check_target_module_exists(config, name)
    return None if isinstance(found, _ExcludedModule) else bool(found)


def _select(config: Any, names: _Names, with_experts: bool) -> tuple[Any, dict[str, list[str]], list[str]]:
    """Returns target_modules, {fused parameter: containers of the chosen experts}, and the named routers."""
    targets = config.target_modules
    if targets is None:
        return None, {}, []
    if not isinstance(targets, str):
        return _select_by_list(config, names, set(targets), with_experts)
    if targets.lower() == "all-linear":
        probe = copy.copy(config)
        probe.target_modules = {name for name in names.layers if re.search(r"(^|\.)layers\.\d+\.", name)}
        modules = {name for name in names.layers if _selected(probe, name)}
        probe.target_modules = set(_PROJECTIONS)
        return modules, _select_experts(probe, names) if with_experts else {}, []

    states = {name: _selected(config, name) for name in names.modules}
    modules = {name for name in names.layers if states[name]}
    experts = _select_experts(config, names) if with_experts else {}
    if not modules and not any(experts.values()) and None not in states.values():
        hint = ""
        if any(states[name] for name in names.routers):
            hint = " The router is adapted with target_parameters=['mlp.gate.weight']."
        elif re.fullmatch(r"[\w.]+", targets):
            hint = " A string is a regular expression for whole names; a list matches the ends of names."
        raise names.unmatched("target_modules", [targets], _choices(names, with_experts), hint)
    # PEFT would also try the containers, norms and activations that the expression matches, and fail.
    is_exact = modules and all(name in modules for name, state in states.items() if state)
    return targets if is_exact else modules, experts, []


def _select_by_list(
    config: Any, names: _Names, entries: set[str], with_experts: bool
) -> tuple[set[str], dict[str, list[str]], list[str]]:
    def matching(candidates: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for name in candidates:
            here = entries.intersection(_ends(name))
            if not here <= found and _selected(config, name) is not False:
                found |= here
        return found

    modules = matching(names.layers)
    found, experts, routers = set(modules), {}, []
    if with_experts:
        experts = _select_experts(config, names)
        routers = [name for name in names.routers if _selected(config, name)]
        found |= matching(names.routers)
        for container in names.experts if entries - found else ():
            for projection in _PROJECTIONS:
                found |= matching([f"{container}.{projection}", *names.per_expert(container, projection)])
    if missing := entries - found:
        only = f" Only layers_to_transform={config.layers_to_transform} were searched."
        hint = "" if config.layers_to_transform is None else only
        raise names.unmatched("target_modules", missing, _choices(names, with_experts), hint)
    return modules, experts, routers


def _choices(names: _Names, with_experts: bool) -> set[str]:
    return {name.split(".")[-1] for name in names.layers} | (set(_PROJECTIONS) if with_experts else set())


def _select_experts(config: Any, names: _Names) -> dict[str, list[str]]:
    """{fused parameter: the containers in which it is selected}."""
    chosen: dict[str, list[str]] = {fused: [] for fused in _FUSED}
    for container in names.experts:
        for fused, projections in _FUSED.items():
            if None in (_selected(config, container), _selected(config, f"{container}.{fused}")):
                continue
            counts = {projection: _count(config, names, container, projection) for projection in projections}
            for projection, count in counts.items():
                if 0 < count < names.num_experts:
                    raise ValueError(
                        f"LoRA target_modules selects {projection} of {count} of the {names.num_experts} "
                        f"experts in {container}, which are one parameter: select all of them, {_OR_NO_EXPERTS}"
                    )
            if not any(counts.values()):
                continue
            if missing := [projection for projection, count in counts.items() if count == 0]:
                raise ValueError(
                    f"LoRA target_modules leaves out {missing[0]} of the experts in {container}, a part of "
                    f"the parameter {fused}: name {' and '.join(projections)}, {_OR_NO_EXPERTS}"
                )
            module = names.modules[container]
            if fused not in _parameters(module):
                raise ValueError(
                    f"LoRA target_modules selects the experts in {container}, but {type(module).__name__} "
                    f"has no parameter {fused} that PEFT could adapt: load the model in bf16, {_OR_NO_EXPERTS}"
                )
            chosen[fused].append(container)
    return chosen


def _count(config: Any, names: _Names, container: str, projection: str) -> int:
    """How many experts' `projection` is selected, by its hub name or by that without the expert's number."""
    whole = _selected(config, f"{container}.{projection}")
    if whole is None:
        return 0
    states = [_selected(config, name) for name in names.per_expert(container, projection)]
    return sum(state is not None and (state or whole) for state in states)


def _select_parameters(config: Any, names: _Names) -> tuple[dict[str, list[str]], list[str]]:
    """What target_parameters names: {fused parameter: containers}, and the entries for other parameters."""
    experts: dict[str, list[str]] = {fused: [] for fused in _FUSED}
    others, missing = [], []
    for entry in sorted(set(config.target_parameters)):
        found = [name for name in names.parameters if entry in _ends(name)]
        if not found:
            missing.append(entry)
        for name in found:
            container, _, leaf = name.rpartition(".")
            probe = copy.copy(config)
            probe.target_modules = {leaf}
            if not _selected(probe, name):  # PEFT would adapt it all the same
                raise ValueError(
                    f"LoRA target_parameters {entry!r} includes {name}, which layers_to_transform, "
                    f"exclude_modules or modules_to_save leaves out, but PEFT heeds them for modules only: "
                    f"give full names."
                )
            if container not in names.experts or leaf not in experts:
                others.append(entry)
            elif container not in experts[leaf]:
                experts[leaf].append(container)
    if missing:
        fused = [name for name in names.parameters if name.split(".")[-1] in _FUSED or _ROUTER in name]
        raise names.unmatched(
            "target_parameters", missing, [".".join(name.split(".")[-3:]) for name in fused]
        )
    return experts, others


def _check_layers_and_modules_to_save(config: Any, names: _Names) -> None:
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    asked = config.layers_to_transform
    asked = [asked] if isinstance(asked, int) else asked or []
    if absent := [layer for layer in asked if not 0 <= layer < names.num_layers]:
        raise ValueError(
            f"LoRA layers_to_transform {absent}: {names.model} has layers 0 to {names.num_layers - 1}."
        )
    # For a classifier PEFT adds the names that heads usually have.
    asked = set(config.modules_to_save or []) - set(SEQ_CLS_HEAD_NAMES)
    if absent := [entry for entry in asked if not any(name.endswith(entry) for name in names.modules)]:
        choices = {name.split(".")[-1] for name in names.modules}
        raise names.unmatched("modules_to_save", absent, [name for name in choices if not name.isdigit()])


def _check_options(config: Any, dropout: bool) -> None:
    """Refuse what PEFT's wrapper for parameters refuses too, but halfway, with some layers replaced.

    Args:
        dropout: all of the parameters are those of packed experts, where LoRA has an input of its own.
    """
    reasons = {
        "lora_dropout": "the update is added to the weight, so there is no input of its own to drop",
        "lora_bias": "they have no bias",
        "fan_in_fan_out": "their layout is fixed",
    }
    if dropout:
        del reasons["lora_dropout"]
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    reasons |= dict.fromkeys(variants, "PEFT has this variant for modules only")
    wrong = [name for name in reasons if getattr(config, name)]
    if config.init_lora_weights not in (True, False, "gaussian"):
        wrong.append("init_lora_weights")
        reasons["init_lora_weights"] = "PEFT has only True, False and 'gaussian' for them"
    if wrong:
        raise ValueError(
            f"LoRA {wrong[0]}={getattr(config, wrong[0])!r} is impossible on target_parameters and the "
            f"experts' fused parameters ({reasons[wrong[0]]}): remove the option, {_OR_NO_EXPERTS}"
        )


def _check_saved_options(config: Any) -> None:
    """Training must not go on without what the adapter was trained with, or was asked for; to evaluate it is harmless."""
    from .packed_lora import trained_with

    options = trained_with(config)
    if options and not config.inference_mode:
        name, value = next(iter(options.items()))
        raise ValueError(
            f"LoRA {name}={value!r} was made for packed INT4 experts, and none are adapted here: load the base "
            f"checkpoint without dequantize=True, load the adapter for inference only, or remove the option."
        )


def _key_matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None  # PEFT's rule for rank_pattern and alpha_pattern


def _rank_and_alpha(config: Any, patterns: _Patterns, name: str) -> tuple[int, float]:
    first = [next((pattern[key] for key in pattern if _key_matches(key, name)), None) for pattern in patterns]
    return (config.r if first[0] is None else first[0]), (config.lora_alpha if first[1] is None else first[1])


def _translate_patterns(
    config: Any, patterns: _Patterns, names: _Names, experts: dict[str, list[str]]
) -> None:
    """Give each fused parameter what the patterns give its projections; drop the keys for single experts.

    A key that matches the fused parameter's name and not the projections' is taken as it is.
    """
    for fused, containers in experts.items():
        wanted, is_given = {}, True
        for container in containers:
            name, (example, *_) = f"{container}.{fused}", names.per_expert(container, _FUSED[fused][0])
            own = (key for pattern in patterns for key in pattern if _key_matches(key, name))
            if any(not _key_matches(key, example) for key in own):
                continue
            wanted[container] = _fused_rank_and_alpha(config, patterns, names, container, fused)
            is_given &= wanted[container] == _rank_and_alpha(config, patterns, name)
        is_uniform = len(wanted) == len(containers) and len(set(wanted.values())) == 1
        for container, values in wanted.items() if not is_given else ():
            name = f"{container}.{fused}"
            new_key = _PATTERN_KEYS[fused] if is_uniform else re.escape(name)
            for pattern, value in zip(patterns, values, strict=True):
                # Which of two matching keys counts depends on their order, and PEFT sorts them when it saves.
                for key in [key for key in pattern if key != new_key and _key_matches(key, name)]:
                    pattern[rf"(?!.*\bexperts\.{fused}$)(?<!\bexperts\.)(?:{key})"] = pattern.pop(key)
                pattern[new_key] = value

    known = [*names.modules, *names.parameters]
    containers = {container for each in experts.values() for container in each}
    single = [
        name
        for container in containers
        for projection in _PROJECTIONS
        for name in names.per_expert(container, projection)
    ]
    for pattern in patterns:
        for key in [key for key in pattern if not any(_key_matches(key, name) for name in known)]:
            if any(_key_matches(key, name) for name in single):
                del pattern[key]


def _fused_rank_and_alpha(
    config: Any, patterns: _Patterns, names: _Names, container: str, fused: str
) -> tuple[int, float]:
    """Rank and alpha of a fused parameter that holds one LoRA for each of its projections, side by side."""
    found = [
        {_rank_and_alpha(config, patterns, name) for name in names.per_expert(container, projection)}
        for projection in _FUSED[fused]
    ]
    root = math.sqrt if config.use_rslora else float
    scalings = {alpha / root(rank) for each in found for rank, alpha in each}
    if len(scalings) > 1 or any(len(each) > 1 for each in found):
        raise ValueError(
            f"LoRA rank_pattern and alpha_pattern give {' and '.join(_FUSED[fused])} of the experts in "
            f"{container} (rank, alpha) {sorted(set().union(*found))}, but {fused} is one parameter with one "
            f"rank and one scaling."
        )
    pairs = [each.pop() for each in found]
    rank = sum(rank for rank, _ in pairs)
    if config.use_rslora:
        return rank, pairs[0][1] * math.sqrt(rank / pairs[0][0])
    return rank, sum(alpha for _, alpha in pairs)


def _silence_pattern_warnings(config: Any, names: _Names, experts: dict[str, list[str]]) -> None:
    """PEFT looks for the patterns' keys among modules only, and says that it ignored those of parameters."""
    adapted = [f"{container}.{fused}" for fused, containers in experts.items() for container in containers]
    for option in ("rank_pattern", "alpha_pattern"):
        keys = [
            key
            for key in getattr(config, option)
            if not any(_key_matches(key, name) for name in names.layers)
        ]
        if keys and all(any(_key_matches(key, name) for name in adapted) for key in keys):
            message = f"The following {option} keys did not match any targeted module and were ignored: "
            warnings.filterwarnings("ignore", re.escape(f"{message}{sorted(keys)}."), RuntimeWarning)
