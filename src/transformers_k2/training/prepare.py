"""What a recipe's run needs before its first step: configuration, model, rows of every step, Trainer.

Each function is public, so that a script with its own ideas can take some of them and write the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from ..configuration_kimi_k2 import KimiK2Config
from ..moe import RouterBalance
from ..parallel import CheckpointWeights, Layout, RandomWeights, build_model
from ..parallel.pipeline import Pipeline
from ..recompute import apply_recompute
from ..resources import find
from . import machine
from .adapters import add_adapter, load_quantised, start_qat
from .checkpoints import Checkpoints
from .data import Data
from .recipe import NF4, Int4, Int4QAT, Recipe
from .spikes import SpikeGuard
from .steps import Phase, StepPlan, held_out_batches
from .trainer import RecipeTrainer


def build_config(recipe: Recipe) -> KimiK2Config:
    """The model's configuration: of the size or of the weights that the recipe names, with its overrides.

    Raises:
        ValueError: no such size or weights, an unknown or contradictory key, or a sequence longer than the model allows.
    """
    section = recipe.model
    if section.weights is not None and "/" in section.weights and section.weights.startswith("runs/"):
        _demand_run(section.weights)
    if section.config is not None:
        values = json.loads(find("configs", section.config).read_text(encoding="utf-8"))
    else:
        assert section.weights is not None
        values = AutoConfig.from_pretrained(section.weights).get_text_config().to_dict()
        values.pop("model_type", None)
    values.pop("quantization_config", None)  # of the published files; what trains is float
    config = KimiK2Config.from_dict({**values, **section.overrides})
    vocab_size, trained = config.vocab_size, recipe.tokenizer.vocab_size
    if trained is not None and trained != vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size is {trained}, but the model {section.config} has vocab_size {vocab_size}: "
            f"expected the same; set tokenizer.vocab_size={vocab_size} or model.overrides.vocab_size={trained}."
        )
    longest = recipe.data.sequence_length
    if recipe.context is not None:
        config.max_position_embeddings = max(
            config.max_position_embeddings, recipe.context.max_position_embeddings
        )
        longest = max(longest, *(stage.sequence_length for stage in recipe.context.stages))
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {longest}: expected at most the model's max_position_embeddings, "
            f"{config.max_position_embeddings}."
        )
    return config


def _demand_run(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        name = Path(folder).name
        raise ValueError(
            f"model.weights is {folder!r}, which does not exist: expected a trained model; make it with "
            f"`k2 train {name}`, or name another folder or hub name."
        )


def prepare_model(
    recipe: Recipe, config: KimiK2Config, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> PreTrainedModel:
    """This rank's model: laid out, filled, with adapter, quantisation and memory settings; special ids are the tokenizer's.

    Raises:
        ValueError: sections that do not go together, or weights that do not fit.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    config._attn_implementation = recipe.model.attention
    training, weights = recipe.training, recipe.model.weights
    dtype, compute = getattr(torch, training.weights_dtype), getattr(torch, training.dtype)
    model: Any
    if isinstance(recipe.quantization, Int4 | NF4):
        assert weights is not None
        model = load_quantised(_folder(weights), config, layout, recipe.quantization, dtype, compute)
    else:
        source = (
            RandomWeights(config, training.seed) if weights is None else CheckpointWeights(_folder(weights))
        )
        # Accelerate shards a model that every process holds whole.
        built = Layout(layout.world_size) if recipe.parallel.engine == "accelerate" else layout
        model = build_model(config, built, source, dtype, mixed_precision=training.dtype == "bfloat16")
    if recipe.model.experts is not None:
        model.set_experts_implementation(recipe.model.experts)
    model.loss_chunk_tokens = recipe.memory.loss_chunk_tokens
    if isinstance(recipe.quantization, Int4QAT):
        start_qat(model, recipe.quantization)
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter, training.seed, base=weights)
    if recipe.memory.recompute or recipe.memory.offload:
        apply_recompute(model, recipe.memory.recompute, offload=recipe.memory.offload)
    return model


