"""What MuonClip costs: seconds of a step, bytes between ranks, and what knowing the largest logits adds to training.

step      Seconds for the Muon matrices of configs/debug_0_2b.json, random gradients, against torch.optim.Muon and against
          the algorithm that Moonlight published (arXiv 2502.16982), both looped over unfused matrices. Both peers
          multiply in bfloat16, which many CPUs emulate, far slower than float32; the lines "float32" give the peers
          float32 products, so that the dtype's part in the ratio can be told from the rest. bfloat16 would take a
          quarter of an hour a step there. So in all lines one matrix of each shape is timed (a tall one counts as its
          transpose) and multiplied by the number of such matrices; a whole step of MuonClip, timed too, checks that.
bytes     What four gloo ranks send in one step of debug_minute under FSDP2, counted at the collectives, against
          torch.optim.Muon on the same DTensors and against the floor, 2 (N - 1) / N of the matrices' bytes: pieces to
          the owner, results back. Stacked experts are whole on a rank and need none; torch.optim.Muon refuses stacks
          and is given one sharded matrix per expert.
overhead  Percent that QK-Clip adds to forward and backward (512 tokens) and to the whole training step. Watched attention
          runs on the fused CPU kernel with padded values, which plain attention misses; "padded" is plain attention on
          that kernel, watched by nobody. "flat" is a freshly drawn model, where any row may hold the maximum: the worst
          case. "peaked" has queries scaled until every head's largest logit is near 150, and tau 100, as in training.
          The update is the same work in all rows: it is timed once and added.

Lines alternate and medians are compared. About five minutes on two cores; --quick takes one, on a tiny model.

    python benchmarks/muonclip.py [--parts step bytes overhead] [--threads 2] [--repeats 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import _muon as torch_muon
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip
from transformers_k2.optim.muon import matrix_shapes
from transformers_k2.resources import find

LR, MOMENTUM, DECAY = 2e-4, 0.95, 0.1
SLOW = 2.0  # seconds; what takes longer is timed once
RANKS = 4
CLOCK = [time.perf_counter]
WAITING = (
    "wait_tensor",
    "_wrap_tensor_autograd",
)  # operations of the collectives' namespace that send nothing
Step = Callable[[], Any]


# -- step


def moonlight(weights: list[Tensor], dtype: torch.dtype) -> Step:
    """Moonlight's update, matrix by matrix: heavy-ball sum, Nesterov, five quintics in `dtype`, scale 0.2 sqrt(max side)."""
    sums = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step() -> None:
        for weight, total in zip(weights, sums, strict=True):
            assert weight.grad is not None
            total.mul_(MOMENTUM).add_(weight.grad)
            tall = weight.shape[0] > weight.shape[1]
            x = weight.grad.add(total, alpha=MOMENTUM).to(dtype)
            x = x.T if tall else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            weight.mul_(1 - LR * DECAY)
            weight.add_(x.T if tall else x, alpha=-LR * 0.2 * max(weight.shape) ** 0.5)

    return step


