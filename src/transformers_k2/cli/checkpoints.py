"""Commands about checkpoints: each calls one public function and prints what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app, num_bytes

Destination = Annotated[Path, typer.Argument(help="A new folder.")]
ShardBytes = Annotated[int, typer.Option(help="Bytes of a file; larger weights get one of their own.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and tell the sizes; write nothing.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what DST holds, or drop an unfinished run of another kind."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


Memory = Annotated[
    str, typer.Option(help="What the work may take beside Python itself: 512MB, 2GB.", metavar="SIZE")
]


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
    from ..conversion import inspect, render

    report = inspect(target)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(render(report))
    if any(problem.severity == "error" for problem in report.problems):
        raise typer.Exit(1)


@app.command("convert", no_args_is_help=True)
def convert_command(
    src: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a .safetensors file with its config.json beside it, or the id of a hub repository."
        ),
    ],
    dst: Destination,
    to: Annotated[
        str,
        typer.Option(
            help="A layout: hub_bf16, hub_fp8, hub_int4, hub_ep, hub_tp, k25_int4, transformers_fused, deepseek_inference, "
            "megatron, torchtitan, mlx, or the path of a table; of a LoRA folder: peft or serving."
        ),
    ],
    codec: Annotated[
        str | None,
        typer.Option(help="bf16, fp8, int4 or affine. Default: the source's if the layout holds it."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32, of what is not quantised. Default: as it is."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale, for INT4.")] = 32,
    convention: Annotated[
        str, typer.Option(help="Of INT4: kimi (amax / 7, as K2's own) or compressed_tensors (amax / 7.5).")
    ] = "kimi",
    recover: Annotated[
        bool,
        typer.Option(
            "--recover", help="Weights were dequantised: find their codes and scales, or fail; round nothing."
        ),
    ] = False,
    layout: Annotated[str | None, typer.Option(help="Layout of SRC, if its names should not decide.")] = None,
    config: Annotated[
        str | None, typer.Option(help="config.json or a name in configs/, if SRC has none.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Model-parallel ranks, for layouts with a file for each.")] = 1,
    container: Annotated[
        str,
        typer.Option(
            help="safetensors, or dcp: a folder that torch.distributed.checkpoint loads (bf16 layouts)."
        ),
    ] = "safetensors",
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")] = None,
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source",
            help="Of a hub id: delete each shard when everything made of it is on the disk.",
        ),
    ] = False,
    shard_bytes: ShardBytes = 5 * 10**9,
    memory: Memory = "512MB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in another layout; that of SRC is recognised by its names.

    Streams: a terabyte needs no more memory than a gigabyte, and no GPU. All is checked before the first byte is
    written; repeated after an interruption, it goes on. Under `accelerate launch` each process writes some of the files.

    Examples:

      k2 convert Kimi-K2-Instruct kimi-bf16 --to hub_bf16

      k2 convert Kimi-K2-Thinking kimi-mlx --to mlx --dry-run

      k2 convert DeepSeek-V3 v3-mp16 --to deepseek_inference --ranks 16

      k2 convert moonshotai/Kimi-K2-Instruct kimi-int4 --to hub_int4 --discard-source
    """
    if (Path(src) / "adapter_config.json").is_file():
        adapter_command(Path(src), dst, to, overwrite)
        return
    from ..conversion import convert

    summary = convert(
        src,
        dst,
        to,
        codec=codec,
        dtype=dtype,
        group_size=group_size,
        convention=convention,
        recover=recover,
        layout=layout,
        config=config,
        num_ranks=ranks,
        container=container,
        shard_bytes=shard_bytes,
        memory=num_bytes(memory),
        dry_run=dry_run,
        overwrite=overwrite,
        quiet=quiet,
        revision=revision,
        discard_source=discard_source,
    )
    typer.echo(summary.text(dst, dry_run))