def _folder(weights: str) -> Path:
    """Of weights that are a folder, or a hub name, whose files are fetched once a node."""
    if Path(weights).is_dir():
        return Path(weights)
    wanted = ["*.safetensors", "*.json"]
    if (
        os.environ.get("LOCAL_RANK", "0") == "0"
    ):  # the first process of each node fetches, the others find the files
        snapshot_download(weights, allow_patterns=wanted)
    machine.barrier()
    return Path(snapshot_download(weights, allow_patterns=wanted))


def step_plan(recipe: Recipe, data: Data, layout: Layout) -> StepPlan:
    """Which rows this process reads at which step.

    Raises:
        ValueError: rows that do not divide by processes and micro-batches.
    """
    training, length = recipe.training, recipe.data.sequence_length
    micro = min(training.micro_batch_size, max(training.batch_size // layout.data_size, 1))
    if recipe.context is None:
        stages = [(training.steps, length)]
    else:
        stages = [(stage.steps, stage.sequence_length) for stage in recipe.context.stages]
    phases = [
        Phase(
            num_steps=steps,
            rows=data.rows(recipe, stage_length, recipe.data.seed + number),
            rows_per_step=recipe.tokens_per_step // stage_length,
            rows_per_micro_batch=max(micro * length // stage_length, 1),
        )
        for number, (steps, stage_length) in enumerate(stages)
    ]
    return StepPlan(tuple(phases), layout.data_size, layout.data_rank(machine.rank()))


def build_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    data: Data,
    layout: Layout,
    folder: Path,
    callbacks: list[TrainerCallback],
    balance: RouterBalance | None = None,
    pipeline: Pipeline | None = None,
    **options: Any,
) -> RecipeTrainer:
    """The Trainer of a recipe; it prints nothing by itself.

    Args:
        options: further arguments of RecipeTrainer.
    """
    settings, steps = recipe.training, recipe.training.steps
    plan = step_plan(recipe, data, layout)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # the loader gives whole micro-batches
        gradient_accumulation_steps=1 if pipeline is not None else plan.accumulation,
        max_grad_norm=settings.max_grad_norm or 0.0,
        bf16=settings.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # else Accelerate takes several CPU processes for one each
        seed=settings.seed,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=recipe.num_steps(recipe.schedule.warmup),
        lr_scheduler_kwargs={
            "num_decay_steps": recipe.num_steps(recipe.schedule.decay),
            "min_lr_ratio": recipe.schedule.min_lr / recipe.optimizer.lr,
        },
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # every rank moves the routers' bias in the same way
        dataloader_num_workers=settings.data_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=True,  # the loader starts at the resumed step
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # a callback says when
        report_to=recipe.logging.trackers or "none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # else Trainer falls back to DataParallel and multiplies the batch
        arguments._n_gpu = 1
    group: Any = pipeline.data_group if pipeline is not None else None
    if layout.world_size > 1 and not layout.splits_the_model:
        group = dist.group.WORLD  # copies share the work of the optimizer
    guard = settings.spike_guard
    rows_per_batch = plan.phases[0].rows_per_micro_batch
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        processing_class=data.tokenizer,
        eval_dataset=data.held_out,  # Trainer asks for one; RecipeTrainer reads `held_out`
        optimizer_cls_and_kwargs=recipe.optimizer.cls_and_kwargs(group),
        callbacks=callbacks,
        layout=layout,
        plan=plan,
        held_out=held_out_batches(
            data.held_out, settings.eval_sequences, rows_per_batch, layout.data_size, plan.data_rank
        ),
        checkpoints=Checkpoints(folder / "checkpoints", recipe.checkpoint.keep, layout),
        pipeline=pipeline,
        balance=balance,
        spike_guard=None if guard is None else SpikeGuard(guard.window, guard.factor, guard.max_skips),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    if arguments.world_size != layout.world_size:
        raise RuntimeError(
            f"Accelerate sees {arguments.world_size} processes where {layout.world_size} run: every one would train alone. "
            "Start them with accelerate launch (without --cpu) or torchrun."
        )
    return trainer
