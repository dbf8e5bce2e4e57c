"""A recipe as a plan: memory per GPU and bytes on the wire of the run that `k2 train` would start, before it does.

The recipe is translated into the planner's options; nothing is measured twice. What it gives up: an adapter's own weights,
and what quantisation changes, are not counted; the plan says so in its notes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configuration_kimi_k2 import KimiK2Config
from ..parallel.plan_search import advised
from ..parallel.planner import Plan, plan
from .optimizers import MuonClip
from .prepare import build_config
from .recipe import NF4, Int4, Int4QAT, Recipe

MACHINE = ("gpu_memory", "reserve", "intra_node_gbps", "inter_node_gbps", "imbalance")


def plan_recipe(
    recipe: Recipe, nodes: int, gpus_per_node: int = 8, size: str | None = None, **machine: Any
) -> Plan:
    """The plan of a recipe on so many GPUs, with its longest sequences if it has several lengths.

    Args:
        size: a config.json, a folder with one, or a name in configs/: the model in the place of the recipe's.
        machine: what the recipe does not say: gpu_memory, reserve, intra_node_gbps, inter_node_gbps, imbalance; see
            `plan_options.Options`.

    Raises:
        ValueError: the layout, the batch or the model does not fit the number of GPUs, or weights that would tell the
            configuration are missing.
    """
    if unknown := sorted(set(machine) - set(MACHINE)):
        raise ValueError(
            f"A recipe's plan has no option {', '.join(unknown)}: expected some of {', '.join(MACHINE)}."
        )
    if size is not None:
        path = Path(size) / "config.json" if Path(size).is_dir() else size
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, config=str(path)),
            tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=None),  # a plan reads no text
        )
    config = _config(recipe)
    layout = recipe.layout(nodes * gpus_per_node)
    layout.check(config, layout.world_size)
    plans = [
        plan(config, layout, gpus_per_node=gpus_per_node, **options, **machine)
        for options in plan_options(recipe, layout.data_size)
    ]
    fullest = max(plans, key=lambda one: one.fullest.peak)
    return dataclasses.replace(advised(config, fullest), notes=tuple(_notes(recipe)))


def plan_options(recipe: Recipe, data_size: int) -> Iterator[dict[str, Any]]:
    """The planner's options for every sequence length of the recipe, with `data_size` ranks that read different rows."""
    training, memory, optimizer = recipe.training, recipe.memory, recipe.optimizer
    # As steps.py deals rows out: the tokens of a step and of a micro-batch stay, whatever the length.
    length = recipe.data.sequence_length
    micro = min(training.micro_batch_size, max(training.batch_size // data_size, 1))
    lengths = (
        [length] if recipe.context is None else [stage.sequence_length for stage in recipe.context.stages]
    )
    muon = isinstance(optimizer, MuonClip)
    for stage_length in dict.fromkeys(lengths):
        yield {
            "micro_batch_size": max(micro * length // stage_length, 1),
            "sequence_length": stage_length,
            "batch_size": recipe.tokens_per_step // stage_length,
            "dtype": training.weights_dtype,
            "mixed_precision": training.dtype == "bfloat16",
            "optimizer": "muon_clip" if muon else "adamw",
            "state_dtype": optimizer.state_dtype if muon else "float32",
            "master_weights": optimizer.master_weights if muon else False,
            "recompute": tuple(memory.recompute),
            "experts": "k2" if recipe.model.experts == "k2" else "grouped_mm",
            "loss_chunk_tokens": memory.loss_chunk_tokens,
            "offload_activations": memory.offload,
            "frozen": recipe.adapter is not None,
            "schedule": recipe.parallel.schedule,
            "micro_batches_per_run": recipe.parallel.micro_batches_per_run,
        }


def _config(recipe: Recipe) -> KimiK2Config:
    """The run's configuration; weights that another run will have made are not asked for if the recipe names a size."""
    if recipe.model.config is not None:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights=None))
    config = copy.deepcopy(build_config(recipe))
    if "quantization_config" in vars(config):
        del config.quantization_config
    return config


def _notes(recipe: Recipe) -> Iterator[str]:
    if recipe.adapter is not None:
        yield f"The base is frozen; the adapter of rank {recipe.adapter.rank}, its gradients and states are not counted."
    if isinstance(recipe.quantization, Int4 | NF4):
        yield "The base is counted in weights_dtype; INT4 makes its routed experts smaller, NF4 its linear layers too."
    if isinstance(recipe.quantization, Int4QAT):
        yield "The rounded copies of a layer's experts, which INT4 training computes with, are not counted."