@app.command("verify", no_args_is_help=True)
def verify_command(
    a: Annotated[Path, typer.Argument(help="A checkpoint of any layout.")],
    b: Annotated[Path | None, typer.Argument(help="Another, of any layout, to be compared with it.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A LoRA that was merged into B to give A: is A that sum?")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="config.json or a name in configs/, if there is none beside the weights."),
    ] = None,
    memory: Memory = "512MB",
    quiet: Quiet = False,
) -> None:
    """Read every number of a checkpoint, or compare two of any layouts; exit code 1 if something is wrong.

    One: complete and in shape by its config.json, finite, and with the checksums that its conversion left. Two: the same
    weights, tensor by tensor; where one is of a coarser form, whether it is the other, rounded.

    Examples:

      k2 verify kimi-bf16

      k2 verify Kimi-K2-Instruct kimi-bf16

      k2 verify merged base --adapter runs/lora/adapter
    """
    from ..conversion import verify

    verdict = verify(a, b, adapter=adapter, config=config, memory=num_bytes(memory), quiet=quiet)
    for line in verdict.lines():
        typer.echo(line)
    if not verdict.ok:
        raise typer.Exit(1)


@app.command("quantize", no_args_is_help=True)
def quantize_command(
    src: Annotated[Path, typer.Argument(help="A checkpoint folder in bf16, fp32 or FP8.")],
    dst: Destination,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 32,
    convention: Annotated[
        str, typer.Option(help="kimi: scales of amax / 7, as K2's own; or compressed_tensors: amax / 7.5.")
    ] = "kimi",
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="A regular expression for whole module names; repeatable. Default: the routed experts."
        ),
    ] = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Weights were dequantised from INT4: find their codes, or fail, but round nothing.",
        ),
    ] = False,
    shard_bytes: ShardBytes = 5 * 10**9,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Pack the routed experts of a checkpoint into INT4, as K2-Thinking and K2.5 are published.

    Streams: a terabyte needs no more memory than a gigabyte. Repeated after an interruption, it goes on.

    Examples:

      k2 quantize runs/debug_pretrain runs/debug_int4

      k2 quantize kimi-k2-bf16 kimi-k2-int4 --recover --dry-run
    """
    from ..conversion import quantize
    from ..conversion.quantize import EXPERTS

    summary = quantize(
        src,
        dst,
        group_size=group_size,
        convention=convention,
        modules=modules or EXPERTS,
        recover=recover,
        shard_bytes=shard_bytes,
        dry_run=dry_run,
        overwrite=overwrite,
        quiet=quiet,
    )
    typer.echo(summary.text(dst, dry_run))


@app.command("merge", no_args_is_help=True)
def merge_command(
    src: Annotated[Path, typer.Argument(help="The checkpoint folder that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="A LoRA folder, as PEFT or `k2 adapter` writes it.")],
    dst: Destination,
    to: Annotated[
        str | None, typer.Option(help="bf16 or int4. Default: as the source, and bf16 from FP8.")
    ] = None,
    shard_bytes: ShardBytes = 5 * 10**9,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Merge a LoRA into a checkpoint, without building a model; what it does not touch is copied.

    Examples:

      k2 merge runs/base runs/lora/adapter runs/merged

      k2 merge kimi-k2-int4 runs/lora/adapter merged-bf16 --to bf16
    """
    from ..conversion import merge_adapter

    summary = merge_adapter(
        src, adapter, dst, to=to, shard_bytes=shard_bytes, dry_run=dry_run, overwrite=overwrite, quiet=quiet
    )
    typer.echo(summary.text(dst, dry_run))


@app.command("adapter", no_args_is_help=True)
def adapter_command(
    src: Annotated[Path, typer.Argument(help="A LoRA folder.")],
    dst: Destination,
    form: Annotated[
        str,
        typer.Option(
            help="serving: a pair for each expert and projection; peft: one for each fused parameter."
        ),
    ] = "serving",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in DST.")] = False,
) -> None:
    """Write a LoRA in the per-expert form that serving engines read, or in PEFT's own.

    Examples:

      k2 adapter runs/lora/adapter runs/lora/serving

      k2 adapter runs/lora/serving runs/lora/back --form peft
    """
    from ..conversion import export_adapter

    config = export_adapter(src, dst, form, overwrite)
    typer.echo(f"{dst}: {form} form, rank {config['r']}, alpha {config['lora_alpha']}")
    if form == "serving" and config["alpha_pattern"]:
        typer.echo(
            "Modules differ in scaling: PEFT follows the alpha_pattern, but an engine that knows one alpha does not; "
            "`k2 merge` does.",
            err=True,
        )
