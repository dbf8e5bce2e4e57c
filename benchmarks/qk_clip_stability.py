"""Does QK-Clip cap attention logits, and at what cost? Muon, MuonClip and AdamW train one small model on the same batches.

The Kimi K2 report (arXiv 2507.20534, section 2.1) says that clipping keeps logits bounded and leaves the loss alone.
Here a dense MLA model of 0.7 M parameters reads bytes of the Python standard library, at a Muon learning rate high enough
that logits pass tau without the clip; per seed, every optimizer gets the same initial weights and the same batches.
Printed: a table, then the findings, computed from it; curves go to --output and all numbers to the .json beside it.

What it gives up: 300 steps of a toy, at a constant rate (after 20 steps of warmup) that is too high for Muon to do well
and was chosen roughly for AdamW, show what the clip does, not which optimizer trains better. Each step measures before
it clips, so tau is overshot by what one update and another batch add, more at higher rates. A logit above tau is exact;
below it the largest log-sum-exp may stand in its place, an upper bound by at most log(128) = 4.9, marked <= in the table.
Seven minutes of one free core.

    python benchmarks/qk_clip_stability.py [--seeds 3] [--steps 300] [--tau 30] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.optim import MuonClip, find_attention
from transformers_k2.optim.observe import LogitObserver
from transformers_k2.training.sources import Source

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODEL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 416, "num_hidden_layers": 3, "first_k_dense_replace": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "rope_scaling": None, "max_position_embeddings": 128,
    "initializer_range": 0.08, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
BATCH, LENGTH = 4, 128
HELD_OUT = 16  # every 16th file; and as many batches of windows of them
WARMUP, EMA, MAX_NORM = 20, 0.95, 1.0
WEIGHT_DECAY, BETAS = 0.1, (0.9, 0.95)  # of all optimizers
LAST, MARGIN = 100, 1.01  # the steps that count as late; a head is under tau again at tau times this
COLORS = ("#D55E00", "#0072B2", "#009E73", "#8A8A8A")  # told apart by colour-blind readers too


@dataclass(frozen=True)
class Arm:
    """One row of the table. Without a tau the logits are only watched."""

    name: str
    lr: float
    muon: bool
    tau: float | None = None

    @property
    def label(self) -> str:
        return f"{self.name}, lr {self.lr:g}"


@dataclass
class Run:
    """One arm with one seed; a list has one entry per step."""

    seed: int
    loss: list[float] = field(default_factory=list)
    ema: list[float] = field(default_factory=list)
    max_logit: list[float] = field(default_factory=list)  # of all heads, before the clip
    exact: list[bool] = field(default_factory=list)
    num_clipped: list[int] = field(default_factory=list)  # heads
    clipped: list[str] = field(default_factory=list)  # "layer.head", clipped at least once
    held_out_loss: float = math.nan
    seconds: float = 0.0


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    arms = (
        Arm("Muon", options.lr, muon=True),
        Arm("MuonClip", options.lr, muon=True, tau=options.tau),
        Arm("AdamW", options.adamw_lr, muon=False),
        Arm("AdamW", options.lr, muon=False),
    )
    train, held_out = _text()
    num_params = sum(parameter.numel() for parameter in KimiK2ForCausalLM(KimiK2Config(**MODEL)).parameters())
    print(
        f"{num_params / 1e6:.2f} M parameters, {options.seeds} seeds, {options.steps} steps of {BATCH} x {LENGTH} bytes of "
        f"{len(train) / 1e6:.1f} MB, tau {options.tau:g}, {options.threads} threads"
    )
    runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    columns = (
        TextColumn("{task.description:24}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(arms) * options.seeds * options.steps, note="")
        for seed in range(options.seeds):
            for arm in arms:
                progress.update(task, description=f"{arm.label}, seed {seed}")
                tick = partial(progress.update, task, advance=1)
                runs[arm].append(train_one(arm, seed, options.steps, options.tau, train, held_out, tick))

    rows = [summary(arm, runs[arm], options.tau) for arm in arms]
    found = findings(runs, rows, options.tau)
    plot(runs, options.tau, num_params, options.output)
    record = {
        "settings": {
            "model": MODEL, "num_params": num_params, "batch": BATCH, "length": LENGTH, "warmup": WARMUP, "ema": EMA,
            "max_norm": MAX_NORM, "weight_decay": WEIGHT_DECAY, "betas": BETAS, "steps": options.steps,
            "seeds": options.seeds, "tau": options.tau, "torch": torch.__version__, "threads": options.threads,
        },
        "rows": rows,
        "findings": found,
        "runs": [{**asdict(arm), "runs": [asdict(run) for run in runs[arm]]} for arm in arms],
    }  # fmt: skip
    data = options.output.with_suffix(".json")
    data.write_text(json.dumps(record) + "\n")
    minutes = sum(run.seconds for some in runs.values() for run in some) / 60
    print(*table(rows), f"{minutes:.1f} minutes; curves: {options.output}, numbers: {data}", *found, sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="runs of each optimizer; default %(default)s")
    add("--steps", type=int, default=300, help="default %(default)s")
    add("--lr", type=float, default=4e-2, help="of Muon and MuonClip; default %(default)s")
    add("--adamw-lr", type=float, default=3e-3, help="AdamW's own; it runs at --lr too; default %(default)s")
    add("--tau", type=float, default=30.0, help="MuonClip's threshold (K2: 100); default %(default)s")
    add(
        "--threads",
        type=int,
        default=1,
        help="default %(default)s: the matrices are small",
    )
    add("--output", type=Path, default=Path("runs/qk_clip_stability.png"), help="default %(default)s")
    add("--quick", action="store_true", help="1 seed, 60 steps: shows whether it runs, and no more")
    options = parser.parse_args()
    for name in ("seeds", "steps", "threads", "lr", "adamw_lr", "tau"):
        if not 0 < (value := getattr(options, name)) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}: expected a number > 0")
    if options.output.suffix not in (kinds := (".png", ".pdf", ".svg")):
        parser.error(f"--output is {options.output}: expected a name that ends in {', '.join(kinds)}")
    if options.quick:
        options.seeds, options.steps = 1, 60
    return options


def train_one(
    arm: Arm, seed: int, steps: int, tau: float, train: Tensor, held_out: Tensor, tick: Callable[..., None]
) -> Run:
    """One model from its seed to its held-out loss.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = KimiK2ForCausalLM(KimiK2Config(**MODEL))
    order = torch.Generator().manual_seed(seed)
    observer = LogitObserver(tau)
    if arm.muon:
        optimizer = MuonClip.for_model(
            model, arm.lr, weight_decay=WEIGHT_DECAY, betas=BETAS, qk_clip_tau=arm.tau
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), arm.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    if arm.tau is None:
        for name, item in find_attention(model).items():
            observer.watch(name, item.module, item.rows.num_heads)
    run, clipped = Run(seed), set()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * min(1.0, (step + 1) / WARMUP)
        starts = torch.randint(len(train) - LENGTH + 1, (BATCH,), generator=order)
        batch = torch.stack([train[begin : begin + LENGTH] for begin in starts.tolist()]).long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{arm.label}, seed {seed}: the loss is {value} at step {step}; try a lower --lr."
            )
        if isinstance(optimizer, MuonClip) and arm.tau is not None:
            stats = optimizer.qk_clip_stats().values()
            logits = torch.cat([item["max_logit"] for item in stats])
            exact = torch.cat([item["exact"] for item in stats])
            heads = [
                f"{layer}.{head}"
                for layer, item in enumerate(stats)
                for head in (item["gamma"] < 1).nonzero().flatten().tolist()
            ]
        else:
            known, upper, _ = observer.packed("cpu")
            logits, exact, heads = torch.maximum(known, upper), known >= upper, []
            observer.reset()
        run.loss.append(value)
        run.ema.append(value if not run.ema else EMA * run.ema[-1] + (1 - EMA) * value)
        run.max_logit.append(float(logits.max()))
        run.exact.append(bool(exact[logits.argmax()]))
        run.num_clipped.append(len(heads))
        clipped.update(heads)
        tick(note=f"loss {run.ema[-1]:.3f}, max logit {run.max_logit[-1]:.1f}")
    run.clipped = sorted(clipped)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in held_out.split(BATCH)]
    run.held_out_loss = statistics.fmean(losses)
    run.seconds = time.perf_counter() - start
    return run


