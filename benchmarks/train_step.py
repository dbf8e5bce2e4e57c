"""Tokens per second and peak memory of a training step: stock transformers against this package.

stock     transformers' DeepseekV3ForCausalLM under its Trainer with the Trainer's defaults (fused AdamW, sdpa, grouped_mm)
adamw     KimiK2ForCausalLM with experts "k2", padded_sdpa, the chunked loss and selective recomputation; the same AdamW
muonclip  that with MuonClip (logits tracked, QK-Clip) and the router's balance (loss, bias update) instead of AdamW

A step is 16,384 tokens for each: 4 accumulated micro-batches of 8 x 512. Real steps are millions of tokens, so that the
optimizer's share here is hundreds of times theirs. Every round runs each variant in a fresh process, after a micro-batch
and an optimizer step to warm up (states are allocated once in a run); float32, random tokens, the same seed. Wall-clock
time is what counts on an idle machine; processor time (user and system) is printed beside it because other programs
disturb it less. Memory is the process's largest resident set minus what it was after the imports. Then the bytes that a
forward pass keeps for its backward pass, by recomputation choice, counted from the storages that are alive. Ratios of a
busy machine mean nothing: look at the load first. --quick has steps of 2,048 tokens, in which the optimizer weighs far too
much: it shows that everything runs, in some four minutes on two idle cores; its ratios are no result.

    python benchmarks/train_step.py [--batch 8] [--sequence 512] [--accumulate 4] [--threads 2] [--rounds 2]
        [--recompute norms,swiglu,moe_down] [--momentum float32] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from live_storages import Live
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, experts, muon_clip, padded_sdpa
from transformers_k2.moe import RouterBalance
from transformers_k2.recompute import apply_recompute
from transformers_k2.resources import find

VARIANTS = ("stock", "adamw", "muonclip")
SELECTIVE = ("norms", "swiglu", "mla_up", "moe_down")
CHUNK = 256
AIMS = {"adamw": (1.3, 0.7), "muonclip": (1.0, 0.7)}


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clocks() -> tuple[float, float]:
    """Seconds of wall-clock time, and of this process's processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def build(variant: str, config: str) -> Any:
    values = json.loads(find("configs", config).read_text()) | {"torch_dtype": "float32"}
    torch.manual_seed(0)
    if variant == "stock":
        return DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(values | {"model_type": "deepseek_v3"}))
    experts.register()
    padded_sdpa.register()
    model = KimiK2ForCausalLM(KimiK2Config.from_dict(values))
    model.set_experts_implementation(experts.NAME)
    model.set_attn_implementation(padded_sdpa.NAME)
    model.loss_chunk_tokens = CHUNK
    return model


class Clock(TrainerCallback):
    """The clocks at a step's beginning, before its optimizer and at its end, where the router's bias has moved."""

    def __init__(self, balance: RouterBalance | None) -> None:
        self.balance, self.times = balance, list[tuple[float, float]]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(clocks())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.times.append(clocks())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.balance is not None:
            self.balance.update()
        self.times.append(clocks())


def train(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """What a fresh process measures."""
    baseline = peak()
    model = build(variant, options.config).train()
    rows = torch.randint(
        3, model.config.vocab_size - 500, (options.batch * options.accumulate, options.sequence)
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    balance, extra = None, {}
    if variant != "stock":
        apply_recompute(model, options.recompute)
    if variant == "muonclip":
        balance = RouterBalance(model, bias_update_speed=1e-3, balance_loss=1e-4)
        extra = {"optimizer_cls_and_kwargs": muon_clip(lr=2e-4, state_dtype=options.momentum)}
    clock = Clock(balance)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            max_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clock], **extra)  # pyright: ignore
        optimizer: Any = trainer.create_optimizer()
        model(input_ids=rows[: options.batch], labels=rows[: options.batch], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if balance is not None:
            balance.update()
        trainer.train()
    assert trainer.optimizer is not None
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    (wall, busy), (wall_passes, busy_passes), (wall_end, busy_end) = clock.times
    return {
        "passes": wall_passes - wall,
        "optimizer": wall_end - wall_passes,
        "step": wall_end - wall,
        "busy passes": busy_passes - busy,
        "busy": busy_end - busy,
        "peak": peak() - baseline,
        "states": 2 * sum(parameter.nbytes for parameter in model.parameters())
        + sum(value.nbytes for value in state if isinstance(value, Tensor)),
        "loss": trainer.state.log_history[0]["loss"],
    }


def table(options: argparse.Namespace) -> None:
    """Kilobytes per token between forward and backward, and the processor time of both."""
    ids = torch.randint(3, 500, (max(1, options.batch // 4), options.sequence))
    print(f"\n{'kept for the backward pass':30}{'kB/token':>10}{'CPU s':>8}   of {ids.numel()} tokens")
    lines: list[tuple[str, str, Sequence[str]]] = [("stock", "stock", ()), ("ours", "ours, nothing", ())]
    lines += [("ours", name, (name,)) for name in SELECTIVE]
    lines += [("ours", "+".join(names), names) for names in (("norms", "swiglu"), SELECTIVE)]
    lines += [("ours", "full", ("full",))]
    models: dict[str, Any] = {}
    for kind, title, names in lines:
        if kind not in models:
            models.clear()
            models[kind] = build(kind, options.config).train()
        model = models[kind]
        handle = apply_recompute(model, names)
        with Live() as live:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            kept = live.bytes(model)
        loss.backward()
        _, start = clocks()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        busy = clocks()[1] - start
        model.zero_grad()
        handle.remove()
        print(f"{title:30}{kept / ids.numel() / 1e3:10.1f}{busy:8.2f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="debug_0_2b")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a micro-batch")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--recompute", default="norms,swiglu,moe_down", help="of ours; empty for nothing")
    parser.add_argument("--momentum", choices=("float32", "bfloat16"), default="float32", help="of MuonClip")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.recompute = [name for name in options.recompute.split(",") if name]
    if options.quick:
        options.batch, options.accumulate, options.rounds = 4, 1, 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.variant is not None:
        print(json.dumps(train(options.variant, options)))
        return
    tokens = options.batch * options.sequence * options.accumulate
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    print(f"One step of {tokens} tokens: {options.accumulate} x {options.batch} x {options.sequence}")
    print(
        f"{'variant':10}{'fwd+bwd s':>11}{'optimizer s':>13}{'tokens/s':>10}{'CPU s':>8}{'of fwd+bwd':>12}"
        f"{'peak MB':>9}{'states MB':>11}{'loss':>8}"
    )
    for _ in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--variant", variant]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
            found = json.loads(run.stdout.splitlines()[-1])
            results[variant].append(found)
            print(
                f"{variant:10}{found['passes']:11.2f}{found['optimizer']:13.2f}{tokens / found['step']:10.0f}"
                f"{found['busy']:8.1f}{found['busy passes']:12.1f}{found['peak'] / 1e6:9.0f}"
                f"{found['states'] / 1e6:11.0f}{found['loss']:8.3f}",
                flush=True,
            )
    table(options)
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    stock = middle["stock"]
    print()
    for name, (speed, share) in AIMS.items():
        ours = middle[name]
        print(
            f"{name} against stock: tokens/s {stock['step'] / ours['step']:.2f} (aim {speed}), tokens per CPU second "
            f"{stock['busy'] / ours['busy']:.2f}, peak memory {ours['peak'] / stock['peak']:.2f} (aim {share})"
        )


if __name__ == "__main__":
    main()
