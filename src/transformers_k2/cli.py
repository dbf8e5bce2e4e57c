"""The `k2` command: argument parsing only; each command calls one public function and prints what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="k2",
    help="Kimi K2 with Hugging Face tools: look into checkpoints, train and fine-tune.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _commands() -> None:
    """Keeps `k2 NAME` a command group even with a single command."""


@app.command("inspect", no_args_is_help=True)
def inspect_command(
    target: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a .safetensors file, a config.json, or the name of a size in configs/, "
            "such as [bold]kimi_k2_instruct[/bold]."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for scripts.")] = False,
) -> None:
    """Sizes, layout and quantisation of a configuration or checkpoint, and what is wrong with it.

    Reads the headers of the files only, no weights: seconds for a terabyte. Exits with 1 if it finds an error.

    Examples:

      k2 inspect kimi_k2_instruct

      k2 inspect runs/debug_pretrain --json
    """
    from .conversion import inspect, render

    report = inspect(target)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(render(report))
    if any(problem.severity == "error" for problem in report.problems):
        raise typer.Exit(1)


@app.command("train", no_args_is_help=True)
def train_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe file, or the name of one in training_recipes/, such as debug_pretrain."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Change single keys of the recipe: training.steps=50 data.source=my_texts/ overwrite=true.",
        ),
    ] = None,
) -> None:
    """Train a model as a recipe says, save it, load it again and let it write something.

    A recipe is one complete YAML file; the schema is in training_recipes/README.md. The resolved recipe, the metrics, a
    plot of the losses and the model land in the recipe's output_dir.

    Examples:

      k2 train training_recipes/debug_pretrain.yaml

      k2 train debug_pretrain data.source=notes.jsonl training.steps=200 output_dir=runs/notes
    """
    from .training import train

    train(recipe, overrides or [])


def main() -> None:
    """Run the command line; an error that is the user's to mend is one line on stderr, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
