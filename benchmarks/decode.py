"""Decoding over long contexts, a long prefill and an agent's turns: transformers' DeepSeek-V3 against ours, same weights.

A model of K2's shape (head sizes 128 + 64 and 128, latents of 512 + 64, 8 of 32 experts and a shared one) with 250 M
random parameters in bfloat16. `--shape k2` is two layers of K2's own sizes with 12 experts: 1.4 B parameters, 64 heads.
Four parts, each chosen with --parts:

decode   `generate` continues a cache of so many random latents. Stock and ours alternate; medians of the rounds. The floor
         is the time to read once what a token needs (chosen experts, everything else but the embedding, the latents) at
         the bandwidth that summing 1 GB shows, in the same rounds. The other floor is that of arithmetic: every head
         multiplies every latent, 2 (2 x 512 + 64) operations, at the speed of a large float32 product. Ends with a
         straight line fitted to ours, and a plot.
prefill  one forward over 32K tokens, a process each, with its peak memory beside the loaded model's. One head, two
         layers: with two heads stock's scores of all pairs do not fit 24 GB.
agent    300 turns, each of which appends a tool's answer to the conversation: with GenerationSession, and at some turns
         with plain `generate`, whose cost is that of the whole conversation.
caches   ms per token from the dynamic cache and from the one of 8 bits.

What it gives up: latents are random, and no token depends on them being sensible; other machines have other ratios of
memory to arithmetic. A quarter of an hour on two cores, longer where they do not multiply bfloat16: most of it is stock's.

    python benchmarks/decode.py [--parts decode prefill agent caches] [--rounds 3] [--plot decode.png]
    python benchmarks/decode.py --parts decode --shape k2 --contexts 1 1024 4096
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3ForCausalLM, DynamicCache

from transformers_k2 import GenerationSession, KimiK2Config, KimiK2ForCausalLM, LatentCache

CONTEXTS = (1, 1024, 4096, 16384, 32768, 131072)
SMALL: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "n_routed_experts": 32, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 768, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 262144, "rope_theta": 50000.0, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
K2 = SMALL | {
    "hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 64,
    "n_routed_experts": 12, "first_k_dense_replace": 0, "q_lora_rank": 1536, "vocab_size": 4096,
}  # fmt: skip
SHAPES = {"small": SMALL, "k2": K2}
console = Console(width=150, highlight=False)


def build(kind: type, shape: dict[str, Any]) -> Any:
    """A model with the same weights for either class."""
    config = KimiK2Config(**shape, num_key_value_heads=shape["num_attention_heads"], dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = kind(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.data.fill_(1.0)
        elif "inv_freq" not in name:
            tensor.data.normal_(std=0.02)
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.__init__(config)
    return model.eval()


def filled(cache: Any, num_tokens: int, num_layers: int) -> Any:
    """The cache with random latents of so many tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    for layer in range(num_layers):
        for start in range(0, num_tokens, 16384):
            size = min(16384, num_tokens - start)
            parts = [torch.randn(1, 1, size, width, generator=generator) for width in (512, 64)]
            cache.update(*(part.bfloat16() for part in parts), layer)
    return cache


def ms_per_token(model: Any, cache: Any, context: int, budget: float) -> float:
    """Of `generate` from a cache of `context` tokens, which is cropped to that again; about `budget` seconds."""

    def run(num_tokens: int) -> float:
        ids = torch.randint(3, model.config.vocab_size, (1, context + 1))
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        seconds = time.perf_counter() - start
        cache.crop(context - cache.get_seq_length())
        return seconds

    once = run(1)
    return once * 1e3 if once > 4 * budget else _per_token(run, budget)


def _per_token(run: Callable[[int], float], budget: float) -> float:
    few = run(4) / 4
    num_tokens = max(4, min(128, round(budget / few)))
    return run(num_tokens) / num_tokens * 1e3


def bandwidth() -> float:
    """Bytes a second of summing one gigabyte, median of five."""
    data = torch.ones(1 << 28)
    data.sum()
    return data.nbytes / median(_seconds(data.sum) for _ in range(5))


def arithmetic() -> float:
    """Operations a second of a large float32 product, median of five."""
    a, b = torch.randn(2, 2048, 2048)
    _ = a @ b
    return 2 * 2048**3 / median(_seconds(lambda: a @ b) for _ in range(5))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def active_bytes(model: Any) -> int:
    """Of the weights that one token needs."""
    config, total = model.config, 0
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            continue
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1.0
        total += round(weight.nbytes * share)
    return total


