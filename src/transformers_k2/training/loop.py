"""`train`: one recipe from text to a model that has been saved, loaded again and made to write.

transformers' Trainer does the stepping; this file prepares what it takes and checks what it gives. The pieces
(`build_config`, `prepare_data`, `build_trainer`) are public, so that a script with its own ideas can use some of them.
What it gives up: several processes. A run under torchrun is refused rather than trained wrongly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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
from .baselines import unigram_and_bigram_loss
from .callbacks import Metrics, ProgressBar
from .data import TokenBlocks, held_out_blocks, num_bytes, split_documents, tokenize, training_blocks
from .output import KEPT, MARKER, check_output, staged
from .recipe import Recipe, load_recipe
from .report import RunSummary, plot_losses, print_summary
from .sources import Source, describe


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


def train(recipe: str | Path, overrides: Iterable[str] = (), console: Console | None = None) -> RunSummary:
    """Run a recipe: prepare the text, train, save, reload, generate; print a summary and return it.

    Args:
        recipe: a path, or the name of a file in training_recipes/.
        overrides: "dotted.key=value" changes to it.
        console: where to print. Default: standard output.

    Raises:
        ValueError: the recipe, the text or the output folder does not allow the run; told before the work it would waste.
        NonFiniteLossError: training diverged. Nothing that was on the disk has changed.
    """
    started = time.perf_counter()
    console = console or Console()
    name, recipe = Path(recipe).stem, load_recipe(recipe, overrides)
    _check_machine()
    config = build_config(recipe)
    source = Source(recipe.data.source, recipe.data.text_field, recipe.data.max_bytes)
    target = check_output(recipe.output_dir, recipe.overwrite)
    tokenizer = _load_tokenizer(recipe, config)

    with staged(target) as folder:
        with _progress(console) as progress:
            data = prepare_data(recipe, config, source, tokenizer, progress)
            model = build_model(recipe, config, data.tokenizer)
            metrics = Metrics(folder / KEPT, recipe.tokens_per_step)
            trainer = build_trainer(recipe, model, data, folder, [metrics, ProgressBar(progress, metrics)])
            trainer.train()
        _save(recipe, model, data.tokenizer, folder)
        with console.status("Loading the result again"):
            sample = reload_and_generate(recipe, model, data, folder)
        summary = _summarise(recipe, name, config, data, model, metrics, source, sample, time.perf_counter() - started)
        title = f"{recipe.model.config} on {summary.source}: {summary.training_seconds:.0f} s of training"
        counted = {"bigram table": summary.bigram_loss, "word frequencies": summary.unigram_loss}
        plot_losses(folder / "loss.png", metrics.training, metrics.held_out, recipe.tokens_per_step, counted, title)
        summary.save(folder / "summary.json")
    print_summary(summary, console)
    return summary


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
            f"tokenizer.vocab_size is {trained}, but the model {recipe.model.config} has vocab_size {vocab_size}: expected "
            f"the same; set tokenizer.vocab_size={vocab_size} or model.overrides.vocab_size={trained}."
        )
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length is {recipe.data.sequence_length}: expected at most the model's max_position_embeddings, "
            f"{config.max_position_embeddings}."
        )
    return config


def prepare_data(
    recipe: Recipe,
    config: KimiK2Config,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> Data:
    """Read, split, train the tokenizer (on the training documents alone) unless one is given, tokenise and pack."""
    documents = list(_counted(source, progress, "Reading text", source.num_bytes))
    training, held_out = split_documents(documents, recipe.data.held_out_share, recipe.data.seed)
    training_bytes, held_out_bytes = (sum(map(num_bytes, texts)) for texts in (training, held_out))
    if tokenizer is None:
        assert recipe.tokenizer.vocab_size is not None
        texts = _counted(training, progress, "Training the tokenizer", training_bytes)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    size = training_bytes + held_out_bytes
    task = progress.add_task("Tokenising", total=size, note=_megabytes(size))
    streams = [tokenize(texts, tokenizer, lambda done: progress.advance(task, done)) for texts in (training, held_out)]
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
    """transformers' Trainer, set up as the recipe says; it saves nothing by itself."""
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
    if arguments.n_gpu > 1:  # else Trainer would fall back to DataParallel and multiply the batch
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


def reload_and_generate(recipe: Recipe, model: PreTrainedModel, data: Data, folder: Path) -> str:
    """Load what was saved through the Auto classes, compare its logits with the trained model's, and sample from it.

    Raises:
        RuntimeError: the reloaded model computes something else.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device).eval()
    ids = data.held_out[0]["input_ids"].unsqueeze(0).to(model.device)
    with torch.no_grad():
        expected, got = (candidate.eval()(input_ids=ids).logits for candidate in (model, reloaded))
    if not torch.equal(expected, got):
        raise RuntimeError(
            f"The model loaded from {folder} differs from the one that was saved, by up to {(expected - got).abs().max():.3g}."
        )
    settings = recipe.generation
    sampling = {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    inputs = tokenizer(settings.prompt, return_tensors="pt").to(model.device)
    set_seed(recipe.training.seed)
    output = reloaded.generate(**inputs, max_new_tokens=settings.max_new_tokens, **sampling)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _check_machine() -> None:
    missing = [name for name in ("accelerate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"k2 train needs {' and '.join(missing)}: pip install 'transformers_k2[train]'.")
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"WORLD_SIZE is {size}: k2 train runs in one process; start it without torchrun.")


def _load_tokenizer(recipe: Recipe, config: KimiK2Config) -> PreTrainedTokenizerBase | None:
    path = recipe.tokenizer.path
    if path is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(path)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer {path!r} has {len(tokenizer)} ids, but the model {recipe.model.config} only {config.vocab_size}: "
            f"set model.overrides.vocab_size={len(tokenizer)}."
        )
    return tokenizer


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


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _save(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.config.use_cache = True  # Trainer turned it off for training
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MARKER).write_text(recipe.to_yaml(), encoding="utf-8")


def _summarise(
    recipe: Recipe,
    name: str,
    config: KimiK2Config,
    data: Data,
    model: PreTrainedModel,
    metrics: Metrics,
    source: Source,
    sample: str,
    total_seconds: float,
) -> RunSummary:
    losses = [loss for _, loss in metrics.training]
    held_out_loss = metrics.held_out[-1][1]
    held_out = data.held_out.matrix()
    unigram, bigram = unigram_and_bigram_loss(data.training.matrix(), held_out, config.vocab_size)
    tokens_per_byte = len(data.held_out.tokens) / data.held_out_bytes
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for key, parameter in model.named_parameters() if ".experts." in key)
    idle = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    return RunSummary(
        recipe=name,
        source=describe(recipe.data.source),
        output_dir=recipe.output_dir,
        model=recipe.model.config,
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - idle,
        training_documents=data.training_documents,
        held_out_documents=data.held_out_documents,
        skipped_files=data.skipped_files,
        training_tokens=len(data.training.tokens),
        held_out_tokens=len(data.held_out.tokens),
        evaluated_tokens=held_out.size - len(held_out),
        steps=recipe.training.steps,
        tokens=recipe.training.steps * recipe.tokens_per_step,
        training_seconds=metrics.seconds,
        total_seconds=total_seconds,
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-max(1, len(losses) // 20) :])),
        held_out_loss=held_out_loss,
        bits_per_byte=held_out_loss * tokens_per_byte / np.log(2).item(),
        unigram_loss=unigram,
        bigram_loss=bigram,
        prompt=recipe.generation.prompt,
        sample=sample,
    )