def summary(arm: Arm, runs: Sequence[Run], tau: float) -> dict[str, Any]:
    """One row of the table; [mean, smallest, largest] of the seeds for losses, the largest of the seeds for logits."""
    peaks = [(logit, exact) for run in runs for logit, exact in zip(run.max_logit, run.exact, strict=True)]
    peak, exact = max(peaks)
    row: dict[str, Any] = {
        "optimizer": arm.name,
        "lr": arm.lr,
        "final_ema_loss": _spread([run.ema[-1] for run in runs]),
        "held_out_loss": _spread([run.held_out_loss for run in runs]),
        "peak_logit": peak,
        "peak_is_exact": exact,
        "late_logit": max(max(run.max_logit[-LAST:]) for run in runs),
        "seconds_per_step": sum(run.seconds for run in runs) / sum(len(run.loss) for run in runs),
    }
    if arm.tau is not None:
        clipping = [
            logit for run in runs for logit, num in zip(run.max_logit, run.num_clipped, strict=True) if num
        ]
        worst = max(runs, key=lambda run: max(run.max_logit))
        row |= {
            "heads": MODEL["num_hidden_layers"] * MODEL["num_attention_heads"],
            "heads_ever_clipped": [len(run.clipped) for run in runs],
            "steps_with_a_clip": [sum(count > 0 for count in run.num_clipped) for run in runs],
            "overshoot": peak / tau - 1,
            "steps_until_back": _recovery(worst.max_logit, tau),  # None: the run ended first
            "share_of_steps_above": statistics.fmean(
                logit > tau * MARGIN for run in runs for logit in run.max_logit
            ),
            "median_logit_when_clipping": statistics.median(clipping) if clipping else None,
        }
    return row


