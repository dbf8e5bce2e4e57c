"""What a recipe's run needs before its first step: configuration, tokenizer, blocks of tokens, model and Trainer.

Each function is public, so that a script with its own ideas can take some of them and write the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..configuration_kimi_k2 import KimiK2Config
from ..resources import find
from ..tokenizer_training import train_tokenizer
from .data import TokenBlocks, held_out_blocks, num_bytes, split_documents, tokenize, training_blocks
from .recipe import Recipe
from .sources import Source


@dataclass(frozen=True)
class Data:
    """What training reads and what it is judged by."""

    tokenizer: PreTrainedTokenizerBase
    training: TokenBlocks
    held_out: TokenBlocks
    training_documents: int
    held_out_documents: int
    held_out_bytes: int
    skipped_files: int


def build_config(recipe: Recipe) -> KimiK2Config:
    """The model's configuration: the size the recipe names, with its overrides.

    Raises:
        ValueError: no such size, an unknown or contradictory key, or a sequence longer than the model allows.
    """
    path = find("configs", recipe.model.config)
    values = json.loads(path.read_text(encoding="utf-8"))
    config = KimiK2Config.from_dict({**values, **recipe.model.overrides})
    vocab_size, trained = config.vocab_size, recipe.tokenizer.vocab_size
    if trained is not None and trained != vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size is {trained}, but the model {recipe.model.config} has vocab_size {vocab_size}: "
            f"expected the same; set tokenizer.vocab_size={vocab_size} or model.overrides.vocab_size={trained}."
        )
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {recipe.data.sequence_length}: expected at most the model's "
            f"max_position_embeddings, {config.max_position_embeddings}."
        )
    return config


def load_tokenizer(recipe: Recipe, config: KimiK2Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer at `tokenizer.path`; None if the recipe trains one.

    Raises:
        ValueError: it has more ids than the model, or no EOS token.
    """
    path = recipe.tokenizer.path
    if path is None:
        return None
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
    recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
) -> Data:
    """Read, split, train a tokenizer (on the training documents alone) unless one is given, tokenise and pack.

    Args:
        progress: gets one bar per phase; its columns may show `task.fields["note"]`.

    Raises:
        ValueError: the text cannot be read, or is too little.
    """
    documents = list(_counted(source, progress, "Reading text", source.num_bytes))
    training, held_out = split_documents(documents, recipe.data.held_out_share, recipe.data.seed)
    training_bytes, held_out_bytes = (sum(map(num_bytes, texts)) for texts in (training, held_out))
    if tokenizer is None:
        assert recipe.tokenizer.vocab_size is not None
        texts = _counted(training, progress, "Training the tokenizer", training_bytes)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    size = training_bytes + held_out_bytes
    task = progress.add_task("Tokenising", total=size, note=_megabytes(size))
    streams = [
        tokenize(texts, tokenizer, lambda done: progress.advance(task, done))
        for texts in (training, held_out)
    ]
    wanted = recipe.training.steps * recipe.training.batch_size * recipe.training.gradient_accumulation
    length = recipe.data.sequence_length
    return Data(
        tokenizer=tokenizer,
        training=training_blocks(streams[0], length, wanted, recipe.data.seed),
        held_out=held_out_blocks(streams[1], length, recipe.training.eval_sequences),
        training_documents=len(training),
        held_out_documents=len(held_out),
        held_out_bytes=held_out_bytes,
        skipped_files=source.skipped,
    )


def build_model(recipe: Recipe, config: KimiK2Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights from the recipe's seed, in float32; its special ids are the tokenizer's."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    set_seed(recipe.training.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build_trainer(
    recipe: Recipe, model: PreTrainedModel, data: Data, folder: Path, callbacks: list[TrainerCallback]
) -> Trainer:
    """transformers' Trainer, set up as the recipe says; it saves and prints nothing by itself."""
    settings, steps = recipe.training, recipe.training.steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_grad_norm=settings.max_grad_norm or 0.0,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=recipe.schedule.num_steps("warmup", steps),
        lr_scheduler_kwargs={
            "num_decay_steps": recipe.schedule.num_steps("decay", steps),
            "min_lr_ratio": recipe.schedule.min_lr / recipe.optimizer.lr,
        },
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",  # the blocks are shuffled already
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # else Trainer falls back to DataParallel and multiplies the batch
        arguments._n_gpu = 1
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.training,
        eval_dataset=data.held_out,
        processing_class=data.tokenizer,
        data_collator=_stack,
        optimizer_cls_and_kwargs=recipe.optimizer.cls_and_kwargs(),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _counted(texts: Iterable[str], progress: Progress, name: str, total: int | None) -> Iterator[str]:
    """Pass texts on and move a bar by their bytes; the bar is full when the texts are at their end."""
    task, done = progress.add_task(name, total=total, note=""), 0
    for text in texts:
        yield text
        done += num_bytes(text)
        progress.update(task, completed=done, note=_megabytes(done))
    progress.update(task, total=done)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
