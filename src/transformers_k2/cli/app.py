"""The application that commands are added to, what several of them share, and `main`."""

from __future__ import annotations

import re

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="k2",
    help="Kimi K2 with Hugging Face tools: look into checkpoints, convert them, train and fine-tune.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _commands() -> None:
    """Keeps `k2 NAME` a command group even with a single command."""


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option, and not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}


def num_bytes(size: str) -> int:
    """512MB as a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"size is {size!r}: expected a number of bytes, as 512MB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def main() -> None:
    """Run the command line; an error that is the user's to mend is one line on stderr, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