def findings(runs: dict[Arm, list[Run]], rows: Sequence[dict[str, Any]], tau: float) -> list[str]:
    """What the numbers say, in sentences made from them; runs and rows in the order of main()'s arms."""
    muon, clip = list(runs.values())[:2]
    free, capped, own, same = rows
    lines = [
        _capped(free["peak_logit"], capped, tau),
        _usual(capped, tau),
        _difference("training (EMA)", [run.ema[-1] for run in muon], [run.ema[-1] for run in clip]),
        _difference("held-out", [run.held_out_loss for run in muon], [run.held_out_loss for run in clip]),
    ]
    clips = [run.clipped for run in clip]
    first = [next((step for step, n in enumerate(run.num_clipped) if n), len(run.loss) - 1) for run in clip]
    equal = all(a.loss[: n + 1] == b.loss[: n + 1] for a, b, n in zip(muon, clip, first, strict=True))
    until = (
        f"up to the first clip (step {_range([step + 1 for step in first])})"
        if any(clips)
        else "without a clip"
    )
    lines.append(f"{until} MuonClip's and Muon's losses are {'equal' if equal else 'NOT equal'} bit by bit")
    peaks = [f"{_peak(row)} at lr {row['lr']:g}" for row in (own, same, free)]
    lines.append(f"AdamW's logits peaked at {peaks[0]} and {peaks[1]}, Muon's at {peaks[2]}")
    return lines


def _capped(free_peak: float, capped: dict[str, Any], tau: float) -> str:
    if free_peak <= tau:
        return f"nothing to cap: Muon's logits peaked at {free_peak:.1f}, under tau {tau:g}; try more --steps"
    back = capped["steps_until_back"]
    after = "not back at the end" if back is None else f"back under {MARGIN:g} tau after {back} steps"
    peak = f"peak {capped['peak_logit']:.1f} at tau {tau:g} (overshoot {capped['overshoot']:.1%}, {after})"
    verdict = "capped" if capped["peak_logit"] < free_peak else "NOT capped"
    return f"{verdict}: {peak}; without the clip {free_peak:.1f}"


def _usual(capped: dict[str, Any], tau: float) -> str:
    share = f"above {MARGIN:g} tau in {capped['share_of_steps_above']:.0%} of all steps"
    line = (
        f"clipped at least once: {_range(capped['heads_ever_clipped'])} of {capped['heads']} heads; {share}"
    )
    if (median := capped["median_logit_when_clipping"]) is None:
        return line
    return f"{line}; median of the steps that clip {median:.1f} ({median / tau - 1:+.1%}): the clip lags one update"


