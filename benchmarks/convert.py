"""What does converting a checkpoint cost, over `cp` of the same bytes, and against other tools?

A checkpoint of random weights in K2's shape is written once as bf16 (expert by expert, a few shards), and by the converter
itself as FP8 and INT4. Each direction runs in turns with `cp` (A B A B ...), and the median of the ratios of neighbours
counts:

copy         hub bf16 -> hub bf16, cut into larger shards
rename       hub bf16 -> DeepSeek's inference layout, one file
megatron     hub bf16 -> Megatron-Core's names, gate and up in one matrix
fp8-bf16, int4-bf16, bf16-fp8, bf16-int4

`cp` copies what the direction has written, for bf16-int4 what it has read. Every turn begins with a cold cache and ends with
the data on the disk: our converter calls fsync itself, after `cp` and the peers this script does. A conversion is a process
of its own, timed from the call of `convert` to its return; what it took to start is printed apart, and so is `cp` without
fsync. Memory is RssAnon, looked at every 5 ms from outside: the pages of files are the system's.

Peers, on the same files in the same turns: transformers (from_pretrained in bf16, save_pretrained) and compressed-tensors'
convert_checkpoint. The latter has no converter from bf16 to INT4; there its own quantiser runs in its own pipeline, by a
class of a few lines below. Neither resumes, checksums, or flushes to the disk.

What it gives up: real weights (the numbers do not change the work), and disks that are slower than a core: the faster the
disk, the more the work shows.

    python benchmarks/convert.py [--size 3.5] [--folder scratch] [--directions copy fp8-bf16] [--rounds 3] [--no-peers]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

GB, MB = 10**9, 10**6
SHARD, LARGER_SHARD = 0.5, 0.8  # GB
PEAK = 0.4 * GB  # aim
LOOK = 0.005  # seconds between looks at a process's memory
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
COLD = {"all": "/proc/sys/vm/drop_caches", "files": "posix_fadvise, file by file"}
# 128 divides every side: transformers refuses or misreads other FP8 weights.
SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "moe_intermediate_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 128, "v_head_dim": 128, "vocab_size": 8192, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.827, "rope_theta": 50000.0,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
}  # fmt: skip


class Direction(NamedTuple):
    """From which source to what; `aim` over `cp` of the output, or of the input."""

    source: str
    to: str
    codec: str
    aim: float | None = None
    of_input: bool = False
    peers: tuple[str, ...] = ()


BOTH = ("transformers", "compressed-tensors")
DIRECTIONS = {
    "copy": Direction("bf16", "hub_bf16", "bf16", 1.1, peers=("transformers",)),
    "rename": Direction("bf16", "deepseek_inference", "bf16", 1.1),
    "megatron": Direction("bf16", "megatron", "bf16", 1.1),
    "fp8-bf16": Direction("fp8", "hub_bf16", "bf16", 1.2, peers=BOTH),
    "int4-bf16": Direction("int4", "hub_bf16", "bf16", 1.2, peers=BOTH),
    "bf16-int4": Direction("bf16", "hub_int4", "int4", 2.0, of_input=True, peers=("compressed-tensors",)),
    "bf16-fp8": Direction("bf16", "hub_fp8", "fp8"),
}


class Cost(NamedTuple):
    """Of a turn; the last four only of a process that told them, memory in bytes."""

    seconds: float
    user: float
    system: float
    unflushed: float  # seconds, before fsync
    start: float = 0.0
    imports: float = 0
    peak: float = 0


# ---- what runs in a process of its own; each imports what it needs, because imports count


def write_bf16(folder: Path, config: dict[str, Any]) -> None:
    """The source, a shard at a time."""
    import torch
    from safetensors.torch import save_file

    from transformers_k2.manifest import expected_tensors

    torch.manual_seed(0)
    folder.mkdir()
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    tensors = expected_tensors(config, "none")
    last = next(reversed(tensors))
    for name, (shape, dtype) in tensors.items():
        scale = 0.3 if name.endswith("bias") else 0.02
        value = torch.ones(shape) if "norm" in name else scale * torch.randn(shape)
        shard[name] = value.to(torch.float32 if dtype == "F32" else torch.bfloat16)
        if name == last or sum(tensor.nbytes for tensor in shard.values()) > SHARD * GB:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard.clear()
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def ours(job: dict[str, Any]) -> Callable[[], object]:
    """A conversion, ready to be called."""
    from transformers_k2.conversion import convert

    return lambda: convert(
        job["source"], job["target"], job["to"], codec=job["codec"], shard_bytes=job["shard"], quiet=True
    )


def transformers(job: dict[str, Any]) -> Callable[[], object]:
    """Load as bf16 and save."""
    import torch
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # What was quantised cannot be saved in the names it had ("Undefined Operation encountered!").
    format_ = {} if job["from"] == "bf16" else {"save_original_format": False}

    def run() -> None:
        model = DeepseekV3ForCausalLM.from_pretrained(job["source"], dtype=torch.bfloat16)
        model.save_pretrained(job["target"], max_shard_size=job["shard"], **format_)

    return run


def compressed_tensors(job: dict[str, Any]) -> Callable[[], object]:
    """Its pipeline with the converter for this direction."""
    from compressed_tensors.entrypoints.convert import (
        CompressedTensorsDequantizer,
        FP8BlockDequantizer,
        convert_checkpoint,
    )
    from loguru import logger

    logger.remove()
    converters: dict[tuple[str, str], Callable[[], Any]] = {
        ("fp8", "bf16"): lambda: FP8BlockDequantizer.from_pretrained(job["source"]),
        ("int4", "bf16"): lambda: CompressedTensorsDequantizer(job["source"]),
        ("bf16", "int4"): quantizer,
    }
    make = converters[job["from"], job["codec"]]
    return lambda: convert_checkpoint(job["source"], job["target"], make())


def quantizer() -> Any:
    """compressed-tensors' scales, codes and packing for routed experts, group 32, as one of its converters."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import Converter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["re:.*mlp.experts.*"], weights=weights, format="pack-quantized")
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")

    class Quantizer(Converter):
        def process(self, tensors: dict[str, Any]) -> dict[str, Any]:
            for name in [name for name in tensors if ".mlp.experts." in name]:
                weight = tensors.pop(name)
                groups = weight.unflatten(1, (-1, 32))
                scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
                parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
                stem = name.removesuffix("weight")
                packed = compressor.compress(parts, scheme)
                tensors |= {f"{stem}{part}": value for part, value in packed.items()}
            return tensors

        def update_config(self, config: Any) -> Any:
            return QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized")

        def get_dependencies(self, weight_name: str) -> set[str]:
            return set()

    return Quantizer()