def float32_products(
    grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """torch.optim.Muon's Newton-Schulz without its rounding to bfloat16."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.shape[0] > grad.shape[1] else x


def torch_step(weights: list[Tensor], dtype: torch.dtype) -> Step:
    """torch.optim.Muon's own step; for float32 its Newton-Schulz is exchanged."""
    optimizer = torch.optim.Muon(
        weights, lr=LR, weight_decay=DECAY, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    if dtype is torch.bfloat16:
        return optimizer.step

    def step() -> None:
        with mock.patch.object(torch_muon, "_zeropower_via_newtonschulz", float32_products):
            optimizer.step()

    return step


def ours(weights: list[Tensor], dtype: str) -> Step:
    """MuonClip with the options of `for_model`, and `ns_dtype`."""
    return MuonClip(weights, lr=LR, ns_dtype=dtype, ns_iteration="auto").step


LINES: dict[str, Callable[[list[Tensor]], Step]] = {
    "MuonClip": lambda weights: ours(weights, "auto"),
    "torch.optim.Muon": lambda weights: torch_step(weights, torch.bfloat16),
    "Moonlight": lambda weights: moonlight(weights, torch.bfloat16),
    "MuonClip bfloat16": lambda weights: ours(weights, "bfloat16"),
    "torch.optim.Muon float32": lambda weights: torch_step(weights, torch.float32),
    "Moonlight float32": lambda weights: moonlight(weights, torch.float32),
}


def time_step(config: str, repeats: int) -> tuple[list[str], float]:
    """Ratios to print last, and the seconds of a whole step of MuonClip."""
    model = build(config)
    whole = time_whole_step(model)
    counts: Counter[tuple[int, int]] = Counter()
    for group in MuonClip.for_model(model, LR, qk_clip_tau=None).param_groups:
        if group["algorithm"] == "muon":
            for weight in group["params"]:
                for count, rows, columns in matrix_shapes(tuple(weight.shape), group["row_blocks"]):
                    counts[min(rows, columns), max(rows, columns)] += count
    del model
    check_lines(min(counts))
    print(f"{'seconds per matrix':22}" + "".join(f"{line.replace('.optim.', ' '):>19}" for line in LINES))
    totals = dict.fromkeys(LINES, 0.0)
    for shape, count in sorted(counts.items()):
        seconds = alternate({line: make(matrix(shape)) for line, make in LINES.items()}, repeats)
        for line, value in seconds.items():
            totals[line] += count * value
        print(
            f"{count:5} of {shape[0]:4} x {shape[1]:<5}   "
            + "".join(f"{value:19.4f}" for value in seconds.values())
        )
    print(f"{'all, extrapolated':22}" + "".join(f"{value:19.1f}" for value in totals.values()))
    print(f"MuonClip.for_model(...).step() of the whole model, measured: {whole['matrices']:.1f} s")
    mine = totals["MuonClip"]
    ratios = [
        "step: peer / MuonClip (ns_dtype auto)   "
        + "   ".join(f"{line} {totals[line] / mine:.2f}" for line in LINES if line != "MuonClip"),
        "step: peer / MuonClip bfloat16          "
        + "   ".join(
            f"{line} {totals[line] / totals['MuonClip bfloat16']:.2f}"
            for line in ("torch.optim.Muon", "Moonlight")
        ),
    ]
    return ratios, whole["all"]


def matrix(shape: tuple[int, int]) -> list[Tensor]:
    """One float32 weight with a gradient, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
    weight.grad = torch.randn(shape, generator=generator)
    return [weight]


def check_lines(shape: tuple[int, int]) -> None:
    """All lines make the same first step, up to their rounding; in bfloat16 ours has torch.optim.Muon's bits."""
    weights = {line: matrix(shape) for line in LINES}
    start = weights["MuonClip"][0].detach().clone()
    for line, make in LINES.items():
        make(weights[line])()
    assert torch.equal(weights["MuonClip bfloat16"][0], weights["torch.optim.Muon"][0])
    change = weights["torch.optim.Muon float32"][0] - start
    for line, (weight,) in weights.items():
        assert (weight - start - change).norm() < 0.05 * change.norm(), line


def alternate(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns; slow ones take one turn, quick ones four times as many."""
    seconds: dict[str, list[float]] = {name: [clock(step)] for name, step in steps.items()}
    turns = {
        name: 1 if first > SLOW else repeats if first > SLOW / 20 else 4 * repeats
        for name, (first,) in seconds.items()
    }
    for turn in range(1, 4 * repeats):
        for name, step in steps.items():
            if turn < turns[name]:
                seconds[name].append(clock(step))
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_whole_step(model: nn.Module) -> dict[str, float]:
    """Seconds of MuonClip.for_model's second step: its matrices alone, and AdamW's parameters as well."""
    optimizer = MuonClip.for_model(model, lr=0.0, weight_decay=0.0, qk_clip_tau=None)
    matrices = [
        p for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]
    ]
    for parameter in matrices:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    seconds = {"matrices": clock(optimizer.step)}
    for parameter in matrices:
        parameter.grad = None
    rest = [parameter for parameter in model.parameters() if not any(parameter is m for m in matrices)]
    for parameter in rest:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    seconds["all"] = seconds["matrices"] + clock(optimizer.step)
    model.zero_grad()
    return seconds


# -- bytes


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends to others, by collective; a collective without a rule is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # DTensor turns itself into local operations and collectives, which come here in their turn.
            return NotImplemented
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in WAITING:
            self.calls[name] += 1
            self.bytes[name] += self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple[Any, ...]) -> int:
        if name == "all_gather_into_tensor":  # (input, group size, group)
            return num_bytes(args[0]) * (RANKS - 1)
        if name == "all_reduce":  # (input, operation, group)
            return 2 * num_bytes(args[0]) * (RANKS - 1) // RANKS
        assert name == "alltoall_base_", f"no rule for the bytes of {name}"
        outgoing, sizes = args[1], args[4]  # (output, input, group, output sizes, input sizes)
        return num_bytes(outgoing) - sizes[dist.get_rank()] * outgoing.element_size()


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count_bytes() -> list[str]:
    """Ratios to print last."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(count_on_rank, (folder,), nprocs=RANKS)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    print(f"\n{RANKS} ranks, FSDP2: bytes sent by all ranks together in one step")
    print(
        f"{'':40}{'matrices':>9}{'calls':>7}{'counted':>13}{'floor':>13}{'x floor':>9}   collectives of a rank"
    )
    sent = {}
    for line, first in ranks[0].items():
        sent[line] = sum(rank[line]["bytes"] for rank in ranks)
        calls = ", ".join(f"{count} {name}" for name, count in first["calls"].items())
        print(
            f"{line:40}{first['matrices']:9}{sum(first['calls'].values()):7}{sent[line]:13,}{first['floor']:13,}"
            + (f"{sent[line] / first['floor']:9.2f}" if first["floor"] else f"{'-':>9}")
            + f"   {calls or 'none'}"
        )
        if "own" in first:
            own = sum(rank[line]["own"] for rank in ranks)
            assert own == sent[line], f"{line}: communicated_bytes says {own}, counted were {sent[line]}"
    print("MuonClip.communicated_bytes says the same as what was counted")
    mine, peer = sent["MuonClip bfloat16, all"], sent["torch.optim.Muon, all"]
    return [
        f"bytes: torch.optim.Muon / MuonClip      dense matrices "
        f"{sent['torch.optim.Muon, dense'] / sent['MuonClip bfloat16, dense']:.2f}   with experts {peer / mine:.2f}"
    ]


def count_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = build("debug_minute")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    matrices = {
        name: parameter
        for group in MuonClip.for_model(model, LR, qk_clip_tau=None).param_groups
        if group["algorithm"] == "muon"
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    dense = [parameter for parameter in matrices.values() if parameter.ndim == 2]
    stacks = [parameter for parameter in matrices.values() if parameter.ndim == 3]
    singles = []
    for name, stack in matrices.items():
        if stack.ndim == 3:
            count, rows, columns = stack.shape
            halves = 2 if name.endswith("gate_up_proj") else 1
            for _ in range(count * halves):
                single = distribute_tensor(torch.randn(rows // halves, columns), mesh, [Shard(0)])
                singles.append(nn.Parameter(single))
    seen: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        for which, experts in (("dense", []), ("all", stacks)):
            set_gradients(model.parameters(), [*dense, *experts])
            optimizer = MuonClip.for_model(model, LR, qk_clip_tau=None, ns_dtype=dtype)
            seen[f"MuonClip {dtype}, {which}"] = {
                **count_step(optimizer, dense, getattr(torch, dtype).itemsize),
                "matrices": len(dense) + (len(singles) if experts else 0),
                "own": optimizer.communicated_bytes,
            }
    for which, experts in (("dense", []), ("all", singles)):
        given = [*dense, *experts]
        set_gradients(given, given)
        optimizer = torch.optim.Muon(given, lr=LR, adjust_lr_fn="match_rms_adamw")
        seen[f"torch.optim.Muon, {which}"] = {**count_step(optimizer, given, 2), "matrices": len(given)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def set_gradients(every: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    """Random gradients on the wanted DTensors, none on others."""
    for parameter in every:
        parameter.grad = None
    for parameter in wanted:
        gradient = torch.zeros_like(parameter)
        assert isinstance(gradient, DTensor)
        gradient.to_local().normal_()
        parameter.grad = gradient


def count_step(optimizer: torch.optim.Optimizer, moved: list[Any], itemsize: int) -> dict[str, Any]:
    """The traffic of the second step, and the floor for the matrices that have to move."""
    optimizer.step()
    with Traffic() as traffic:
        optimizer.step()
    floor = 2 * (RANKS - 1) * sum(matrix.numel() for matrix in moved) * itemsize // RANKS
    return {"bytes": traffic.bytes.total(), "calls": dict(traffic.calls), "floor": floor}


# -- overhead

_sdpa = F.scaled_dot_product_attention


def padded_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """F.scaled_dot_product_attention with values padded to the width of queries, for the fused kernel's sake."""
    padded = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return _sdpa(query, key, padded, *args, **kwargs)[..., : value.shape[-1]]


def time_overhead(config: str, repeats: int, update: float) -> list[str]:
    """Ratios to print last."""
    model = build(config).train()
    ids = torch.randint(3, 1000, (1, 512), generator=torch.Generator().manual_seed(0))
    clipped = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".q_b_proj." in name or ".kv_b_proj." in name
    }
    ratios = []
    print(f"\n512 tokens; the update of all parameters takes {update:.2f} s in every row")
    print(f"{'':24}{'forward + backward s':>22}{'collect + clip s':>18}{'whole step s':>14}")
    for regime in ("flat", "peaked"):
        largest = largest_logits(model, ids)
        if regime == "peaked":
            scale_heads(model, largest, 150.0)
            tau = 100.0
        else:
            tau = 0.5 * min(float(logits.min()) for logits in largest.values())
        kept = {name: parameter.detach().clone() for name, parameter in clipped.items()}
        rows: dict[str, float | None] = {
            "plain": None,
            "padded": None,
            "none over tau": 1e9,
            "all over tau": tau,
        }
        passes: dict[str, list[float]] = {row: [] for row in rows}
        clips: dict[str, list[float]] = {row: [] for row in rows}
        steps: dict[str, list[float]] = {row: [] for row in rows}
        one_round(model, ids, None, "plain")  # warm
        for _ in range(repeats):
            for row, threshold in rows.items():
                spent, clip = one_round(model, ids, threshold, row)
                passes[row].append(spent)
                clips[row].append(clip)
                steps[row].append(spent + clip + update)
                with torch.no_grad():
                    for name, parameter in clipped.items():
                        parameter.copy_(kept[name])
        for row in rows:
            spent, clip, step = (statistics.median(column[row]) for column in (passes, clips, steps))
            print(f"{regime:8}{row:16}{spent:22.3f}{clip:18.4f}{step:14.3f}")
        for row in ("none over tau", "all over tau"):
            for base in ("plain", "padded"):
                ratios.append(
                    f"overhead: {regime:6}  {row:13}  against {base:6}  forward + backward "
                    f"{percent(passes[row], passes[base]):+5.1f} %  whole step {percent(steps[row], steps[base]):+5.1f} %"
                )
    return ratios


def percent(mine: Sequence[float], base: Sequence[float]) -> float:
    """How much longer mine takes: the median over the rounds, so that a machine's slow minute hits both."""
    return 100 * (statistics.median(a / b for a, b in zip(mine, base, strict=True)) - 1)


def one_round(model: KimiK2ForCausalLM, ids: Tensor, tau: float | None, row: str) -> tuple[float, float]:
    """Seconds of forward and backward, and of the step's own part: no parameter has a gradient, so it only clips."""
    optimizer = MuonClip.for_model(model, lr=0.0, qk_clip_tau=tau)
    patched = mock.patch.object(F, "scaled_dot_product_attention", padded_attention)
    with patched if row == "padded" else nullcontext():
        passes = clock(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    model.zero_grad()
    clip = clock(optimizer.step)
    optimizer.close()
    over = [gamma < 1 for stats in optimizer.qk_clip_stats().values() for gamma in stats["gamma"].tolist()]
    assert all(over) if row == "all over tau" else not any(over), f"{row}: {sum(over)} of {len(over)} heads"
    return passes, clip


def largest_logits(model: KimiK2ForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Exact, per attention module and head; nothing is changed."""
    optimizer = MuonClip.for_model(model, lr=0.0, qk_clip_tau=1e-6)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(ids, use_cache=False)
    optimizer.step()
    optimizer.close()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return {name: stats["max_logit"] for name, stats in optimizer.qk_clip_stats().items()}


@torch.no_grad()
def scale_heads(model: KimiK2ForCausalLM, largest: dict[str, Tensor], target: float) -> None:
    """Scale every head's queries so that its largest logit comes near `target`."""
    for name, logits in largest.items():
        weight: Any = model.get_submodule(name).q_b_proj.weight
        weight.view(len(logits), -1, weight.shape[1]).mul_((target / logits)[:, None, None])


# -- all


def build(config: str) -> KimiK2ForCausalLM:
    torch.manual_seed(0)
    options = json.loads(find("configs", config).read_text())
    return KimiK2ForCausalLM(KimiK2Config(**options)).float()


def clock(step: Step) -> float:
    """Seconds, by the clock that --cpu-time chooses."""
    start = CLOCK[-1]()
    step()
    return CLOCK[-1]() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("step", "bytes", "overhead")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="default: all three")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of step and overhead")
    parser.add_argument(
        "--repeats", type=int, default=5, help=f"turns of each line; above {SLOW:g} s a matrix: one"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process' CPU seconds: for busy machines, with --threads 1",
    )
    parser.add_argument(
        "--quick", action="store_true", help="configs/debug_minute.json and 3 turns: shows that it works"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cpu_time:
        CLOCK.append(time.process_time)
    config = "debug_minute" if arguments.quick else "debug_0_2b"
    repeats = min(arguments.repeats, 3) if arguments.quick else arguments.repeats
    parts, started, ratios, update = arguments.parts, time.perf_counter(), [], None
    seconds = "CPU seconds" if arguments.cpu_time else "seconds"
    print(f"{config}, {arguments.threads} threads, {seconds}, median of {repeats}")
    if "step" in parts:
        found, update = time_step(config, repeats)
        ratios += found
    if "bytes" in parts:
        ratios += count_bytes()
    if "overhead" in parts:
        ratios += time_overhead(
            config, repeats, time_whole_step(build(config))["all"] if update is None else update
        )
    print(f"\n{time.perf_counter() - started:.0f} s in all", *ratios, sep="\n")


if __name__ == "__main__":
    main()