def decode(contexts: list[int], rounds: int, plot: Path, shape: dict[str, Any]) -> None:
    models = {"stock": build(DeepseekV3ForCausalLM, shape), "ours": build(KimiK2ForCausalLM, shape)}
    num_layers, num_heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    weights = active_bytes(models["ours"])
    reads, operations = [], arithmetic()
    console.print(
        f"{sum(p.numel() for p in models['ours'].parameters()) / 1e6:.0f} M parameters, {weights / 1e6:.0f} MB for a token, "
        f"{num_heads} heads; float32 products {operations / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads"
    )
    table = Table(title=f"ms per token of generate, bfloat16, medians of {rounds} alternating rounds")
    for column in (
        "context",
        "stock",
        "ours",
        "stock / ours",
        "floor: bytes",
        "ours / floor",
        "floor: arithmetic",
    ):
        table.add_column(column, justify="right")
    figures: dict[str, list[float]] = {"stock": [], "ours": []}
    for context in contexts:
        times: dict[str, list[float]] = {"stock": [], "ours": []}
        found: list[float] = []
        for round_ in range(rounds + 1):
            found.append(bandwidth())
            for name, model in models.items():
                if len(times[name]) == rounds:
                    continue
                cache = filled(DynamicCache(), context, num_layers)
                took = ms_per_token(model, cache, context, 2.0 if name == "ours" else 0.5)
                if round_ or took > 4000:  # the first one warms up, unless it takes seconds
                    times[name].append(took)
        middle = {name: median(values) for name, values in times.items()}
        for name, value in middle.items():
            figures[name].append(value)
        read = median(found)
        reads += found
        floor = (weights + context * num_layers * 576 * 2) / read * 1e3
        busy = context * num_layers * num_heads * 2 * (2 * 512 + 64) / operations * 1e3
        table.add_row(
            f"{context:,}",
            f"{middle['stock']:.1f}",
            f"{middle['ours']:.1f} ({min(times['ours']):.1f} to {max(times['ours']):.1f})",
            f"{middle['stock'] / middle['ours']:.1f}",
            f"{floor:.1f}",
            f"{middle['ours'] / floor:.2f}",
            f"{busy + weights / read * 1e3:.1f}",
        )
        console.print(
            f"  {context:,}: stock {middle['stock']:.1f}, ours {middle['ours']:.1f} ms, floor {floor:.1f}"
        )
    console.print(table)
    console.print(
        f"reading: {median(reads) / 1e9:.1f} GB/s, between {min(reads) / 1e9:.1f} and {max(reads) / 1e9:.1f}"
    )
    fits = {name: fit(contexts, values) for name, values in figures.items()}
    slope, start, error = fits["ours"]
    console.print(
        f"ours: {start:.1f} ms + {slope * 1024:.3f} ms for each 1,024 tokens of context; "
        f"largest deviation from that line {error:.0%}"
    )
    draw(plot, contexts, figures, fits)
    ratios = [a / b for a, b in zip(figures["stock"], figures["ours"], strict=True)]
    console.print(
        "stock / ours: "
        + ", ".join(f"{ratio:.1f} at {n:,}" for n, ratio in zip(contexts, ratios, strict=True))
    )


