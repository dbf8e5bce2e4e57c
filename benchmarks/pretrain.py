"""The one-minute pre-training run with MuonClip, AdamW and less balancing, three seeds each, at equal steps.

    python benchmarks/pretrain.py                 # twelve runs, 18 minutes on two idle cores
    python benchmarks/pretrain.py --quick         # 40 steps, one seed: the command works, the figures mean nothing

All runs are the recipe `debug_pretrain` with the overrides printed; only `training.seed` (weights) differs between seeds.
Prints held-out losses against a bigram table counted on the same tokens, and how evenly the experts were loaded in the
last twentieth of the steps. The ratio of MuonClip's loss to AdamW's comes last, whatever it is.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from transformers_k2.training import RunSummary, train

ADAMW = (
    "optimizer={name: adamw, lr: 3e-3, betas: [0.9, 0.95], weight_decay: 0.1, eps: 1e-8}",
    "schedule.min_lr=1.5e-4",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "MuonClip": (),
    "AdamW": ADAMW,
    "MuonClip, no bias update": ("router.bias_update_speed=0",),
    "MuonClip, no balancing at all": ("router.bias_update_speed=0", "router.balance_loss=0"),
}


def run(name: str, seed: int, folder: Path, extra: list[str]) -> RunSummary:
    """One run of the recipe."""
    overrides = [
        *VARIANTS[name],
        f"training.seed={seed}",
        f"output_dir={folder / f'{name} {seed}'.replace(' ', '_').replace(',', '')}",
        f"data.cache_dir={folder / 'cache'}",
        "checkpoint.every=null",
        *extra,
    ]
    summary = train("debug_pretrain", overrides, Console(file=io.StringIO()))
    assert summary is not None
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="40 steps, one seed")
    arguments = parser.parse_args()
    extra = ["training.steps=40", "training.eval_every=40"] if arguments.quick else []
    seeds = range(1 if arguments.quick else arguments.seeds)
    console = Console()
    results: dict[str, list[RunSummary]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:  # variants in turn, so that a busy machine slows all alike
            for name in VARIANTS:
                summary = run(name, seed, Path(folder), extra)
                results[name].append(summary)
                console.print(
                    f"seed {seed}, {name}: held-out {summary.held_out_loss:.4f}, bigram {summary.bigram_loss:.4f}, "
                    f"{summary.training_seconds:.0f} s; {summary.expert_load}",
                    highlight=False,
                )
    table = Table(title=f"{len(seeds)} seeds: means, and the seeds one by one")
    for column in ("", "held-out loss", "of each seed", "bigram", "load max/mean", "dead experts"):
        table.add_column(column, justify="left" if not column else "right")
    for name, runs in results.items():
        loads = [summary.expert_load for summary in runs if summary.expert_load]
        table.add_row(
            name,
            f"{fmean(summary.held_out_loss for summary in runs):.3f}",
            ", ".join(f"{summary.held_out_loss:.3f}" for summary in runs),
            f"{fmean(summary.bigram_loss for summary in runs):.3f}",
            f"{fmean(load.max_over_mean for load in loads):.2f}",
            f"{max(load.num_dead for load in loads)} of {loads[0].num_experts}",
        )
    console.print(table)
    means = {name: fmean(summary.held_out_loss for summary in runs) for name, runs in results.items()}
    console.print(
        f"held-out loss, MuonClip / AdamW: {means['MuonClip'] / means['AdamW']:.4f}", highlight=False
    )


if __name__ == "__main__":
    main()
