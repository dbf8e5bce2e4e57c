"""Tokens per second and peak memory of a training step: stock transformers against this package.

stock     transformers' DeepseekV3ForCausalLM under its Trainer with the Trainer's defaults (fused AdamW, sdpa, grouped_mm)
adamw     KimiK2ForCausalLM with experts "k2", padded_sdpa, the chunked loss and selective recomputation; the same AdamW
muonclip  that with MuonClip (logits tracked, QK-Clip) and the router's balance (loss, bias update) instead of AdamW

Every variant runs in a fresh process, variants alternate, medians over the steps but the first are compared. Memory is
the process's largest resident set minus what it was after the imports. float32, random tokens, the same seed. Then the
bytes that a forward pass keeps for its backward pass, by recomputation choice, counted from the storages that are alive.
About six minutes on two cores; --quick takes less than one, on a tiny model.

    python benchmarks/train_step.py [--batch 2] [--sequence 512] [--steps 4] [--threads 2] [--rounds 2] [--quick]
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
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, experts, muon_clip, padded_sdpa
from transformers_k2.moe import RouterBalance
from transformers_k2.recompute import apply_recompute
from transformers_k2.resources import find

VARIANTS = ("stock", "adamw", "muonclip")
SELECTIVE = ("norms", "swiglu", "mla_up", "moe_down")
# What the two variants of ours compute again; the rest costs more time than it frees here.
RECOMPUTE = ("norms", "swiglu", "moe_down")
CHUNK = 256
AIMS = {"adamw": (1.3, 0.7), "muonclip": (1.0, 0.7)}


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    """Seconds of each step; after it, the router's bias moves."""

    def __init__(self, balance: RouterBalance | None) -> None:
        self.balance, self.seconds = balance, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.balance is not None:
            self.balance.update()
        self.seconds.append(time.perf_counter() - self.start)


def train(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process measures."""
    baseline = peak()
    model = build(variant, options.config)
    count = options.batch * options.steps
    rows = torch.randint(3, model.config.vocab_size - 500, (count, options.sequence))
    data = [{"input_ids": row, "labels": row} for row in rows]
    balance, extra = None, {}
    if variant == "muonclip":
        balance = RouterBalance(model, bias_update_speed=1e-3, balance_loss=1e-4)
        extra = {"optimizer_cls_and_kwargs": muon_clip(lr=2e-4)}
    if variant != "stock":
        apply_recompute(model, RECOMPUTE)
    clock = Clock(balance)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=options.steps,
        )
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clock], **extra)  # pyright: ignore
        trainer.train()
    assert trainer.optimizer is not None
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "seconds": clock.seconds[1:],
        "peak": peak() - baseline,
        "weights and gradients": 2 * weights,
        "optimizer": sum(value.nbytes for value in state if isinstance(value, Tensor)),
        "loss": trainer.state.log_history[0]["loss"],
    }


class Live(TorchDispatchMode):
    """The storages made in its time that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if type(value) is Tensor:
                storage = value.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def bytes(self, model: nn.Module) -> int:
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        return sum(size for key, (ref, size) in self.storages.items() if key not in own and not ref.expired())


def table(options: argparse.Namespace) -> None:
    """Megabytes between forward and backward, and the seconds of both."""
    ids = torch.randint(3, 500, (options.batch, options.sequence))
    print(f"\n{'kept for the backward pass':42}{'MB':>9}{'seconds':>9}")
    lines: list[tuple[str, str, Sequence[str]]] = [("stock", "stock", ()), ("ours", "ours, nothing", ())]
    lines += [("ours", name, (name,)) for name in SELECTIVE]
    lines += [("ours", "all four", SELECTIVE), ("ours", "full", ("full",))]
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
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
        handle.remove()
        print(f"{title:42}{kept / 1e6:9.1f}{seconds:9.2f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="debug_0_2b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.config, options.sequence, options.steps, options.rounds = "debug_minute", 128, 3, 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.variant is not None:
        print(json.dumps(train(options.variant, options)))
        return
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    print(f"{'variant':10}{'seconds':>9}{'tokens/s':>10}{'peak MB':>9}{'states MB':>11}{'loss':>8}")
    for _ in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--variant", variant]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
            found = json.loads(run.stdout.splitlines()[-1])
            results[variant].append(found)
            seconds = statistics.median(found["seconds"])
            states = found["weights and gradients"] + found["optimizer"]
            print(
                f"{variant:10}{seconds:9.2f}{options.batch * options.sequence / seconds:10.0f}"
                f"{found['peak'] / 1e6:9.0f}{states / 1e6:11.0f}{found['loss']:8.3f}",
                flush=True,
            )
    table(options)
    seconds = {
        name: statistics.median(t for run in runs for t in run["seconds"]) for name, runs in results.items()
    }
    memory = {name: statistics.median(run["peak"] for run in runs) for name, runs in results.items()}
    print()
    for name, (speed, share) in AIMS.items():
        print(
            f"{name} against stock: tokens/s {seconds['stock'] / seconds[name]:.2f} (aim {speed}), "
            f"peak memory {memory[name] / memory['stock']:.2f} (aim {share})"
        )


if __name__ == "__main__":
    main()
