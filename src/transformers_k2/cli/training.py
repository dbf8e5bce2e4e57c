"""Commands about training: each calls one public function and prints what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app, is_given


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
    from ..parallel.plan_report import plot_sweep, render, render_sweep
    from ..parallel.plan_search import plan_nodes

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
        from ..training.plan import plan_recipe
        from ..training.recipe import load_recipe

        used = {"config", "recipe", "nodes", "gpus_per_node", "sweep", "plot", "as_json", *machine}
        given = [name for name in context.params if is_given(context, name) and name not in used]
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
    from ..training import train

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
