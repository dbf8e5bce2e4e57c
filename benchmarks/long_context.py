"""What a short stage on longer texts buys, with YaRN and without: the losses of debug_long_context, measured from its files.

debug_pretrain has seen 128 tokens at a time. Its loss is measured at 1, 4 and 8 times that length, before and after the
200 steps at 4 times that debug_long_context adds, with plain rotary positions and with YaRN (factor 8, arXiv 2309.00071).
The models are loaded anew by transformers, each with the scaling in its configuration, and read the same held-out tokens
at every length, so a longer context should lower the loss. Printed: a table, and the gain at 8 times the length last.

What it gives up: a model of 1.5 M parameters has little use for a far context; what shows is whether it breaks there.
Part of the gain is that of more training, which the first row shows.
Runs that are not in --folder are trained first: three to four minutes of one idle core.

    python benchmarks/long_context.py [--folder runs]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from transformers_k2.training import Recipe, load_recipe, prepare_data, train

BEFORE, AFTER = "debug_pretrain", "debug_long_context"


def prepare(folder: Path) -> None:
    """Train what is not there."""
    for name, weights in ((BEFORE, []), (AFTER, [f"model.weights={folder / BEFORE}"])):
        if not (folder / name / "summary.json").is_file():
            train(name, [f"output_dir={folder / name}", f"data.cache_dir={folder / 'cache'}", *weights])


def held_out_tokens(recipe: Recipe, folder: Path) -> torch.Tensor:
    """All held-out documents, one after the other: int64 [tokens], a multiple of the longest row."""
    assert recipe.context is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Progress(disable=True) as progress:
        data = prepare_data(recipe, tokenizer, folder, progress)
    (cache,), (numbers,) = data.caches, data.held_out_documents
    parts = [torch.from_numpy(cache.tokens(number).astype("int64")) for number in numbers.tolist()]
    ids = torch.cat(parts)
    return ids[: len(ids) // max(recipe.context.eval_lengths) * max(recipe.context.eval_lengths)]


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor, length: int) -> float:
    """The mean over all tokens of rows of this length but the first of each."""
    rows = ids.view(-1, length).split(max(4096 // length, 1))
    return (
        sum(len(part) * float(model(input_ids=part, labels=part).loss) for part in rows) * length / len(ids)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of the runs (runs)")
    options = parser.parse_args()
    prepare(options.folder)
    recipe = load_recipe(options.folder / AFTER / "recipe.yaml")
    assert recipe.context is not None
    ids = held_out_tokens(recipe, options.folder / AFTER)
    lengths, trained = recipe.context.eval_lengths, recipe.data.sequence_length
    losses: dict[tuple[str, bool], list[float]] = {}
    for name in (BEFORE, AFTER):
        for yarn in (False, True):
            config: Any = AutoConfig.from_pretrained(options.folder / name)
            config.rope_scaling = recipe.context.final_rope_scaling if yarn else None
            config.max_position_embeddings = recipe.context.max_position_embeddings
            config.standardize_rope_params()
            model = AutoModelForCausalLM.from_pretrained(options.folder / name, config=config).eval()
            losses[name, yarn] = [loss(model, ids, length) for length in lengths]
    table = Table(title=f"Loss on {len(ids):,} held-out tokens, nats per token")
    table.add_column("length")
    for name, yarn in losses:
        table.add_column(
            f"{'after' if name == AFTER else 'before'}, {'YaRN' if yarn else 'plain'}", justify="right"
        )
    for place, length in enumerate(lengths):
        values = [f"{by_length[place]:.3f}" for by_length in losses.values()]
        table.add_row(f"{length:,} ({length // trained}x)", *values)
    console = Console()
    console.print(table)
    gain = losses[BEFORE, False][-1] - losses[AFTER, True][-1]
    console.print(
        f"at {lengths[-1] // trained}x the trained length: {gain:.3f} nats per token less", highlight=False
    )


if __name__ == "__main__":
    main()
