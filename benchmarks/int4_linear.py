"""Are products with packed INT4 weights faster than those with bfloat16 weights? On the shapes of K2's experts.

Every way multiplies the same rows, in turn, and the best of its rounds counts. With --threshold: from how many rows on
dequantising bands is faster than ATen's kernel, which is what `packed_linear.threshold` answers. With --native: the same
of our own kernel (quantization/cpu_kernel.py), which takes the place of ATen's.

One expert alone stays in a large cache, where a model's experts come from memory. --copies multiplies with as many equal
experts in turn, and the mean of a round counts: 28 are 230 MB packed, and 820 MB in bfloat16.

On a busy machine run one thread (OMP_NUM_THREADS=1): then only its own time on the core is counted.

    python benchmarks/int4_linear.py [--rows 1 4 8 16 64] [--dtypes bfloat16 float32] [--rounds 5] [--threshold]
                                     [--native] [--copies 28]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from transformers_k2.quantization import cpu_kernel, int4
from transformers_k2.quantization.kernel_layout import kernel_scales, to_kernel
from transformers_k2.quantization.packed_linear import linear, linear_dequantized, linear_transposed

SHAPES = [(2048, 7168), (7168, 2048)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


Operation = Callable[..., torch.Tensor]
Copies = list[tuple[torch.Tensor, ...]]


def copied(num_copies: int, *weights: torch.Tensor) -> Copies:
    return [weights, *(tuple(part.clone() for part in weights) for _ in range(num_copies - 1))]


def over(operation: Operation, x: torch.Tensor, copies: Copies) -> Operation:
    """The operation on `x` and, at each call, the next of the copies."""
    turns = cycle(copies)
    return lambda: operation(x, *next(turns))


def best(ways: dict[str, Operation], rounds: int, copies: int) -> dict[str, float]:
    """Milliseconds; the ways take turns, so a busy moment meets all of them. One thread's time is that on its core."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            for _ in range(copies):
                way()
            times[name] = min(times[name], 1e3 * (clock() - start) / copies)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threshold", action="store_true", help="INT4's ways only")
    parser.add_argument("--native", action="store_true", help="our own kernel too")
    parser.add_argument("--copies", type=int, default=1, help="experts to multiply with in turn")
    options = parser.parse_args()
    if options.native and not cpu_kernel.available():
        parser.error("--native: there is no kernel of our own here; the log says why.")
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
        wide, number = int4.dequantize(codes, scale, torch.float32), options.copies
        hub, bands = copied(number, packed, scale), copied(number, kernel, scales)
        kernels, dense = {}, {}
        for name in options.dtypes:
            kernels[name] = copied(number, kernel, kernel_scales(scale, DTYPES[name]))
            dense[name] = [] if options.threshold else copied(number, wide.to(DTYPES[name]))
        for num_rows in options.rows:
            ways: dict[str, Operation] = {}
            for name in options.dtypes:
                x = torch.randn(num_rows, num_in).to(DTYPES[name])
                grad = torch.randn(num_rows, num_out).to(DTYPES[name])
                if options.native:
                    ways[f"{name} native"] = over(cpu_kernel.linear, x, hub)
                ways[f"{name} kernel"] = over(linear, x, kernels[name])
                ways[f"{name} bands"] = over(linear_dequantized, x, bands)
                if options.native or not options.threshold:
                    ways[f"{name} bands (hub)"] = over(linear_dequantized, x, hub)
                if not options.threshold:
                    ways[f"{name} transposed"] = over(linear_transposed, grad, bands)
                    ways[f"{name} F.linear"] = over(F.linear, x, dense[name])
            times = best(ways, options.rounds, number)
            print(
                f"  {num_rows:4d} rows  " + "  ".join(f"{name} {value:.2f}" for name, value in times.items())
            )
            if not options.threshold and num_rows == options.rows[0] and "bfloat16" in options.dtypes:
                chosen = "native" if options.native else "kernel"
                ratio = times["bfloat16 F.linear"] / times[f"bfloat16 {chosen}"]
    if ratio:
        print(f"bfloat16, {options.rows[0]} row(s), against F.linear: {ratio:.2f}x")


if __name__ == "__main__":
    main()
