"""What each rank does in tests/parallel, and the one process it is held against.

The one process computes its loss from logits, in one forward pass over the whole global batch, and its gradients,
norms and steps come from there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, MuonClip
from transformers_k2.parallel import CheckpointWeights, Layout, build_model
from transformers_k2.parallel.pipeline import Pipeline, clip_grad_norm

LENGTH, VOCABULARY = 11, 331
# Low enough that heads are clipped; AdamW's eps is far above float32's noise, of which its first steps show the sign.
MUON: dict[str, Any] = {"lr": 2e-2, "qk_clip_tau": 0.5, "ns_dtype": "float32", "eps": 1e-3}
STEPS = 3
# processes -> name -> layout, schedule, rows of a micro-batch; a column has 6 rows, 3 if there are two columns, 2 of four.
CASES: dict[int, dict[str, tuple[dict[str, int], str, int]]] = {
    2: {
        "two stages": ({"pipeline": 2}, "1f1b", 2),  # three micro-batches
        "gpipe": ({"pipeline": 2}, "gpipe", 1),
        "an odd rest": ({"pipeline": 2}, "1f1b", 4),  # one micro-batch, then a smaller one
    },
    4: {
        "four stages": ({"pipeline": 4}, "1f1b", 1),
        "fewer micro-batches than stages": ({"pipeline": 4}, "1f1b", 3),
        "sharded": ({"pipeline": 2, "shard": 2}, "1f1b", 1),
        "experts": ({"pipeline": 2, "shard": 2, "expert": 2}, "1f1b", 1),
        "experts, an odd rest": ({"pipeline": 2, "shard": 2, "expert": 2}, "gpipe", 2),
        "replicas": ({"pipeline": 2, "replicate": 2}, "1f1b", 2),
    },
    8: {
        "replicas of experts": ({"pipeline": 2, "replicate": 2, "shard": 2, "expert": 2}, "1f1b", 1),
        "experts in part": ({"pipeline": 2, "shard": 4, "expert": 2}, "1f1b", 1),
    },
}


def global_batch(kind: str, ranks: int = 1) -> dict[str, Tensor]:
    """Rows with padding on the left and few labels in some, or packed ones: what micro-batches must not average."""
    generator = torch.Generator().manual_seed(7)
    rows = 8 if ranks == 8 else 6
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = ids.clone()
    if kind == "packed":
        starts = torch.rand(rows, LENGTH, generator=generator) < 0.25
        starts[:, 0] = True
        index = torch.arange(LENGTH).expand(rows, LENGTH)
        positions = index - torch.where(starts, index, 0).cummax(1).values
        labels[starts] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    labels[0, :-2] = -100
    labels[1] = -100
    if kind == "plain":
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[2, :4] = mask[5, :9] = 0
    labels[mask == 0] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}


def num_items(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def share(batch: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The rows of this rank's column."""
    column, columns = layout.data_rank(dist.get_rank()), layout.data_size
    return {name: rows.chunk(columns)[column] for name, rows in batch.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in model.state_dict().items()}


