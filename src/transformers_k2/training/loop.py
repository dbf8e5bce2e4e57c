"""`train`: one recipe from text to a model that has been saved, loaded again and made to write.

transformers' Trainer does the stepping; prepare.py builds what it takes, this file puts the parts together in order and
checks what comes out, on one process or many. What it gives up: a model split over processes is compared with its saved
copy by the loss, not bit by bit.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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

from . import machine
from .callbacks import Metrics
from .data import load_tokenizer, prepare_data
from .int4_report import NUMBERS, PICTURE, plot_int4
from .output import CHECKPOINTS, check_output, staged
from .prepare import build_config
from .recipe import Recipe, differences, load_recipe
from .report import RunSummary, plot_losses, summarise
from .run import Run

STOPPED = 143  # the exit status of a process that SIGTERM ended, as the shell has it


def train(
    name: str | Path, overrides: Iterable[str] = (), console: Console | None = None
) -> RunSummary | None:
    """Run a recipe: prepare the text, train, save, reload, generate; print a summary and return it (on rank 0).

    Every process of a launcher calls it. An unfinished run of the same recipe is continued at its newest checkpoint.

    Args:
        name: the recipe: a path, or the name of a file in training_recipes/.
        overrides: "dotted.key=value" changes to it.
        console: where to print. Default: standard output.

    Raises:
        ValueError: the recipe, the text, the processes or the output folder do not allow the run; told before work is
            wasted.
        NonFiniteLossError: training diverged. Nothing that was on the disk has changed.
        SystemExit: the process was told to stop (status 143); what was trained is in a checkpoint.
    """
    started = time.perf_counter()
    recipe = load_recipe(name, overrides)
    _check_machine(recipe)
    layout = recipe.layout(machine.join())
    console = console or Console()
    console.quiet = console.quiet or machine.rank() != 0
    config = build_config(recipe)
    layout.check(config, machine.world_size())
    target = check_output(recipe.output_dir, recipe.overwrite)
    tokenizer = load_tokenizer(recipe, config)

    def changed(text: str) -> list[str]:
        return differences(text, recipe)

    with (
        _threads(recipe.training.cpu_threads),
        staged(target, recipe.to_yaml(), recipe.checkpoint.resume, changed) as folder,
        machine.StopSignal().listening() as signal,
    ):
        with _progress(console) as progress:
            data = prepare_data(recipe, tokenizer, folder, progress)
            run = Run(recipe, config, data, layout, folder, progress, signal)
            context = run.measure_context()
            losses = run.measure_int4()
            run.train(console)
        if run.saver.stopped_at is not None:
            console.print(
                f"[bold]{signal.received or 'A signal'}[/bold]: saved step {run.saver.stopped_at} of "
                f"{recipe.training.steps} in {folder / CHECKPOINTS}; the same command continues there."
            )
            raise SystemExit(STOPPED)
        if context is not None:
            context.measure_after(run.model, run.trainer)
        if losses is not None:
            losses.measure_after()
        run.save()
        with console.status("The reloaded model writes"):
            sample, reloaded, agreement = run.reload_and_generate()
        summary = None
        if machine.rank() == 0:
            outcome = None if losses is None else losses.outcome(folder, agreement)
            summary = summarise(
                recipe, Path(name).stem, data, run.parameters, run.metrics, run.clips, run.loads, context, sample,
                reloaded, layout, outcome, run.quantised_base(), time.perf_counter() - started,
            )  # fmt: skip
            _draw(recipe, folder, run.metrics, summary)
            summary.save(folder / "summary.json")
    if summary is not None:
        console.print(summary)
    return summary


def _check_machine(recipe: Recipe) -> None:
    needed = ["accelerate", "matplotlib"]
    needed += ["peft"] if recipe.adapter is not None else []
    needed += ["bitsandbytes"] if getattr(recipe.quantization, "method", None) == "nf4" else []
    needed += list(recipe.logging.trackers)
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"This recipe needs {' and '.join(missing)}: pip install 'transformers_k2[train,quant]' {' '.join(missing)}."
        )
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_fsdp != (recipe.parallel.engine == "accelerate"):
        raise ValueError(
            f"parallel.engine is {recipe.parallel.engine!r}, but the launcher {'sets' if wants_fsdp else 'does not set'} "
            "ACCELERATE_USE_FSDP: expected engine accelerate with an FSDP file of Accelerate's, engine transformers without."
        )


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


def _draw(recipe: Recipe, folder: Path, metrics: Metrics, summary: RunSummary) -> None:
    counted = {"bigram table": summary.bigram_loss, "token frequencies": summary.unigram_loss}
    title = f"{summary.model} on {summary.source}: {summary.training_seconds:.0f} s of training"
    plot_losses(
        folder / "loss.png", metrics.training, metrics.held_out, recipe.tokens_per_step, counted, title
    )
    if summary.int4 is not None:
        summary.int4.save(folder / NUMBERS)
        name = f"INT4 training of {summary.model}"
        plot_int4(folder / PICTURE, summary.int4, metrics.held_out, name)
