"""Two processes over gloo: every layout of transformers' DistributedConfig loads a hub folder, computes and saves it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from transformers_k2 import KimiK2ForCausalLM

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensors": {"tp_size": 2},
    "tensors and experts": {"tp_size": 2, "ep_size": 2},
    "shards": {"fsdp_size": 2},
    "shards and experts": {"fsdp_size": 2, "ep_size": 2},
    "stages": {"pp_size": 2},
}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
# A sum over two ranks is rounded in another order; logits are of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run_rank(rank: int, folder: Path, ids: torch.Tensor) -> None:
    """Everything a rank sees, as one file per rank and layout; models other than stages are saved again."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, sizes in LAYOUTS.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "hub", distributed_config=DistributedConfig(**sizes)
        )
        assert isinstance(model, KimiK2ForCausalLM)  # FSDP makes a subclass of it
        weights = list(model.parameters())
        local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
            logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
            text = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        seen = {"logits": logits, "text": text, "held": sum(weight.numel() for weight in local)}
        if "pp_size" in sizes:
            with pytest.raises(ValueError, match="2 pipeline stages cannot be saved"):
                model.save_pretrained(folder / "saved" / name)
        else:
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm = sum(
                full(weight.grad).square().sum() for weight in weights if weight.grad is not None
            ).sqrt()
            seen |= {"loss": loss.detach(), "gradient norm": norm}
            model.save_pretrained(folder / "saved" / name, max_shard_size="100KB")
        torch.save(seen, folder / f"{name} {rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def full(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.slow
def test_every_layout_equals_one_process(tiny_model: KimiK2ForCausalLM, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
    ids = torch.randint(3, 331, (2, 11))
    mp.spawn(run_rank, args=(tmp_path, ids), nprocs=2)

    loss = tiny_model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    norm = sum(weight.grad.square().sum() for weight in tiny_model.parameters()).sqrt()
    with torch.no_grad():
        logits = tiny_model(ids, use_cache=False).logits
    text = tiny_model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    total = sum(weight.numel() for weight in tiny_model.parameters())
    one = {
        key: value
        for path in (tmp_path / "hub").glob("*.safetensors")
        for key, value in load_file(path).items()
    }
    for name, sizes in LAYOUTS.items():
        held = 0
        for rank in range(2):
            seen = torch.load(tmp_path / f"{name} {rank}.pt")
            torch.testing.assert_close(
                seen["logits"], logits, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert torch.equal(seen["text"], text), name
            held += seen["held"]
            if "pp_size" not in sizes:
                torch.testing.assert_close(seen["loss"], loss.detach(), **CLOSE)
                torch.testing.assert_close(seen["gradient norm"], norm, **CLOSE)
        assert total <= held < 1.8 * total, f"{name}: {held} of {total} weights held, nothing is split"
        if "pp_size" in sizes:
            continue
        saved = {
            key: value
            for path in (tmp_path / "saved" / name).glob("*.safetensors")
            for key, value in load_file(path).items()
        }
        assert saved.keys() == one.keys()
        assert all(torch.equal(saved[key], value) for key, value in one.items()), name
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / name)
