"""Two processes over gloo: INT4 and FP8 checkpoints split in every layout of transformers' DistributedConfig."""

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

from checkpoints import (
    FP8_CONFIG,
    INT4_CONFIG,
    decoded,
    hub_config,
    per_expert,
    stock_model,
    to_fp8,
    to_int4,
    write,
)
from transformers_k2 import KimiK2ForCausalLM

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensors": {"tp_size": 2},
    "tensors and experts": {"tp_size": 2, "ep_size": 2},
    "shards": {"fsdp_size": 2},
    "shards and experts": {"fsdp_size": 2, "ep_size": 2},
    "stages": {"pp_size": 2},
}
CODECS = {"int4": (to_int4, INT4_CONFIG), "fp8": (to_fp8, FP8_CONFIG)}
WIDTH = {"moe_intermediate_size": 128}  # two ranks have two groups of 32 each


def run_rank(rank: int, folder: Path, ids: torch.Tensor) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for codec in CODECS:
        for name, sizes in LAYOUTS.items():
            model = AutoModelForCausalLM.from_pretrained(
                folder / codec, dtype=torch.float32, distributed_config=DistributedConfig(**sizes)
            )
            assert isinstance(model, KimiK2ForCausalLM)  # FSDP makes a subclass of it
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits
            parts = [(name, value) for name, value in model.named_parameters() if ".experts." in name]
            local = [value.to_local() if isinstance(value, DTensor) else value for _, value in parts]
            seen = {
                "logits": logits.full_tensor() if isinstance(logits, DTensor) else logits,
                "held": sum(value.nbytes for value in local),
                "dtypes": {value.dtype for value in local},
            }
            torch.save(seen, folder / f"{codec} {name} {rank}.pt")
            if "pp_size" not in sizes:
                model.save_pretrained(folder / "saved" / codec / name)
            dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_layout_equals_one_process(tmp_path: Path) -> None:
    tensors = per_expert(stock_model(**WIDTH))
    ids = torch.randint(3, 320, (2, 9))
    for codec, (encode, quantization) in CODECS.items():
        write(
            tmp_path / codec,
            encode(tensors),
            hub_config(quantization_config=quantization, **WIDTH),
            stray=False,
        )
    mp.spawn(run_rank, args=(tmp_path, ids), nprocs=2)
    for codec, (encode, _) in CODECS.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / codec, dtype=torch.float32)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        weights = {name: value for name, value in model.state_dict().items() if ".experts." in name}
        total = sum(value.nbytes for value in weights.values())
        stored = encode(tensors)
        expected = stored if codec == "int4" else decoded(stored, torch.float32)
        for name, sizes in LAYOUTS.items():
            ranks = [torch.load(tmp_path / f"{codec} {name} {rank}.pt") for rank in range(2)]
            for seen in ranks:
                torch.testing.assert_close(
                    seen["logits"],
                    logits,
                    rtol=1e-4,
                    atol=2e-5,
                    msg=lambda text, at=f"{codec} {name}": f"{at}: {text}",
                )
                if codec == "int4" and "pp_size" not in sizes:
                    assert seen["dtypes"] == {torch.int32, torch.bfloat16}, name
            if "pp_size" in sizes:
                continue
            assert sum(seen["held"] for seen in ranks) == total, f"{codec} {name}"  # nothing twice
            files = (tmp_path / "saved" / codec / name).glob("*.safetensors")
            saved = {key: value for file in files for key, value in load_file(file).items()}
            assert saved.keys() == expected.keys(), f"{codec} {name}"
            for key, value in expected.items():
                like = saved[key].to(value.dtype) if value.is_floating_point() else saved[key]
                assert torch.equal(like, value), f"{codec} {name} {key}"


def test_tensor_parallelism_keeps_groups_whole(tmp_path: Path) -> None:
    folder = write(tmp_path, to_int4(per_expert(stock_model())), hub_config(quantization_config=INT4_CONFIG))
    with pytest.raises(
        ValueError, match=r"width 96 have 3 INT4 groups of 32, which tp_size 2 does not divide"
    ):
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
