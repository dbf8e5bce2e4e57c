"""What a recipe's run needs before its first step: configuration, tokenizer, rows, model and Trainer.

Each function is public, so that a script with its own ideas can take some of them and write the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from transformers import (
    AutoConfig,
    AutoTokenizer,
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
from ..tokenizer_training import train_tokenizer
from . import machine
from .adapters import add_adapter, load_quantised, start_qat
from .chat_data import encode_conversations, read_conversations
from .checkpoints import Checkpoints
from .recipe import NF4, Int4QAT, Recipe
from .rows import JoinedRows, Mixture, PackedRows, Rows, UnpackedRows
from .sources import Source
from .spikes import SpikeGuard
from .steps import Phase, StepPlan, held_out_batches
from .token_cache import (
    TokenCache,
    build_cache,
    encode_texts,
    fingerprint,
    hash_texts,
    held_out_mask,
    kept,
    split,
    tokenizer_identity,
)
from .trainer import RecipeTrainer

_ROWS: dict[str, Any] = {"joined": JoinedRows, "separate": PackedRows, "unpacked": UnpackedRows}


@dataclass(frozen=True)
class Data:
    """What training reads and what it is judged by. `caches` are one per mixed source."""

    tokenizer: PreTrainedTokenizerBase
    caches: tuple[TokenCache, ...]
    training_documents: tuple[Any, ...]  # int64 arrays, one per cache
    held_out_documents: tuple[Any, ...]
    held_out: Rows
    skipped_files: int

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return sum(
            int(cache.num_bytes[documents].sum())
            for cache, documents in zip(self.caches, self.held_out_documents, strict=True)
        )

    def num_tokens(self, documents: tuple[Any, ...]) -> int:
        """Tokens of `training_documents` or `held_out_documents`."""
        return sum(
            int((cache.offsets[numbers + 1] - cache.offsets[numbers]).sum())
            for cache, numbers in zip(self.caches, documents, strict=True)
        )

    def rows(self, recipe: Recipe, sequence_length: int, seed: int, held_out: bool = False) -> Rows:
        """Rows of `sequence_length` tokens of the training documents (shuffled) or of the held-out ones (in order)."""
        kind = _ROWS[recipe.data.packing]
        documents = self.held_out_documents if held_out else self.training_documents
        parts = [
            kind(cache, numbers, sequence_length, seed=seed, shuffle=not held_out)
            for cache, numbers in zip(self.caches, documents, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        weights = recipe.data.weights
        assert weights is not None
        return Mixture(parts, weights)


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


def load_tokenizer(recipe: Recipe, config: KimiK2Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer at `tokenizer.path`, or the weights' own; None if the recipe trains one.

    Raises:
        ValueError: it has more ids than the model, or no EOS token.
    """
    if recipe.tokenizer.vocab_size is not None:
        return None
    path = recipe.tokenizer.path or recipe.model.weights
    assert path is not None
    tokenizer = AutoTokenizer.from_pretrained(path)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer {path!r} has {len(tokenizer)} ids, but the model {recipe.model.config} only "
            f"{config.vocab_size}: set model.overrides.vocab_size={len(tokenizer)}."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {path!r} has no eos_token: expected one, to end documents with.")
    return tokenizer


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, folder: Path, progress: Progress
) -> Data:
    """Train a tokenizer (on the training documents alone) unless one is given, tokenise once, split.

    Rank 0 works first; the others wait and map what it wrote.

    Args:
        folder: of the run; a trained tokenizer is kept there.
        progress: gets one bar per phase; its columns may show `task.fields["note"]`.

    Raises:
        ValueError: the text cannot be read, or is too little.
    """
    section = recipe.data
    names = section.source if section.weights is not None else [section.source]
    sources = [Source(name, section.text_field, section.max_bytes) for name in names]
    error: ValueError | None = None
    data: Data | None = None
    if machine.rank() == 0:
        try:
            data = _prepare(recipe, sources, tokenizer, folder, progress)
        except ValueError as caught:
            error = caught
    problem = machine.from_rank_0(str(error) if error else None)
    if problem is not None:
        raise error or ValueError(problem)
    if data is None:
        data = _prepare(recipe, sources, tokenizer, folder, progress)
    return data


def _prepare(
    recipe: Recipe,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    progress: Progress,
) -> Data:
    section = recipe.data
    if tokenizer is None:
        tokenizer = _trained_tokenizer(recipe, sources, folder / "tokenizer", progress)
    caches = []
    for source in sources:
        name = fingerprint(source.identity(), tokenizer_identity(tokenizer), section.kind, section.seed)
        task = progress.add_task("Tokenising", total=source.num_bytes, note="")
        documents: Any = source if section.kind == "text" else read_conversations(source)

        def encode(batch: list[Any], tokenizer: PreTrainedTokenizerBase = tokenizer) -> Any:
            if section.kind == "text":
                return encode_texts(batch, tokenizer)
            return encode_conversations(batch, tokenizer, {})

        cache = build_cache(
            documents,
            encode,
            tokenizer,
            Path(section.cache_dir) / name,
            section.seed,
            lambda done, task=task: progress.advance(task, done),
        )
        progress.update(task, total=1, completed=1, note=f"{cache.num_tokens:,} tokens")
        caches.append(cache)
    parts = [split(cache, section.held_out_share) for cache in caches]
    data = Data(
        tokenizer=tokenizer,
        caches=tuple(caches),
        training_documents=tuple(training for training, _ in parts),
        held_out_documents=tuple(held_out for _, held_out in parts),
        held_out=None,  # type: ignore[arg-type]
        skipped_files=sum(source.skipped for source in sources),
    )
    object.__setattr__(
        data, "held_out", data.rows(recipe, section.sequence_length, section.seed, held_out=True)
    )
    return data


def _trained_tokenizer(
    recipe: Recipe, sources: list[Source], folder: Path, progress: Progress
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, trained on the training documents if it is not there yet."""
    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    section, vocab_size = recipe.data, recipe.tokenizer.vocab_size
    assert vocab_size is not None

    def texts(source: Source) -> Iterable[str]:
        if section.kind == "text":
            return source
        return (_conversation_text(row) for row in read_conversations(source))

    def training() -> Iterator[str]:
        for source in sources:
            sized = list(_counted(texts(source), progress, "Reading text", source.num_bytes))
            yield from kept(sized, ~held_out_mask(hash_texts(sized, section.seed), section.held_out_share))

    task = progress.add_task("Training the tokenizer", total=None, note="")
    tokenizer = train_tokenizer(training(), vocab_size)
    progress.update(task, total=1, completed=1)
    partial = folder.with_name(f".{folder.name}.partial")
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return tokenizer


def _conversation_text(row: dict[str, Any]) -> str:
    return "\n".join(str(message.get("content") or "") for message in row["messages"])


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
    source = RandomWeights(config, training.seed) if weights is None else CheckpointWeights(weights)
    model: Any
    if isinstance(recipe.quantization, NF4):
        model = load_quantised(config, layout, source, recipe.quantization, dtype, compute)
    else:
        model = build_model(config, layout, source, dtype, mixed_precision=training.dtype == "bfloat16")
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


def _counted(texts: Iterable[str], progress: Progress, name: str, total: int | None) -> Iterator[str]:
    """Pass texts on and move a bar by their bytes; the bar is full when the texts are at their end."""
    task, done = progress.add_task(name, total=total, note=""), 0
    for text in texts:
        yield text
        done += len(text.encode("utf-8", "replace"))
        progress.update(task, completed=done, note=f"{done / 1e6:.1f} MB")
    progress.update(task, total=done)
