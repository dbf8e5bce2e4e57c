"""`train`: one recipe from text to a model that has been saved, loaded again and made to write.

transformers' Trainer does the stepping; prepare.py builds what it takes, this file checks what it gives. What it gives
up: several processes. A run under torchrun is refused rather than trained wrongly.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..files import write_text
from .baselines import unigram_and_bigram_loss
from .callbacks import Metrics, NonFiniteLossError, ProgressBar
from .muon_clip_monitor import MuonClipMonitor
from .optimizers import MuonClip
from .output import KEPT, MARKER, check_output, staged
from .prepare import Data, build_config, build_model, build_trainer, load_tokenizer, prepare_data
from .recipe import Recipe, load_recipe
from .report import RunSummary, plot_losses
from .sources import Source, describe


def train(name: str | Path, overrides: Iterable[str] = (), console: Console | None = None) -> RunSummary:
    """Run a recipe: prepare the text, train, save, reload, generate; print a summary and return it.

    Args:
        name: the recipe: a path, or the name of a file in training_recipes/.
        overrides: "dotted.key=value" changes to it.
        console: where to print. Default: standard output.

    Raises:
        ValueError: the recipe, the text or the output folder does not allow the run; told before work is wasted.
        NonFiniteLossError: training diverged. Nothing that was on the disk has changed.
    """
    started = time.perf_counter()
    console = console or Console()
    recipe = load_recipe(name, overrides)
    _check_machine()
    config = build_config(recipe)
    source = Source(recipe.data.source, recipe.data.text_field, recipe.data.max_bytes)
    target = check_output(recipe.output_dir, recipe.overwrite)
    tokenizer = load_tokenizer(recipe, config)

    with _threads(recipe.training.cpu_threads), staged(target) as folder:
        with _progress(console) as progress:
            data = prepare_data(recipe, source, tokenizer, progress)
            model = build_model(recipe, config, data.tokenizer)
            metrics = Metrics(folder / KEPT, recipe.tokens_per_step)
            monitor = _monitor(recipe, folder)
            callbacks = [*filter(None, [monitor]), metrics, ProgressBar(progress, metrics)]
            trainer = build_trainer(recipe, model, data, folder, callbacks)
            try:
                trainer.train()
            except FloatingPointError as error:  # MuonClip looks at logits before there is a loss to look at
                raise NonFiniteLossError(
                    f"Training stopped at step {trainer.state.global_step + 1}: {error} Try a lower optimizer.lr or a "
                    f"longer schedule.warmup; the metrics are in {metrics.path}."
                ) from None
        _save(recipe, model, data.tokenizer, folder)
        with console.status("The reloaded model writes"):
            sample = reload_and_generate(recipe, model, data, folder)
        seconds = time.perf_counter() - started
        summary = _summarise(recipe, Path(name).stem, data, model, metrics, monitor, sample, seconds)
        counted = {"bigram table": summary.bigram_loss, "token frequencies": summary.unigram_loss}
        title = f"{summary.model} on {summary.source}: {summary.training_seconds:.0f} s of training"
        plot_losses(
            folder / "loss.png", metrics.training, metrics.held_out, recipe.tokens_per_step, counted, title
        )
        summary.save(folder / "summary.json")
    console.print(summary)
    return summary


def reload_and_generate(recipe: Recipe, model: PreTrainedModel, data: Data, folder: Path) -> str:
    """Load what was saved through the Auto classes, compare its logits with the model's, and sample from it.

    Raises:
        RuntimeError: the reloaded model computes something else.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=model.device)
    ids = data.held_out[0]["input_ids"].unsqueeze(0).to(model.device)
    with torch.no_grad():
        expected, got = (candidate.eval()(input_ids=ids).logits for candidate in (model, reloaded))
    if not torch.equal(expected, got):
        raise RuntimeError(
            f"The model loaded from {folder} differs from the one that was saved, by up to "
            f"{(expected - got).abs().max():.3g} in the logits."
        )
    settings = recipe.generation
    sampling = {"temperature": settings.temperature} if settings.temperature else {}
    inputs = tokenizer(settings.prompt, return_tensors="pt").to(model.device)
    set_seed(recipe.training.seed)
    output = reloaded.generate(
        **inputs, max_new_tokens=settings.max_new_tokens, do_sample=bool(sampling), **sampling
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _check_machine() -> None:
    missing = [
        package for package in ("accelerate", "matplotlib") if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ValueError(f"k2 train needs {' and '.join(missing)}: pip install 'transformers_k2[train]'.")
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"WORLD_SIZE is {size}: k2 train runs in one process; start it without torchrun.")


def _monitor(recipe: Recipe, folder: Path) -> MuonClipMonitor | None:
    """For optimizers that clip."""
    optimizer = recipe.optimizer
    if not isinstance(optimizer, MuonClip) or optimizer.qk_clip_tau is None:
        return None
    return MuonClipMonitor(folder, title=f"MuonClip on {recipe.model.config}, tau {optimizer.qk_clip_tau:g}")


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """torch's number of CPU threads inside the block; None leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _save(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.config.use_cache = True  # Trainer turned it off for training
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / MARKER, recipe.to_yaml())


def _summarise(
    recipe: Recipe,
    name: str,
    data: Data,
    model: PreTrainedModel,
    metrics: Metrics,
    monitor: MuonClipMonitor | None,
    sample: str,
    total_seconds: float,
) -> RunSummary:
    config = model.config
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
        bits_per_byte=held_out_loss * tokens_per_byte / float(np.log(2)),
        unigram_loss=unigram,
        bigram_loss=bigram,
        prompt=recipe.generation.prompt,
        sample=sample,
        qk_clip=monitor.outcome() if monitor else None,
    )
