"""Does keeping routed experts in INT4 pay? A whole model that decodes and prefills: packed, as bf16, in stock transformers.

An INT4 checkpoint in the hub's form is written into a temporary folder: random codes and scales in a layer of real sizes.
First each way to load it has a process of its own and tells its seconds, its memory and its decoding at batch 1:

packed  transformers_k2, plain from_pretrained: routed experts stay INT4
dense   transformers_k2 with dequantize=True: the same weights, multiplied out
stock   transformers' DeepseekV3ForCausalLM, which multiplies the same files out by compressed-tensors

Then packed and dense stand side by side in this process and take turns; the ratio is the median of the rounds' own.
Decoding is one forward call a step and a random token for each sequence, with --cache tokens behind it, so that every step
asks for other experts; the table says how many different ones a layer reads.

--shape k2 has the proportions of K2's layer at half its width: of the weights that a token reads 70% are routed experts',
the rest stays bf16. --shape experts, the default, has experts of K2's size, 32 of them for a token, and next to no
attention: 96%. How many fewer bytes that is, is printed: where a step waits for memory it is not faster than that.

What it gives up: quality (weights are random), long contexts, a cold disk (files come from the page cache). transformers
multiplies a layer's whole compressed cache out again at every step (kv_b_proj), on every side: the longer --cache, the
nearer all ratios come to 1, with K2's many heads first. A CPU without bf16 instructions is slow at products of several bf16
rows, which flatters the packed side at larger batches and in prefill; --dtype float32 compares with float32 weights, twice
the bytes at batch 1.

On a busy machine run one thread (OMP_NUM_THREADS=1): then decoding and prefill are timed by the time on its own core.
--quick runs everything at a small size in half a minute; its ratios are no result.

    python benchmarks/int4_decode.py [--shape k2] [--layers 3] [--experts 32] [--top 8] [--batches 1 4 16]
        [--prefill 128 512] [--rounds 5] [--steps 4] [--dtype float32] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM, DynamicCache
from transformers.utils import logging

from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.manifest import expected_tensors
from transformers_k2.moe import routers
from transformers_k2.quantization.codecs import int4_pack
from transformers_k2.quantization.packed_experts import PackedExperts
from transformers_k2.quantization.packed_linear import has_bfloat16_instructions

WAYS = ("packed", "dense", "stock")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STORED = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}
SHARD_BYTES = 1 << 28
# No dense layers and few words: they weigh little among K2's 61 layers.
SHAPES: dict[str, dict[str, Any]] = {
    "k2": {
        "hidden_size": 3584, "moe_intermediate_size": 1024, "num_attention_heads": 32, "q_lora_rank": 768,
        "kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "num_hidden_layers": 3, "n_routed_experts": 32, "num_experts_per_tok": 8,
    },
    "experts": {
        "hidden_size": 7168, "moe_intermediate_size": 2048, "num_attention_heads": 4, "q_lora_rank": 256,
        "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "num_hidden_layers": 1, "n_routed_experts": 40, "num_experts_per_tok": 32,
    },
}  # fmt: skip
SPEED, FLOOR, RESIDENT, PEAK = 3.0, 0.95, 0.35, 1.1


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """config.json as on the hub."""
    shape = dict(SHAPES[options.shape])
    given = {
        "hidden_size": options.hidden, "moe_intermediate_size": options.width, "num_hidden_layers": options.layers,
        "n_routed_experts": options.experts, "num_experts_per_tok": options.top,
    }  # fmt: skip
    for key, value in given.items():
        if value is not None:
            shape[key] = value
    return shape | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "torch_dtype": "bfloat16",
        "intermediate_size": shape["moe_intermediate_size"],
        "num_key_value_heads": shape["num_attention_heads"], "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.827, "rope_theta": 50000.0, "max_position_embeddings": 4096, "vocab_size": 2048,
        "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "quantization_config": int4_pack.hub_config(),
    }  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> None:
    """The checkpoint, a shard at a time."""
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    tensors = expected_tensors(config)
    for name, (shape, dtype) in tensors.items():
        if name.endswith("_packed"):
            codes = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int32)
            value = codes | 0x11111111  # never -8
        elif name.endswith("_shape"):
            rows, words = tensors[f"{name.removesuffix('_shape')}_packed"][0]
            value = torch.tensor([rows, words * int4_pack.PER_INT32], dtype=torch.int32)
        elif name.endswith("weight_scale"):
            value = (torch.rand(shape, generator=generator) * 0.004 + 0.003).to(torch.bfloat16)
        elif "norm" in name:
            value = torch.ones(shape, dtype=STORED[dtype])
        else:
            value = (torch.randn(shape, generator=generator) * 0.02).to(STORED[dtype])
        shard[name] = value
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def stock_folder(folder: Path, target: Path) -> Path:
    """The same files for transformers' own class."""
    target.mkdir()
    for file in folder.glob("model*"):
        (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def load(way: str, folder: Path, dtype: torch.dtype) -> Any:
    if way == "stock":
        return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if way == "dense":
        return KimiK2ForCausalLM.from_pretrained(folder, dtype=dtype, dequantize=True).eval()
    return KimiK2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def clock() -> float:
    """Seconds; with one thread only its own time on the core, which other programs disturb less."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def memory(field: str) -> int:
    """Bytes: VmRSS is what this process has in memory, VmHWM the most it ever had. `ru_maxrss` counts the parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def nbytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


class Decoding:
    """One-token steps of a batch from a filled cache; models may take turns with the same tokens."""

    def __init__(self, first: Any, batch: int, num_cached: int) -> None:
        vocabulary = first.config.vocab_size
        self.batch, self.num_cached, self.vocabulary = batch, num_cached, vocabulary
        self.cache = DynamicCache(config=first.config)
        ids = torch.randint(vocabulary, (batch, num_cached))
        first(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def ids(self, num_steps: int) -> Tensor:
        return torch.randint(self.vocabulary, (num_steps, self.batch, 1))

    def seconds(self, model: Any, ids: Tensor) -> float:
        """Per step; `ids` [steps, batch, 1]."""
        cache = copy.deepcopy(self.cache)
        start = clock()
        for step in ids:
            model(step, past_key_values=cache, use_cache=True)
        return (clock() - start) / len(ids)

    def num_active(self, model: Any, ids: Tensor) -> float:
        """Different experts that a layer's tokens ask for, the mean over layers and steps."""
        found: list[int] = []
        hooks = [
            router.register_forward_hook(lambda *call: found.append(call[2][2].unique().numel()))
            for router in routers(model).values()
        ]
        self.seconds(model, ids)
        for hook in hooks:
            hook.remove()
        return statistics.mean(found)


def alone(options: argparse.Namespace) -> dict[str, float]:
    """What a fresh process measures of one way: bytes without those of the imports."""
    before = memory("VmRSS")
    start = time.perf_counter()
    model = load(options.way, options.folder, DTYPES[options.dtype])
    seconds = time.perf_counter() - start
    gc.collect()
    stays, peak = memory("VmRSS") - before, memory("VmHWM") - before
    decoding = Decoding(model, 1, options.cache)
    decoding.seconds(model, decoding.ids(2))
    step = statistics.median(
        decoding.seconds(model, decoding.ids(options.steps)) for _ in range(options.rounds)
    )
    return {"load": seconds, "stays": stays, "peak": peak, "weights": nbytes(model), "speed": 1 / step}


def run_alone(way: str, folder: Path) -> dict[str, float] | str:
    """`alone` in a process of its own, or the last line of what it says if it fails."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        *sys.argv[1:],
        "--way",
        way,
        "--folder",
        str(folder),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        if way != "stock":
            raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
        return run.stderr.strip().splitlines()[-1]
    return json.loads(run.stdout.splitlines()[-1])


def compare_logits(packed: Any, dense: Any) -> None:
    ids = torch.randint(packed.config.vocab_size, (1, 16))
    one, other = packed(ids).logits.float()[0], dense(ids).logits.float()[0]
    away = (one - other).norm(dim=-1) / other.norm(dim=-1)
    same = (one.argmax(-1) == other.argmax(-1)).sum()
    print(
        f"logits, packed against dense: relative distance {away.median():.1e} (median of {len(away)} tokens, "
        f"largest {away.max():.1e}), the same first choice for {same}"
    )


def take_turns(
    title: str, num_tokens: int, ways: dict[str, Callable[[int], float]], rounds: int, note: str
) -> float:
    """Print tokens/s of both `ways`, packed first; each takes the round's number and returns seconds. The median ratio."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # Who comes first changes.
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            times[name].append(ways[name](number))
    packed, dense = times.values()
    ratios = [slow / fast for fast, slow in zip(packed, dense, strict=True)]
    speeds = [num_tokens / statistics.median(values) for values in (packed, dense)]
    ratio = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{title:18}{speeds[0]:10.2f}{speeds[1]:10.2f}{ratio:8.2f}{spread:>16}{note}", flush=True)
    return ratio


def describe(packed: Any, top: int) -> float:
    """Print what a token reads; bytes of the packed experts, relative to bf16."""
    modules = [module for module in packed.modules() if isinstance(module, PackedExperts)]
    experts = sum(map(nbytes, modules))
    weights = sum(
        module.num_experts * num_out * num_in for module in modules for _, num_out, num_in in module.shapes()
    )
    share = top / modules[0].num_experts
    others = nbytes(packed) - experts - nbytes(packed.get_input_embeddings())
    before, after = 2 * weights * share + others, experts * share + others
    print(
        f"\nrouted experts: {2 * weights / 1e9:.2f} GB as bf16, {experts / 1e9:.2f} GB packed. A token reads "
        f"{before / 1e6:.0f} MB as bf16, {2 * weights * share / before:.0%} of it routed experts; packed "
        f"{after / 1e6:.0f} MB, {before / after:.2f} times fewer"
    )
    return experts / (2 * weights)


def prefill(model: Any, ids: Tensor) -> float:
    """Seconds."""
    start = clock()
    model(ids, use_cache=True, logits_to_keep=1)
    return clock() - start


def side_by_side(options: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """The experts' share of memory, and the ratios of speed by title; batch 1 of decoding comes first."""
    packed = load("packed", options.folder, torch.bfloat16)
    share = describe(packed, packed.config.num_experts_per_tok)
    dense = load("dense", options.folder, DTYPES[options.dtype])
    compare_logits(packed, dense)
    models = {"packed": packed, "dense": dense}
    print(f"\n{'tokens/s':18}{'packed':>10}{options.dtype:>10}{'ratio':>8}{'of the rounds':>16}")
    ratios: dict[str, float] = {}
    for batch in options.batches:
        decoding = Decoding(packed, batch, options.cache)
        ids = [decoding.ids(options.steps) for _ in range(options.rounds)]
        active = decoding.num_active(packed, ids[0])
        decoding.seconds(dense, ids[0][:1])
        ways = {
            name: lambda number, model=model, ids=ids, decoding=decoding: decoding.seconds(model, ids[number])
            for name, model in models.items()
        }
        title, note = f"decode, batch {batch}", f"   {active:.1f} experts a layer"
        ratios[title] = take_turns(title, batch, ways, options.rounds, note)
    for num_tokens in options.prefill:
        ids = torch.randint(packed.config.vocab_size, (1, num_tokens))
        ways = {name: lambda _, model=model, ids=ids: prefill(model, ids) for name, model in models.items()}
        title = f"prefill, {num_tokens}"
        ratios[title] = take_turns(title, num_tokens, ways, options.prefill_rounds, "")
    return share, ratios


def processes(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What each way measures in its own process; stock is not there if it fails."""
    stock = stock_folder(options.folder, options.folder / "stock")
    print(
        f"\n{'own process':12}{'load s':>8}{'stays MB':>10}{'peak MB':>10}{'weights MB':>12}{'tokens/s, batch 1':>19}"
    )
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        result = run_alone(way, stock if way == "stock" else options.folder)
        if isinstance(result, str):
            print(f"{way:12}{result}")
            continue
        found[way] = result
        sizes = (result[key] / 1e6 for key in ("stays", "peak", "weights"))
        print(
            f"{way:12}{result['load']:8.2f}"
            + "{:10.0f}{:10.0f}{:12.0f}".format(*sizes)
            + f"{result['speed']:19.2f}",
            flush=True,
        )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="experts", help="of a layer; see above")
    parser.add_argument("--hidden", type=int, help="instead of the shape's")
    parser.add_argument("--width", type=int, help="of an expert, instead of the shape's")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument(
        "--experts", type=int, help="in a layer, instead of the shape's; all of them must not fit a cache"
    )
    parser.add_argument("--top", type=int, help="experts for a token, instead of the shape's")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], help="sequences that decode at once"
    )
    parser.add_argument("--prefill", type=int, nargs="*", default=[128], help="tokens of one sequence")
    parser.add_argument("--cache", type=int, default=8, help="tokens behind a sequence that decodes")
    parser.add_argument("--steps", type=int, default=4, help="of decoding in a round")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding; medians count")
    parser.add_argument("--prefill-rounds", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of the dense side and stock"
    )
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.width, options.layers, options.experts, options.top = 1024, 512, 2, 16, 8
        options.batches, options.prefill, options.rounds, options.prefill_rounds = [1, 4], [64], 3, 1
    return options


def main() -> None:
    options = parse()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.way is not None:
        print(json.dumps(alone(options)))
        return
    with tempfile.TemporaryDirectory() as home:
        options.folder = Path(home)
        config = config_of(options)
        write(options.folder, config)
        print(
            f"{config['num_hidden_layers']} layers of {config['n_routed_experts']} experts, {config['hidden_size']} x "
            f"{config['moe_intermediate_size']}; {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, bf16 instructions: {has_bfloat16_instructions()}, load average "
            f"{os.getloadavg()[0]:.1f}"
        )
        found = processes(options)
        share, ratios = side_by_side(options)
    ours = found["packed"]
    peak, slowest = ours["peak"] / ours["stays"], min(ratios, key=lambda title: ratios[title])
    first = next(iter(ratios))
    print(f"\nload average at the end {os.getloadavg()[0]:.1f}")
    for text, value, aim, met in (
        (first, ratios[first], f"at least {SPEED}", ratios[first] >= SPEED),
        (f"slowest: {slowest}", ratios[slowest], f"at least {FLOOR}", ratios[slowest] >= FLOOR),
        ("memory of routed experts, packed / bf16", share, f"at most {RESIDENT}", share <= RESIDENT),
        ("peak / what stays, packed", peak, f"at most {PEAK}", peak <= PEAK),
    ):
        print(f"{text}: {value:.2f}, aim {aim}: {'met' if met else 'not met'}")
    if "stock" in found:
        stock = found["stock"]
        print(
            f"packed against stock transformers: load time {ours['load'] / stock['load']:.2f}, memory that stays "
            f"{ours['stays'] / stock['stays']:.2f}, peak {ours['peak'] / stock['peak']:.2f}, tokens/s at batch 1 "
            f"{ours['speed'] / stock['speed']:.2f}"
        )
    print(
        "packed against dense, tokens/s: "
        + "  ".join(f"{title} {ratio:.2f}" for title, ratio in ratios.items())
    )


if __name__ == "__main__":
    main()