def _difference(name: str, muon: Sequence[float], clip: Sequence[float]) -> str:
    """Means of paired seeds against the spread of Muon alone."""
    by_seed = [b - a for a, b in zip(muon, clip, strict=True)]
    difference, spread = statistics.fmean(by_seed), max(muon) - min(muon)
    line = f"{name} loss difference MuonClip - Muon: {difference:+.3f}"
    if len(muon) == 1:
        return f"{line}, of one seed: no spread to compare it with"
    verdict = "WORSE by more than the seeds differ" if difference > spread else "no worse"
    return f"{line} (by seed {min(by_seed):+.3f} to {max(by_seed):+.3f}), seeds' spread of Muon {spread:.3f}: {verdict}"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows for people; a line each."""
    form = "{:16} {:>22} {:>22} {:>9} {:>9} {:>14} {:>9} {:>10}"
    title = (
        "",
        "EMA loss (min..max)",
        "held-out (min..max)",
        "peak",
        f"last {LAST}",
        "heads clipped",
        "over tau",
        "back after",
    )
    lines = [form.format(*title)]
    for row in rows:
        clips = ["", "", ""]
        if "overshoot" in row:
            back = row["steps_until_back"]
            clips = [
                f"{_range(row['heads_ever_clipped'])} of {row['heads']}",
                f"{max(0.0, row['overshoot']):.1%}",
                "" if row["overshoot"] <= 0 else "never" if back is None else f"{back} steps",
            ]
        losses = ["{:.3f} ({:.3f}..{:.3f})".format(*row[key]) for key in ("final_ema_loss", "held_out_loss")]
        label = f"{row['optimizer']} {row['lr']:g}"
        lines.append(form.format(label, *losses, _peak(row), f"{row['late_logit']:.1f}", *clips))
    return [line.rstrip() for line in lines]


def _peak(row: dict[str, Any]) -> str:
    return f"{'' if row['peak_is_exact'] else '<='}{row['peak_logit']:.1f}"


def plot(runs: dict[Arm, list[Run]], tau: float, num_params: int, output: Path) -> None:
    """Loss, largest logit, and what the clip does to the loss, over steps: seeds thin, their mean thick."""
    figure, (losses, logits, differences) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for color, (arm, some) in zip(COLORS, runs.items(), strict=True):
        _curves(losses, [run.ema for run in some], color, arm.label)
        _curves(logits, [run.max_logit for run in some], color, arm.label)
    muon, clip = list(runs.values())[:2]
    by_seed = [
        [b - a for a, b in zip(free.ema, capped.ema, strict=True)]
        for free, capped in zip(muon, clip, strict=True)
    ]
    _curves(differences, by_seed, COLORS[1], "")
    everything = [run.ema for some in runs.values() for run in some]
    start = min(2 * WARMUP, len(everything[0]) - 1)
    losses.set_ylim(min(map(min, everything)) - 0.1, max(ema[start] for ema in everything) + 0.1)
    losses.set_title("Training loss (nats per byte, moving average)")
    losses.legend(loc="upper right", frameon=False)
    logits.axhline(tau, color="black", linestyle="--", linewidth=1, label=f"tau = {tau:g}")
    logits.set_yscale("log", base=2)
    logits.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    logits.legend(handles=logits.lines[-1:], loc="lower right", frameon=False)
    logits.set_title("Largest attention logit of all heads")
    differences.axhline(0, color="black", linestyle="--", linewidth=1)
    differences.set_title("Training loss, MuonClip minus Muon")
    for axes in (losses, logits, differences):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    seeds = len(muon)
    figure.suptitle(
        f"QK-Clip on an MLA model of {num_params / 1e6:.1f} M parameters; thin: seeds ({seeds}), thick: their mean"
    )
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _curves(axes: Any, curves: list[list[float]], color: str, label: str) -> None:
    steps = range(1, len(curves[0]) + 1)
    for curve in curves:
        axes.plot(steps, curve, color=color, alpha=0.35, linewidth=0.7)
    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, mean, color=color, label=label, linewidth=2)


def _text() -> tuple[Tensor, Tensor]:
    """The standard library as bytes: training text [n], and windows [k, LENGTH] of the files held out; uint8."""
    documents = [document.encode() for document in Source("stdlib")]
    parts = []
    for held_out in (False, True):
        kept = [text for index, text in enumerate(documents) if (index % HELD_OUT == 0) == held_out]
        parts.append(torch.frombuffer(bytearray(b"\0".join(kept)), dtype=torch.uint8))
    train, rest = parts
    starts = torch.linspace(0, len(rest) - LENGTH, HELD_OUT * BATCH).long().tolist()
    return train, torch.stack([rest[begin : begin + LENGTH] for begin in starts]).long()


def _recovery(logits: Sequence[float], tau: float) -> int | None:
    """Steps from the largest logit to the next that is not above MARGIN tau; None if there is none."""
    top = max(range(len(logits)), key=logits.__getitem__)
    return next((step - top for step in range(top, len(logits)) if logits[step] <= tau * MARGIN), None)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.fmean(values), min(values), max(values)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
