"""Commands that make checkpoints smaller or larger: each calls one public function and prints what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, num_bytes
from .checkpoints import Destination, DryRun, Memory, Overwrite, Quiet, ShardBytes

Source = Annotated[Path, typer.Argument(help="A checkpoint of any layout.")]
To = Annotated[str | None, typer.Option(help="Another layout. Default: that of SRC, its codec and dtypes.")]
Config = Annotated[
    str | None, typer.Option(help="config.json or a name in configs/, if there is none beside the weights.")
]
PerToken = Annotated[
    int | None, typer.Option("--experts-per-token", help="Experts that a token is sent to in the new model.")
]


@app.command("slice", no_args_is_help=True)
def slice_command(
    src: Source,
    dst: Destination,
    layers: Annotated[
        str | None, typer.Option(help="The first so many (4), or a list (0,1,30,60). Default: all.")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help="Of each layer the first so many (16), a list (0,5,7), or a JSON file: layer -> list. Default: all."
        ),
    ] = None,
    experts_per_token: PerToken = None,
    to: To = None,
    config: Config = None,
    shard_bytes: ShardBytes = 5 * 10**9,
    memory: Memory = "512MB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Cut some layers and experts out of a checkpoint: a small one of the shape of a huge one.

    Routers keep the rows and biases of their experts; config.json says the new sizes. Only what is kept is read.

    Examples:

      k2 slice Kimi-K2-Thinking tiny-k2 --layers 3 --experts 16

      k2 slice Kimi-K2-Instruct one-layer --layers 0,30 --to hub_bf16
    """
    from ..conversion import slice_model

    summary = slice_model(
        src,
        dst,
        layers=_numbers(layers, "layers"),
        experts=_json(Path(experts))
        if experts and experts.endswith(".json")
        else _numbers(experts, "experts"),
        num_experts_per_tok=experts_per_token,
        to=to,
        config=config,
        shard_bytes=shard_bytes,
        memory=num_bytes(memory),
        dry_run=dry_run,
        overwrite=overwrite,
        quiet=quiet,
    )
    typer.echo(summary.text(dst, dry_run))


@app.command("prune", no_args_is_help=True)
def prune_command(
    src: Source,
    dst: Destination,
    keep: Annotated[int, typer.Option(help="Experts that each layer keeps.")],
    load: Annotated[
        Path | None,
        typer.Option(help="Tokens by expert: an expert_load.jsonl of training, or JSON: layer -> numbers."),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="load: the busiest stay; norm: those with the longest router rows. Default: load if given."
        ),
    ] = None,
    experts_per_token: PerToken = None,
    to: To = None,
    config: Config = None,
    shard_bytes: ShardBytes = 5 * 10**9,
    memory: Memory = "512MB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Drop the experts that matter least in each layer; nothing makes up for them.

    Examples:

      k2 prune Kimi-K2-Instruct k2-256 --keep 256 --load runs/probe/expert_load.jsonl

      k2 prune Kimi-K2-Instruct k2-192 --keep 192 --rule norm --dry-run
    """
    from ..conversion import drop_experts

    summary = drop_experts(
        src,
        dst,
        keep=keep,
        load=load,
        rule=rule,
        num_experts_per_tok=experts_per_token,
        to=to,
        config=config,
        shard_bytes=shard_bytes,
        memory=num_bytes(memory),
        dry_run=dry_run,
        overwrite=overwrite,
        quiet=quiet,
    )
    typer.echo(summary.text(dst, dry_run))


@app.command("upcycle", no_args_is_help=True)
def upcycle_command(
    src: Source,
    dst: Destination,
    experts: Annotated[int, typer.Option(help="Experts that each layer gets.")],
    experts_per_token: PerToken = None,
    load: Annotated[
        Path | None,
        typer.Option(
            help="Of a mixture: the busiest experts are copied (expert_load.jsonl, or JSON: layer -> numbers)."
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Of a mixture: noise on the copies' router rows, in units of the row's rms. Default: 0.01."
        ),
    ] = None,
    granularity: Annotated[
        int | None, typer.Option(help="Of a dense model: slices that its MLPs are cut into. Default: 1.")
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(help="Of a dense model: what the shared expert is, zero or dense. Default: zero."),
    ] = None,
    first_dense: Annotated[
        int | None, typer.Option(help="Of a dense model: layers at the start that stay dense. Default: 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    to: To = None,
    config: Config = None,
    shard_bytes: ShardBytes = 5 * 10**9,
    memory: Memory = "512MB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Give a mixture more experts, as 256 to 384, or a dense model its first ones, to train on from there.

    What the new model computes at first, and by which rules experts are copied or cut: transformers_k2.conversion.upcycle.

    Examples:

      k2 upcycle DeepSeek-V3 v3-384 --experts 384

      k2 upcycle dense moe --experts 64 --experts-per-token 8 --granularity 8
    """
    from ..conversion import upcycle

    summary = upcycle(
        src,
        dst,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        load=load,
        noise=noise,
        granularity=granularity,
        shared=shared,
        first_k_dense_replace=first_dense,
        seed=seed,
        to=to,
        config=config,
        shard_bytes=shard_bytes,
        memory=num_bytes(memory),
        dry_run=dry_run,
        overwrite=overwrite,
        quiet=quiet,
    )
    typer.echo(summary.text(dst, dry_run))


def _numbers(text: str | None, name: str) -> int | list[int] | None:
    """4, or 0,1,5 as a list."""
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}: expected a number, as 4, or a list, as 0,1,5.") from None
    return found if "," in text else found[0]


def _json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a JSON file.")
    return json.loads(path.read_text(encoding="utf-8"))
