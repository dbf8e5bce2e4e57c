"""The `k2` command: argument parsing only; each command calls one public function and prints what it returns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

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


@app.command("plan", no_args_is_help=True)
def plan_command(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            help="A config.json, a folder with one, or the name of a size in configs/, such as kimi_k2_instruct."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Plan this recipe, a file or a name in training_recipes/, for CONFIG if that is given too."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 32,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a machine.")] = 8,
    pipeline: Annotated[
        int | None, typer.Option(help="Stages. Without a layout, the best is searched.")
    ] = None,
    shard: Annotated[int | None, typer.Option(help="Ranks that FSDP2 cuts every weight into.")] = None,
    expert: Annotated[int | None, typer.Option(help="Ranks that experts are dealt out over.")] = None,
    replicate: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences per rank and pass.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Sequences per step, over all ranks.")] = 16384,
    micro_batches_per_run: Annotated[
        int | None,
        typer.Option(help="Micro-batches that go through the pipeline at a time; default: all of a step."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32.")] = "bfloat16",
    optimizer: Annotated[str, typer.Option(help="muon_clip or adamw.")] = "muon_clip",
    state_dtype: Annotated[str, typer.Option(help="Of MuonClip's momenta: float32 or bfloat16.")] = "float32",
    master_weights: Annotated[bool, typer.Option(help="MuonClip keeps float32 copies.")] = False,
    recompute: Annotated[
        str, typer.Option(help="Comma-separated: norms, swiglu, mla_up, moe_down, or full.")
    ] = "",
    loss_chunk_tokens: Annotated[
        int, typer.Option(help="Tokens whose logits exist at a time; 0 for all.")
    ] = 1024,
    offload_optimizer: Annotated[bool, typer.Option(help="Optimizer state in the host's memory.")] = False,
    offload_activations: Annotated[bool, typer.Option(help="Activations in the host's memory.")] = False,
    imbalance: Annotated[float, typer.Option(help="Rows of the fullest rank's experts, against even.")] = 1.0,
    gpu_memory: Annotated[float, typer.Option(help="GiB of a GPU.")] = 80.0,
    intra_node_gbps: Annotated[float, typer.Option(help="GB/s a GPU sends within its node.")] = 200.0,
    inter_node_gbps: Annotated[float, typer.Option(help="GB/s a GPU sends to other nodes.")] = 50.0,
    sweep: Annotated[bool, typer.Option("--sweep", help="Compare 32, 64, 128 and 256 nodes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as JSON, for scripts.")] = False,
) -> None:
    """Memory per GPU and bytes on the wire of a training run, before anything is bought.

    The model is laid out as training would, over ranks that do not exist; seconds for a terabyte. Exits with 1 if it does
    not fit.

    Examples:

      k2 plan kimi_k2_instruct --nodes 64 --recompute norms,swiglu,mla_up

      k2 plan kimi_k2_instruct --nodes 32 --pipeline 16 --shard 16 --expert 16 --recompute full

      k2 plan kimi_k2_instruct --sweep --plot sweep.png --recompute full

      k2 plan --recipe k2_pretrain --nodes 128

      k2 plan moonlight_16b_a3b_instruct --nodes 1 --recipe my_recipe.yaml
    """
    from .parallel.plan_report import plot_sweep, render, render_sweep
    from .parallel.plan_search import plan_nodes

    if config is None and recipe is None:
        raise ValueError(
            "k2 plan needs a CONFIG, a --recipe or both: k2 plan kimi_k2_instruct --nodes 128 --recipe k2_pretrain."
        )
    numbers = (32, 64, 128, 256) if sweep else (nodes,)
    machine = {
        "imbalance": imbalance,
        "gpu_memory": gpu_memory,
        "intra_node_gbps": intra_node_gbps,
        "inter_node_gbps": inter_node_gbps,
    }
    sizes = {"pipeline": pipeline, "shard": shard, "expert": expert, "replicate": replicate}
    if recipe is not None:
        from .training.plan import plan_recipe
        from .training.recipe import load_recipe

        used = {"config", "recipe", "nodes", "gpus_per_node", "sweep", "plot", "as_json", *machine}
        given = [name for name in context.params if _is_given(context, name) and name not in used]
        if given:
            raise ValueError(
                f"{', '.join(given)} is the recipe's to say: expected no such option with --recipe."
            )
        loaded = load_recipe(recipe)
        found = {
            number: [plan_recipe(loaded, number, gpus_per_node, config, **machine)] for number in numbers
        }
    else:
        assert config is not None
        found = plan_nodes(
            config,
            numbers,
            {name: size for name, size in sizes.items() if size is not None},
            gpus_per_node=gpus_per_node,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            batch_size=batch_size,
            micro_batches_per_run=micro_batches_per_run,
            dtype=dtype,
            optimizer=optimizer,
            state_dtype=state_dtype,
            master_weights=master_weights,
            recompute=tuple(filter(None, recompute.split(","))),
            loss_chunk_tokens=loss_chunk_tokens or None,
            offload_optimizer=offload_optimizer,
            offload_activations=offload_activations,
            **machine,
        )
    if as_json:
        typer.echo(json.dumps({n: [one.to_dict() for one in plans] for n, plans in found.items()}, indent=2))
    else:
        Console().print(render_sweep(found) if sweep else render(found[nodes]))
    if plot is not None:
        plot_sweep(found, plot)
    if not all(plans[0].fits for plans in found.values()):
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


@app.command("convert", no_args_is_help=True)
def convert_command(
    src: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, or a .safetensors file with its config.json beside it."),
    ],
    dst: Destination,
    to: Annotated[
        str,
        typer.Option(
            help="A layout: hub_bf16, hub_fp8, hub_int4, k25_int4, transformers_fused, deepseek_inference, megatron, "
            "torchtitan, mlx; the files in conversion/."
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
    """
    from .conversion import convert

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
        shard_bytes=shard_bytes,
        memory=_num_bytes(memory),
        dry_run=dry_run,
        overwrite=overwrite,
        quiet=quiet,
    )
    typer.echo(summary.text(dst, dry_run))


@app.command("verify", no_args_is_help=True)
def verify_command(
    a: Annotated[Path, typer.Argument(help="A checkpoint of any layout.")],
    b: Annotated[Path | None, typer.Argument(help="Another, of any layout, to be compared with it.")] = None,
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
    """
    from .conversion import verify

    verdict = verify(a, b, config=config, memory=_num_bytes(memory), quiet=quiet)
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
    from .conversion import quantize
    from .conversion.quantize import EXPERTS

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
    from .conversion import merge_adapter

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
    from .conversion import export_adapter

    config = export_adapter(src, dst, form, overwrite)
    typer.echo(f"{dst}: {form} form, rank {config['r']}, alpha {config['lora_alpha']}")
    if form == "serving" and config["alpha_pattern"]:
        typer.echo(
            "Modules differ in scaling: PEFT follows the alpha_pattern, but an engine that knows one alpha does not; "
            "`k2 merge` does.",
            err=True,
        )


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


def _num_bytes(size: str) -> int:
    """512MB as a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"size is {size!r}: expected a number of bytes, as 512MB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def main() -> None:
    """Run the command line; an error that is the user's to mend is one line on stderr, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
