"""Seconds to load a checkpoint as bf16 in each published form: transformers_k2 against stock transformers on the same files.

The stock class reads FP8 only where 128 divides every side, so the shape here does (real K2 checkpoints are refused).
Loads alternate, ours and stock, and the medians are compared; a ratio below 1 means that ours is faster.

    python benchmarks/load_checkpoint.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DeepseekV3ForCausalLM
from transformers.utils import logging

from transformers_k2 import KimiK2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import checkpoints

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 32, "q_lora_rank": 512, "kv_lora_rank": 448,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "vocab_size": 8192,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind; the median counts")
    repeats = parser.parse_args().repeats
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    home = Path(tempfile.mkdtemp())
    try:
        plain = checkpoints.per_expert(checkpoints.stock_model(**SHAPE))
        forms = {
            "bf16": (plain, {}),
            "fp8": (checkpoints.to_fp8(plain), {"quantization_config": checkpoints.FP8_CONFIG}),
            "int4": (checkpoints.to_int4(plain), {"quantization_config": checkpoints.INT4_CONFIG}),
        }
        # INT4 twice: as bf16, which is all that the stock class can, and as it is.
        forms |= {"int4, kept": forms["int4"]}
        size = sum(tensor.numel() for tensor in plain.values())
        print(f"{size / 1e6:.0f}M parameters, loaded as bf16 on {torch.get_num_threads()} threads")
        ratios = {}
        for form, (tensors, extra) in forms.items():
            ours = checkpoints.write(
                home / f"{form}_ours", tensors, checkpoints.hub_config(**SHAPE, **extra), stray=False
            )
            stock = home / f"{form}_stock"
            shutil.copytree(ours, stock)
            config = json.loads((stock / "config.json").read_text()) | {"model_type": "deepseek_v3"}
            (stock / "config.json").write_text(json.dumps(config))
            dequantize = {} if form.endswith("kept") else {"dequantize": True}
            seconds: dict[type, list[float]] = {KimiK2ForCausalLM: [], DeepseekV3ForCausalLM: []}
            for _ in range(repeats):
                for cls, folder, options in (
                    (KimiK2ForCausalLM, ours, dequantize),
                    (DeepseekV3ForCausalLM, stock, {}),
                ):
                    start = time.perf_counter()
                    cls.from_pretrained(folder, dtype=torch.bfloat16, **options)
                    seconds[cls].append(time.perf_counter() - start)
            mine, theirs = (statistics.median(seconds[cls]) for cls in seconds)
            ratios[form] = mine / theirs
            print(f"{form:10} transformers_k2 {mine:6.2f} s   transformers {theirs:6.2f} s")
        print("ratio  " + "  ".join(f"{form} {ratio:.2f}" for form, ratio in ratios.items()))
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