def fit(contexts: list[int], values: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and largest relative deviation of the line with the smallest relative squares."""
    x, y = np.array(contexts, float), np.array(values)
    if len(x) < 3:
        return 0.0, float(y[0]), 0.0
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    return float(slope), float(start), float(np.abs((slope * x + start) / y - 1).max())


def draw(
    path: Path,
    contexts: list[int],
    figures: dict[str, list[float]],
    fits: dict[str, tuple[float, float, float]],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    x = np.geomspace(1, max(contexts), 200)
    for axis in axes:
        for color, (name, values) in zip(("tab:gray", "tab:blue"), figures.items(), strict=True):
            slope, start, _ = fits[name]
            axis.plot(contexts, values, "o", color=color)
            label = f"{name}: {start:.1f} ms + {slope * 1024:.2f} ms per 1,024 tokens"
            axis.plot(x, slope * x + start, color=color, label=label)
        axis.set_xlabel("tokens in the cache")
        axis.set_ylabel("ms per token")
    axes[0].set_ylim(0, 1.1 * max(figures["ours"]))
    axes[0].set_title("ours, linear axes")
    axes[1].set_xscale("log", base=2)
    axes[1].set_yscale("log")
    axes[1].set_title("both, logarithmic axes")
    axes[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    console.print(f"plot: {path}")


def caches(contexts: list[int], shape: dict[str, Any]) -> None:
    """Ours alone: what a token takes from each cache."""
    model = build(KimiK2ForCausalLM, shape)
    num_layers = shape["num_hidden_layers"]
    table = Table(title="ms per token of generate, ours, by cache")
    for column in ("context", "dynamic", "int8", "bytes of int8 / dynamic"):
        table.add_column(column, justify="right")
    for context in contexts:
        dynamic = filled(LatentCache(), context, num_layers)
        int8 = filled(LatentCache(dtype="int8"), context, num_layers)
        ms_per_token(model, dynamic, context, 0.5)
        times = [ms_per_token(model, cache, context, 2.0) for cache in (dynamic, int8)]
        share = int8.nbytes / dynamic.nbytes
        table.add_row(f"{context:,}", *(f"{value:.1f}" for value in times), f"{share:.2f}")
    console.print(table)


def prefill(num_tokens: int, rounds: int) -> None:
    """Each forward in a process of its own, for its peak memory."""
    found: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    for _ in range(rounds):
        for name in found:
            command = [sys.executable, __file__, "--one-prefill", name, "--prefill-tokens", str(num_tokens)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(result.stdout.splitlines()[-1]))
    table = Table(title=f"prefill of {num_tokens:,} tokens, 2 layers, 1 head, bfloat16, medians of {rounds}")
    for column in ("", "seconds", "peak beside the model, MB"):
        table.add_column(column, justify="right")
    middle = {
        name: {key: median(run[key] for run in runs) for key in ("seconds", "peak")}
        for name, runs in found.items()
    }
    for name, figures in middle.items():
        table.add_row(name, f"{figures['seconds']:.1f}", f"{figures['peak'] / 1e6:,.0f}")
    stock, ours = middle["stock"], middle["ours"]
    table.add_row(
        "ours / stock", f"{ours['seconds'] / stock['seconds']:.3f}", f"{ours['peak'] / stock['peak']:.3f}"
    )
    console.print(table)


def one_prefill(name: str, num_tokens: int) -> None:
    shape = SMALL | {"num_hidden_layers": 2, "num_attention_heads": 1}
    model = build(DeepseekV3ForCausalLM if name == "stock" else KimiK2ForCausalLM, shape)
    ids = torch.randint(3, shape["vocab_size"], (1, num_tokens))
    with torch.no_grad():
        model(ids[:, :64], logits_to_keep=1)
    before = _peak()
    seconds = _seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1))
    print(json.dumps({"seconds": seconds, "peak": _peak() - before}))


def _peak() -> float:
    """Bytes that this process had in memory at most; `ru_maxrss` counts its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM"))


def agent(num_turns: int, num_answer: int, num_reply: int) -> None:
    """Turns of `num_answer` tokens from a tool and `num_reply` generated ones, in one conversation."""
    model = build(KimiK2ForCausalLM, SMALL)
    generator = torch.Generator().manual_seed(1)
    session = GenerationSession(model)
    ids = torch.randint(3, SMALL["vocab_size"], (1, 1024), generator=generator)  # the system prompt
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)  # compiles the kernels
    with_session: list[float] = []
    without: dict[int, float] = {}
    sampled = {1, num_turns // 4, num_turns // 2, num_turns * 3 // 4, num_turns}
    for turn in range(1, num_turns + 1):
        answer = torch.randint(3, SMALL["vocab_size"], (1, num_answer), generator=generator)
        ids = torch.cat((ids, answer), dim=1)
        options = {"max_new_tokens": num_reply, "do_sample": False}
        if turn in sampled:
            without[turn] = _seconds(
                lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # noqa: B023
            )
        start = time.perf_counter()
        ids = session.generate(ids, **options)
        with_session.append(time.perf_counter() - start)
    table = Table(title=f"seconds of a turn: {num_answer} tokens from a tool,\n{num_reply} generated")
    for column in ("turn", "plain generate", "session", "ratio"):
        table.add_column(column, justify="right")
    for turn, seconds in without.items():
        ours = with_session[turn - 1]
        table.add_row(str(turn), f"{seconds:.2f}", f"{ours:.2f}", f"{seconds / ours:.1f}")
    console.print(table)
    turns = range(1, num_turns + 1)
    total = float(np.interp(turns, list(without), list(without.values())).sum())
    console.print(
        f"{num_turns} turns, {ids.shape[1]:,} tokens at the end: {sum(with_session):.0f} s with the session, "
        f"{total:.0f} s without, between the turns measured by straight lines: {total / sum(with_session):.1f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("decode", "prefill", "agent", "caches")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--heads", type=int, help="instead of the shape's 8 or 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-tokens", type=int, default=32768)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--plot", type=Path, default=Path("runs/decode.png"))
    parser.add_argument("--one-prefill", choices=("stock", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_prefill:
        one_prefill(options.one_prefill, options.prefill_tokens)
        return
    shape = dict(SHAPES[options.shape])
    if options.heads:
        shape["num_attention_heads"] = options.heads
    if "decode" in options.parts:
        decode(options.contexts, options.rounds, options.plot, shape)
    if "caches" in options.parts:
        caches([n for n in options.contexts if n > 1], shape)
    if "prefill" in options.parts:
        prefill(options.prefill_tokens, min(options.rounds, 2))
    if "agent" in options.parts:
        agent(options.turns, 32, 8)


if __name__ == "__main__":
    main()
