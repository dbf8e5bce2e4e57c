"""What spawned ranks run for tests/parallel/test_planner.py: one training step for real, its bytes counted by torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_k2 import KimiK2Config, MuonClip
from transformers_k2.parallel.layout import Layout
from transformers_k2.parallel.model import build_model
from transformers_k2.parallel.pipeline import Pipeline
from transformers_k2.parallel.weights import RandomWeights
from transformers_k2.recompute import apply_recompute

NAMES = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "exchange",
    "all_to_all_single": "exchange",
}


class Collectives(TorchDispatchMode):
    """Counts the bytes of every collective that torch dispatches: of the whole tensor, as a ring would move it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(NAMES.values(), 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name in NAMES:
            kind = NAMES[name]
            first, second = args[0], args[1]
            if kind in ("gather", "reduce_scatter"):  # output, input
                large, small = max(first.nbytes, second.nbytes), min(first.nbytes, second.nbytes)
                self.bytes[kind] += large - small
            elif kind == "all_reduce":
                size = first[0].nbytes
                # Told apart from the small ones by the test: gradients only are reduced in a backward pass.
                self.bytes[kind] += size
            else:
                self.bytes[kind] += (second if name == "alltoall_base_" else first).nbytes
        return func(*args, **(kwargs or {}))


def run(
    rank: int, size: int, store: str, config: dict[str, Any], cases: list[dict[str, Any]], out: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results = [_step(rank, KimiK2Config.from_dict(dict(config)), case) for case in cases]
    Path(out, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _step(rank: int, config: KimiK2Config, case: dict[str, Any]) -> dict[str, Any]:
    layout = Layout(**case["layout"])
    model = build_model(config, layout, RandomWeights(config, 0), mixed_precision=case["mixed"]).train()
    if case["full"]:
        apply_recompute(model, ["full"])
    generator = torch.Generator().manual_seed(layout.data_rank(rank))
    ids = torch.randint(3, config.vocab_size, (case["micro_batches"], case["length"]), generator=generator)
    copies = None if layout.splits_the_model else dist.group.WORLD
    optimizer = MuonClip.for_model(
        model, lr=1e-3, ns_dtype="bfloat16", qk_clip_tau=None, process_group=copies
    )
    with Collectives() as counted:
        if layout.pipeline > 1:
            pipeline = Pipeline(model, layout, case.get("schedule", "1f1b"), case.get("per_run"))
            pipeline.step({"input_ids": ids, "labels": ids}, 1, ids.numel())
        else:
            for row in ids:
                model(row[None], labels=row[None], use_cache=False).loss.backward()
            if not layout.splits_the_model:
                for parameter in model.parameters():  # what DDP does after the last micro-batch
                    if parameter.grad is None:  # an expert without a token
                        parameter.grad = torch.zeros_like(parameter)
                    dist.all_reduce(parameter.grad)
    optimizer.step()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return {
        "bytes": counted.bytes,
        "weights": sum(part.nbytes for part in local),
        "numel": sum(part.numel() for part in local),
        "optimizer": sum((v.to_local() if isinstance(v, DTensor) else v).nbytes for v in states),
        "muon": optimizer.communicated_bytes,
    }