WAYS = {"ours": ours, "transformers": transformers, "compressed-tensors": compressed_tensors}


def work(job: dict[str, Any]) -> None:
    """Carry out one job in this process, and print what it took as JSON on the last line."""
    if job["way"] == "write":
        write_bf16(Path(job["target"]), job["config"])
        return
    run = WAYS[job["way"]](job)
    imports = anonymous(os.getpid())
    if job["cold"]:
        make_cold(Path(job["source"]), job["cold"] == "all")
    started = time.monotonic() - job["spawned"]
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    unflushed = time.perf_counter() - start
    if job["way"] != "ours":
        flush(Path(job["target"]))
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print("\n" + json.dumps([seconds, user, system, unflushed, started, imports]))


# ---- the turns


def anonymous(pid: int) -> int:
    """Bytes of memory of a process that are no file's; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, found, rest = text.partition("RssAnon:")
    return int(rest.split()[0]) * 1024 if found else 0


def flush(folder: Path) -> None:
    """Everything in a folder to the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def make_cold(folder: Path, whole: bool) -> None:
    """No page of a folder's files in memory; with `whole`, of no file at all."""
    os.sync()
    if whole:
        DROP_CACHES.write_text("3")
        return
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def spawn(way: str, cold: str, **job: Any) -> Cost | str:
    """A job in a process of its own, its memory watched; or the last line of what went wrong."""
    peak = 0
    told = json.dumps({"way": way, "cold": cold, "spawned": time.monotonic(), **job}, default=str)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, __file__, "--job", told], stdout=out, stderr=err)
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(LOOK):
                peak = max(peak, anonymous(process.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            status = process.wait()
        finally:
            process.kill()
            ended.set()
            watching.join()
        for file in (out, err):
            file.seek(0)
        lines, errors = out.read().splitlines(), err.read().strip().splitlines()
    if status:
        return errors[-1][:160] if errors else f"ended with status {status}"
    return Cost(*json.loads(lines[-1]), peak=peak) if way != "write" else Cost(0, 0, 0, 0)


def cp(source: Path, target: Path, cold: str) -> Cost:
    """`cp -r`, then fsync."""
    make_cold(source, cold == "all")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    unflushed = time.perf_counter() - start
    flush(target)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Cost(seconds, user, system, unflushed)


def neighbours(mine: list[float], its: list[float]) -> list[float]:
    """The ratios of turns that follow each other: A1/B1, A2/B1, A2/B2, ..."""
    turns = [turn for pair in zip(mine, its, strict=True) for turn in pair]
    return [first / second if number % 2 == 0 else second / first
            for number, (first, second) in enumerate(pairwise(turns))]  # fmt: skip


def size(folder: Path) -> int:
    """Bytes."""
    return sum(path.stat().st_size for path in folder.iterdir())


def median(costs: list[Cost], field: str) -> float:
    """Of one field."""
    return statistics.median(getattr(cost, field) for cost in costs)


def measure(name: str, home: Path, options: argparse.Namespace) -> tuple[str, float]:
    """Print a direction's row and those of its peers; its summary, and our peak."""
    direction = DIRECTIONS[name]
    source, out, copy = home / direction.source, home / "out", home / "copy"
    shard = int((LARGER_SHARD if name == "copy" else SHARD) * GB)
    told = {"from": direction.source, "codec": direction.codec, "source": source, "shard": shard}
    mine, its, peers = [], [], {}
    for number in range(options.rounds):
        shutil.rmtree(out, ignore_errors=True)
        cost = spawn("ours", options.cold, target=out, to=direction.to, **told)
        if isinstance(cost, str):
            raise SystemExit(f"{name}: {cost}")
        mine.append(cost)
        its.append(cp(source if direction.of_input else out, copy, options.cold))
        shutil.rmtree(copy)
        if number == 0 and not options.no_peers:
            for peer in direction.peers:
                peers[peer] = spawn(peer, options.cold, target=copy, to=direction.to, **told)
                shutil.rmtree(copy, ignore_errors=True)
    synced = neighbours([cost.seconds for cost in mine], [cost.seconds for cost in its])
    bare = neighbours([cost.seconds for cost in mine], [cost.unflushed for cost in its])
    ratio = statistics.median(synced)
    ours_ = Cost(*(median(mine, field) for field in Cost._fields))
    num_read, num_written = size(source), size(out)
    shutil.rmtree(out)
    aim = f"{direction.aim:.1f}" if direction.aim else "-"
    print(
        f"{name:10}{num_read / GB:7.2f}{num_written / GB:7.2f}{ours_.seconds:8.2f}{median(its, 'seconds'):8.2f}"
        f"{median(its, 'unflushed'):9.2f}{ratio:8.2f}{f'{min(synced):.2f}-{max(synced):.2f}':>12}{aim:>5}"
        f"{statistics.median(bare):9.2f}{ours_.user:7.2f}{ours_.system:6.2f}{median(its, 'system'):8.2f}"
        f"{ours_.peak / MB:8.0f}{(ours_.peak - ours_.imports) / MB:8.0f}{ours_.start:7.2f}",
        flush=True,
    )
    for peer, cost in peers.items():
        if isinstance(cost, str):
            print(f"  {peer} fails: {cost}")
            continue
        times = cost.seconds / mine[0].seconds, cost.seconds / its[0].seconds  # of the same round
        print(
            f"  {peer}: {cost.seconds:.2f} s, {times[0]:.2f} of ours, {times[1]:.2f} of cp; "
            f"peak {cost.peak / MB:.0f} MB, {cost.peak / ours_.peak:.1f} of ours",
            flush=True,
        )
    return f"{name} {ratio:.2f} (aim {aim})", ours_.peak


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """Where everything is written; sources stay in a folder that was given."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="convert-") as home:
            yield Path(home)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        for name in ("out", "copy"):
            shutil.rmtree(folder / name, ignore_errors=True)


def config_for(num_bytes: float) -> dict[str, Any]:
    """As many experts as fill that many bytes of bf16."""
    from transformers_k2.manifest import expected_tensors

    def bytes_of(num_experts: int) -> int:
        tensors = expected_tensors(SHAPE | {"n_routed_experts": num_experts}, "none")
        return sum(2 * math.prod(shape) for shape, _ in tensors.values())

    few, more = bytes_of(2), bytes_of(3)
    return SHAPE | {"n_routed_experts": max(2, round(2 + (num_bytes - few) / (more - few)))}


def prepare(home: Path, config: dict[str, Any], wanted: set[str], size_gb: float) -> None:
    """The sources, those that a folder has already excepted."""
    bf16 = home / "bf16"
    if bf16.exists() and json.loads((bf16 / "config.json").read_text()) != config:
        raise SystemExit(f"{bf16} is of another size: expected one of --size {size_gb}; remove it.")
    free, needed = shutil.disk_usage(home).free, (4 * size_gb + 0.5) * GB
    print(f"{home} has {free / GB:.0f} GB free, about {needed / GB:.0f} are needed")
    if free < needed:
        raise SystemExit(
            f"expected {needed / GB:.0f} GB free in {home}: take another --folder or less --size."
        )
    for name in ("bf16", *sorted(wanted - {"bf16"})):
        if (home / name).exists():
            continue
        job = {"source": bf16, "from": "bf16", "to": f"hub_{name}", "codec": name, "shard": int(SHARD * GB)}
        unfinished = home / f"{name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        done = spawn("write" if name == "bf16" else "ours", "", target=unfinished, config=config, **job)
        if isinstance(done, str):
            raise SystemExit(f"{name}: {done}")
        unfinished.rename(home / name)
    sizes = ", ".join(
        f"{name} {size(home / name) / GB:.2f} GB in {len(list((home / name).glob('*.safetensors')))} files"
        for name in ("bf16", *sorted(wanted - {"bf16"}))
    )
    print(f"{config['n_routed_experts']} experts in each of 4 layers; {sizes}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=float, default=3.5, help="GB of the bf16 checkpoint; 4 times that must be free"
    )
    parser.add_argument(
        "--folder", type=Path, help="for all files, its sources are kept; default: a temporary one"
    )
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; medians count")
    parser.add_argument("--threads", type=int, help="cores that all may use; default: those there are")
    parser.add_argument(
        "--cold",
        choices=list(COLD),
        default="all" if os.access(DROP_CACHES, os.W_OK) else "files",
        help="what leaves the page cache before a turn: everything, which only root can, or the checkpoint's files",
    )
    parser.add_argument("--no-peers", action="store_true", help="only ours and cp")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.job is not None:
        work(options.job)
        return
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    print(f"{len(cores)} cores; cold: {COLD[options.cold]}; load average {os.getloadavg()[0]:.1f}")
    summaries = []
    with scratch(options.folder) as home:
        wanted = {DIRECTIONS[name].source for name in options.directions}
        prepare(home, config_for(options.size * GB), wanted, options.size)
        print(
            "\nseconds; cp is of the output (bf16-int4: of the input) and fsync, `bare` without fsync; MB of anonymous "
            "memory,\nwhole and above what imports hold; user and sys: seconds of all threads\n"
            f"{'':10}{'GB in':>7}{'out':>7}{'ours':>8}{'cp':>8}{'cp bare':>9}{'ratio':>8}{'neighbours':>12}{'aim':>5}"
            f"{'of bare':>9}{'user':>7}{'sys':>6}{'cp sys':>8}{'peak':>8}{'above':>8}{'start':>7}"
        )
        peak = 0.0
        for name in options.directions:
            summary, highest = measure(name, home, options)
            summaries.append(summary)
            peak = max(peak, highest)
    print(
        f"\nload average at the end {os.getloadavg()[0]:.1f}; highest peak {peak / GB:.2f} GB, aim {PEAK / GB:.1f}: "
        f"{'met' if peak <= PEAK else 'not met'}"
    )
    print("over cp: " + "  ".join(summaries))


if __name__ == "__main__":
    main()
