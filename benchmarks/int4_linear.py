"""Are products with packed INT4 weights faster than those with bfloat16 weights? On the shapes of K2's experts.

Every way multiplies the same rows, in turn, and the best of its rounds counts. With --threshold: from how many rows on
dequantising bands is faster than ATen's kernel, which is what `packed_linear.threshold` answers.

What it gives up: one expert alone stays in a large cache, where a model's experts come from memory; the ratio to bfloat16
is then larger.

On a busy machine run one thread (OMP_NUM_THREADS=1): then only its own time on the core is counted.

    python benchmarks/int4_linear.py [--rows 1 4 8 16 64] [--dtypes bfloat16 float32] [--rounds 5] [--threshold]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from transformers_k2.quantization import int4
from transformers_k2.quantization.kernel_layout import kernel_scales, to_kernel
from transformers_k2.quantization.packed_linear import linear, linear_dequantized, linear_transposed

SHAPES = [(2048, 7168), (7168, 2048)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def best(ways: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds; the ways take turns, so a busy moment meets all of them. One thread's time is that on its core."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            times[name] = min(times[name], 1e3 * (clock() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threshold", action="store_true", help="INT4's two ways only")
    options = parser.parse_args()
    torch.manual_seed(0)
    ratio = 0.0
    for num_out, num_in in SHAPES:
        codes, scale = int4.quantize(0.02 * torch.randn(num_out, num_in))
        packed = int4.pack(codes)
        kernel, scales = to_kernel(packed, scale)
        size = (kernel.nbytes + scales.nbytes) / (num_out * num_in)
        print(
            f"{num_out} x {num_in}, {torch.get_num_threads()} threads, {size:.3f} bytes a weight; milliseconds"
        )
        wide = int4.dequantize(codes, scale, torch.float32)
        narrow = wide.bfloat16()
        for num_rows in options.rows:
            x32 = torch.randn(num_rows, num_in)
            ways: dict[str, Callable[[], torch.Tensor]] = {}
            for name in options.dtypes:
                dtype = DTYPES[name]
                x = x32.to(dtype)
                grad, own = torch.randn(num_rows, num_out).to(dtype), kernel_scales(scale, dtype)
                ways[f"{name} kernel"] = partial(linear, x, kernel, own)
                ways[f"{name} bands"] = partial(linear_dequantized, x, kernel, scales)
                if not options.threshold:
                    weight = narrow if dtype == torch.bfloat16 else wide
                    ways[f"{name} bands (hub)"] = partial(linear_dequantized, x, packed, scale)
                    ways[f"{name} transposed"] = partial(linear_transposed, grad, kernel, scales)
                    ways[f"{name} F.linear"] = partial(F.linear, x, weight)
            times = best(ways, options.rounds)
            print(
                f"  {num_rows:4d} rows  " + "  ".join(f"{name} {value:.2f}" for name, value in times.items())
            )
            if not options.threshold and num_rows == options.rows[0] and "bfloat16" in options.dtypes:
                ratio = times["bfloat16 F.linear"] / times["bfloat16 kernel"]
    if ratio:
        print(f"bfloat16, {options.rows[0]} row(s), against F.linear: {ratio:.2f}x")


if __name__ == "__main__":
    main()
