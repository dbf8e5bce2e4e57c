"""Kill conversions at random moments and let the same command finish them: is every byte the same, and was anything wrong?

    python benchmarks/convert_kills.py [--kills 50] [--megabytes 100] [--seed 0] [--folder scratch]

A checkpoint of random weights in K2's shape is converted in several directions, in turns. Each run is a process of its own
that gets SIGKILL: at a moment that is uniform in the time an undisturbed run takes, or, every third time, within the few
milliseconds in which finished files are moved into place. After every kill the folder is read with `open_model`, `verify`
and transformers; then the command is repeated (now and then killed once more), and all files are compared with those of
the undisturbed run, conversion.json among them.

Prints a row for each kill. Ends with status 1 if a file differed, or a folder could be read as a checkpoint and was not the
right one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import checkpoints
from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.conversion import convert, merge_adapter, quantize, verify
from transformers_k2.conversion.opened import open_model
from transformers_k2.conversion.staging import STAGING
from transformers_k2.lazy_tensors import OpenFiles
from transformers_k2.manifest import expected_tensors

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
Work = Callable[[Path], Any]


def source(folder: Path, megabytes: int, generator: torch.Generator) -> Path:
    """Random weights by safetensors' own writer; as many experts as that takes."""
    expert = 3 * 2 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"] * (SIZES["num_hidden_layers"] - 1)
    num_experts = max(4, (megabytes * 10**6 - 30 * 10**6) // expert // 4 * 4)
    config = checkpoints.hub_config(**SIZES, n_routed_experts=num_experts)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).to(DTYPES[dtype])
        for name, (shape, dtype) in expected_tensors(config).items()
    }
    return checkpoints.write(folder, tensors, config, num_shards=4, stray=False)


def lora(folder: Path, generator: torch.Generator) -> Path:
    """An adapter of the attention's output and of the first expert."""
    folder.mkdir()
    hidden, tensors = SIZES["hidden_size"], {}
    widths = {f"model.layers.{layer}.self_attn.o_proj": 512 for layer in range(4)}
    widths |= {f"model.layers.{layer}.mlp.experts.0.down_proj": 256 for layer in range(1, 4)}
    for module, width in widths.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(8, width, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(hidden, 8, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 1, "target_modules": ["o_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Every file that is not of an unfinished run."""
    return {
        str(path.relative_to(folder)): hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and STAGING not in path.parts
    }


def started(work: Work, dst: Path) -> int:
    """Begin in a copy of this process; its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(dst)
            code = 0
        finally:
            os._exit(code)
    return pid


def killed(
    work: Work, dst: Path, rng: random.Random, seconds: float, while_published: bool
) -> tuple[bool, float]:
    """Kill a run; whether that came before its end, and after how many seconds."""
    begin, pid, code = time.monotonic(), started(work, dst), None
    moment = rng.uniform(0, seconds)
    marker = dst / STAGING / "publishing"
    while code is None:
        after = time.monotonic() - begin
        if marker.exists() if while_published else after >= moment:
            if while_published:
                time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            break
        if os.waitpid(pid, os.WNOHANG)[0]:
            code = 0
        time.sleep(0.0002)
    return code == -signal.SIGKILL, time.monotonic() - begin


def state(dst: Path) -> str:
    """How far the run had come."""
    if (dst / STAGING / "publishing").exists():
        return "publishing"
    if (dst / STAGING).exists():
        return "tidying up" if any(dst.glob("*.safetensors")) else "staging"
    return "done" if any(dst.glob("*.safetensors")) else "not begun"


def readers(dst: Path) -> list[str]:
    """Who reads the folder as a checkpoint."""

    def opened() -> None:
        with OpenFiles() as files:
            open_model(dst, files)

    trials: dict[str, tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...]]] = {
        "open_model": (opened, ValueError),
        "verify": (lambda: verify(dst, quiet=True), ValueError),
        "transformers": (lambda: KimiK2ForCausalLM.from_pretrained(dst), (ValueError, OSError)),
    }
    found = []
    for name, (read, refusal) in trials.items():
        try:
            read()
            found.append(name)
        except refusal:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    root = Path(tempfile.mkdtemp(prefix="convert-kills-", dir=options.folder))
    bf16 = source(root / "bf16", options.megabytes, generator)
    fp8, adapter = root / "fp8", lora(root / "adapter", generator)
    convert(bf16, fp8, "hub_fp8", quiet=True)
    shards: dict[str, Any] = {"shard_bytes": options.megabytes * 10**6 // 12, "quiet": True}
    works: dict[str, Work] = {
        "fp8 to bf16": lambda dst: convert(fp8, dst, "hub_bf16", codec="bf16", **shards),
        "bf16 to int4": lambda dst: quantize(bf16, dst, **shards),
        "fused": lambda dst: convert(bf16, dst, "transformers_fused", **shards),
        "ranks": lambda dst: convert(bf16, dst, "deepseek_inference", codec="bf16", num_ranks=4, **shards),
        "merge": lambda dst: merge_adapter(bf16, adapter, dst, **shards),
    }
    before = {folder: digests(folder) for folder in (bf16, fp8, adapter)}
    whole: dict[str, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    for name, work in works.items():
        work(root / "whole")
        shutil.rmtree(root / "whole")
        begin = time.monotonic()
        work(root / "whole")
        seconds[name] = time.monotonic() - begin
        whole[name] = digests(root / "whole")
        size = sum(path.stat().st_size for path in (root / "whole").iterdir())
        print(
            f"undisturbed {name}: {seconds[name]:.2f} s, {len(whole[name])} files, {size / 1e6:.0f} MB",
            flush=True,
        )
        shutil.rmtree(root / "whole")
    print("\n| kill | direction | after s | while | finished files | resumed |\n|---|---|---|---|---|---|")
    states: Counter[str] = Counter()
    num_kills = num_differ = num_wrong = turn = 0
    dst = root / "dst"
    while num_kills < options.kills:
        name = list(works)[turn % len(works)]
        turn += 1
        again = True
        while again and num_kills < options.kills:
            was_running, after = killed(works[name], dst, rng, seconds[name], while_published=turn % 3 == 0)
            if not was_running:
                break
            num_kills += 1
            there = state(dst)
            states[there] += 1
            complete = dst.exists() and digests(dst) == whole[name]
            if not complete and (accepted := readers(dst)):
                num_wrong += 1
                print(f"{dst} is read by {', '.join(accepted)} and is not complete")
            num_files = len(list((dst / STAGING).glob("*.safetensors")))
            again = there == "staging" and rng.random() < 0.3
            print(
                f"| {num_kills} | {name} | {after:.2f} | {there} | {num_files} | {'killed' if again else 'yes'} |",
                flush=True,
            )
        if not (dst.exists() and digests(dst) == whole[name]):
            works[name](dst)
        if digests(dst) != whole[name]:
            num_differ += 1
            odd = {
                one for one in {*whole[name], *digests(dst)} if whole[name].get(one) != digests(dst).get(one)
            }
            print(f"differ: {', '.join(sorted(odd))}")
        shutil.rmtree(dst)
    touched = [folder.name for folder, known in before.items() if digests(folder) != known]
    print(f"\nkilled while {', '.join(f'{key}: {num}' for key, num in states.most_common())}")
    print(f"sources: {'changed: ' + ', '.join(touched) if touched else 'untouched'}")
    print(f"{num_kills} kills, {num_differ} outputs differ, {num_wrong} readable but wrong")
    if bad := num_differ + num_wrong + len(touched):
        print(f"kept: {root}")
    else:
        shutil.rmtree(root)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