def run(function: Callable[[int, int, Path], None], ranks: int, folder: Path) -> None:
    """`function(rank, ranks, folder)` in processes that share the seconds of their imports."""
    preload = ["transformers_k2.parallel.pipeline", "transformers.models.deepseek_v3.modeling_deepseek_v3"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    mp.start_processes(function, args=(ranks, folder), nprocs=ranks, start_method="forkserver")


def start(rank: int, ranks: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    store = folder / f"store{ranks}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)


def load(folder: Path, layout: Layout, **options: Any) -> Any:
    config = KimiK2Config.from_pretrained(folder / "hub")
    return build_model(config, layout, CheckpointWeights(folder / "hub"), **options).train()


# -- tests/parallel/test_pipeline.py


def run_pipeline(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    for name, (sizes, schedule, micro_batch_size) in CASES[ranks].items():
        seen: dict[str, Any] = {}
        layout = Layout(**sizes)
        model = load(folder, layout)
        pipeline = Pipeline(model, layout, schedule)
        for kind in ("padded", "packed"):
            model.zero_grad()
            batch = global_batch(kind, ranks)
            rows = share(batch, layout)
            seen[f"{kind} evaluated"] = pipeline.evaluate(rows, micro_batch_size)
            seen[f"{kind} loss"] = pipeline.step(rows, micro_batch_size, num_items(batch))
            seen[f"{kind} grads"] = gradients(model)
            seen[f"{kind} norm"] = pipeline.clip_grad_norm(None)
            seen[f"{kind} norm again"] = pipeline.clip_grad_norm(0.25)
            seen[f"{kind} clipped"] = gradients(model)
            model.zero_grad()
            for _ in range(2):
                pipeline.step(rows, micro_batch_size, 2 * int(num_items(batch)))
                pipeline.evaluate(rows, micro_batch_size)
            seen[f"{kind} twice a half"] = gradients(model)
            model.zero_grad()
            pipeline.micro_batches_per_run = 2
            seen[f"{kind} loss in runs"] = pipeline.step(rows, micro_batch_size, num_items(batch))
            seen[f"{kind} grads in runs"] = gradients(model)
            seen[f"{kind} evaluated in runs"] = pipeline.evaluate(rows, micro_batch_size)
            pipeline.micro_batches_per_run = None
        if layout.data_size > 1:
            seen["reductions"] = [num_reductions(pipeline, rows, size) for size in (1, 3)]
            seen["half precision"] = half_precision(folder, layout, schedule, rows, num_items(batch))
        if name in ("two stages", "experts", "replicas"):
            seen |= train(folder, layout, schedule, micro_batch_size)
        torch.save(seen, folder / f"{name} {rank}.pt")
    dist.destroy_process_group()


def num_reductions(pipeline: Pipeline, rows: dict[str, Tensor], micro_batch_size: int) -> int:
    """How often FSDP reduces gradients in a step."""
    count = 0
    reduce: Callable[..., Any] = _fsdp_param_group.foreach_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return reduce(*args, **kwargs)

    _fsdp_param_group.foreach_reduce = counted
    pipeline.step(rows, micro_batch_size, 100)
    _fsdp_param_group.foreach_reduce = reduce
    return count


def half_precision(
    folder: Path, layout: Layout, schedule: str, rows: dict[str, Tensor], items: Tensor
) -> dict[str, Any]:
    """FSDP2's mixed precision, where hidden states travel as bfloat16."""
    model = load(folder, layout, mixed_precision=True)
    loss = Pipeline(model, layout, schedule).step(rows, 1, items)
    return {"loss": loss, "grads": gradients(model)}


def train(folder: Path, layout: Layout, schedule: str, micro_batch_size: int) -> dict[str, Any]:
    """Steps of MuonClip, with evaluations between that no statistic may count.

    Gradient checkpointing and a loss in chunks, because the one process has neither.
    """
    model = load(folder, layout)
    model.gradient_checkpointing_enable()
    model.loss_chunk_tokens = 5
    pipeline = Pipeline(model, layout, schedule)
    optimizer = MuonClip.for_model(model, **MUON, process_group=pipeline.data_group)
    batch = global_batch("plain")
    for _ in range(STEPS):
        pipeline.step(share(batch, layout), micro_batch_size, num_items(batch))
        pipeline.clip_grad_norm(1.0)
        pipeline.evaluate(share(global_batch("packed"), layout), micro_batch_size)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model), "stats": optimizer.qk_clip_stats()}


def one_process(folder: Path) -> KimiK2ForCausalLM:
    return KimiK2ForCausalLM.from_pretrained(folder / "hub").train()


def one_loss(model: KimiK2ForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """The mean over all predicted labels, from the logits."""
    inputs = {name: rows for name, rows in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def train_one_process(folder: Path) -> dict[str, Any]:
    model = one_process(folder)
    optimizer = MuonClip.for_model(model, **MUON)
    for _ in range(STEPS):
        one_loss(model, global_batch("plain")).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model), "stats": optimizer.qk_clip_stats()}


# -- tests/parallel/test_model.py

SHARES: dict[str, dict[str, int]] = {
    "sharded": {"shard": 4},
    "experts": {"shard": 4, "expert": 4},
    "experts in part": {"shard": 4, "expert": 2},
    "replicas": {"replicate": 2, "shard": 2, "expert": 2},
    "stages": {"pipeline": 4},
    "stages of experts": {"pipeline": 2, "shard": 2, "expert": 2},
}


def run_model(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    batch = global_batch("plain")
    batch = {name: rows[:ranks] for name, rows in batch.items()}
    for name, sizes in SHARES.items():
        layout = Layout(**sizes)
        model = load(folder, layout)
        seen: dict[str, Any] = {
            "weights": weights(model),
            "local": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()),
            "total": sum(p.numel() for p in model.parameters()),
        }
        if layout.pipeline == 1:
            rows = share(batch, layout)
            inputs = rows | {"num_items_in_batch": num_items(batch)}
            (model(**inputs, use_cache=False).loss * layout.data_size).backward()
            seen["grads"] = gradients(model)
            seen["norm"] = clip_grad_norm(model, layout, 0.5)
            seen["clipped"] = gradients(model)
        torch.save(seen, folder / f"{name} {rank}.pt")
    dist.destroy_process_group()
