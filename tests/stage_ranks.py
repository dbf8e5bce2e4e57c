"""What each rank does in tests/parallel/test_stages.py, and the one process of transformers' own that it is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.generation import StoppingCriteria

from checkpoints import ROPE, SHAPE
from pipeline_ranks import start
from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.attention import TP_PLAN_HEADS
from transformers_k2.lazy_tensors import Stored
from transformers_k2.parallel.stages import Stage, load_stage

NUM_LAYERS = 5
# Two groups of 32 for each of two ranks.
SIZES = {"num_hidden_layers": NUM_LAYERS, "moe_intermediate_size": 128, "initializer_range": 0.05}
END = {"eos_token_id": None, "pad_token_id": 2}
_GREEDY = {"do_sample": False, "max_new_tokens": 5} | END

PROMPT = torch.tensor([[5, 9, 301, 17, 44, 5, 9, 301, 17, 120, 33]])
_PADDED = torch.tensor([[7, 250, 31, 8, 77, 190, 12], [2, 2, 2, 2, 61, 99, 14]])
_ROWS = {"inputs": _PADDED, "attention_mask": (_PADDED != 2).long()}

# Name -> arguments of generate; stages and the one process get the same.
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"inputs": PROMPT, **_GREEDY, "max_new_tokens": 20},
    "left-padded": _ROWS | _GREEDY,
    "in chunks": _ROWS | _GREEDY | {"prefill_chunk_size": 3},
    "one token": {"inputs": PROMPT[:, :1], **_GREEDY},
    "beams": _ROWS | _GREEDY | {"num_beams": 3, "max_new_tokens": 8},
    "beams in chunks": _ROWS | _GREEDY | {"num_beams": 3, "prefill_chunk_size": 2},
    "sampled": _ROWS | END | {"do_sample": True, "max_new_tokens": 6, "temperature": 1.5},
    "prompt lookup": {"inputs": PROMPT, **_GREEDY, "prompt_lookup_num_tokens": 3, "max_new_tokens": 12},
    "static cache": _ROWS | _GREEDY | {"cache_implementation": "static"},
    "static cache in chunks": _ROWS | _GREEDY | {"cache_implementation": "static", "prefill_chunk_size": 2},
    "without a cache": _ROWS | _GREEDY | {"use_cache": False},
}
PLANS: dict[str, dict[str, Any]] = {"auto": {}, "with heads": {"tp_plan": TP_PLAN_HEADS}}


def one_process(tensors: dict[str, Tensor]) -> DeepseekV3ForCausalLM:
    """transformers' own class in float32, with a hub checkpoint's plain tensors."""
    config = DeepseekV3Config(**(SHAPE | ROPE | SIZES | {"num_mtp_layers": 0}))
    return DeepseekV3ForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32
    ).eval()


def generate(model: Any, arguments: dict[str, Any], seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return model.generate(**arguments)


def continued(model: Any) -> Tensor:
    """A second turn upon the first one's cache."""
    first = model.generate(PROMPT, **_GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, PROMPT[:, :4]], 1)
    return model.generate(ids, past_key_values=first.past_key_values, **_GREEDY)


class After(StoppingCriteria):
    """Ends every row at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Dies(After):
    """Takes the process with it."""

    def __init__(self, length: int, here: bool) -> None:
        super().__init__(length)
        self.here = here

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.here and input_ids.shape[1] >= self.length:
            os._exit(0)
        return torch.full((input_ids.shape[0],), False)


class Heard:
    """A streamer that keeps what it hears."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def message(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The error of a call that must fail."""
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def reads_of(function: Callable[[], Any]) -> tuple[Any, set[str]]:
    """A result, and the names of the stored tensors whose bytes were read for it."""
    names: set[str] = set()
    fill = Stored.fill

    def noted(self: Stored, *args: Any) -> None:
        names.add(self.info.name)
        fill(self, *args)

    Stored.fill = noted  # ty: ignore
    try:
        return function(), names
    finally:
        Stored.fill = fill


def run_stages(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    seen: dict[str, Any] = {"errors": bad_splits(folder, rank)}
    for codec in ("bf16", "int4"):
        model, names = reads_of(lambda codec=codec: load_stage(folder / codec, dtype=torch.float32))
        seen[codec] = {
            "split": model.stage.split,
            "held": sum(value.nbytes for value in model.parameters()),
            "names": sorted(model.state_dict()),
            "read": sorted(names),
            "dtypes": {value.dtype for value in model.parameters()},
            "greedy": generate(model, CASES["greedy"]),
        }
        if codec == "int4":
            break
        with torch.no_grad():
            seen["logits"] = model(PROMPT, use_cache=False).logits
            seen["last logits"] = model(PROMPT, logits_to_keep=torch.tensor([2, 5])).logits
        for name, arguments in CASES.items():
            # Of the seeds of the ranks only the first one's counts.
            seen[name] = generate(model, arguments, seed=5 + rank)
        cache = model.generate(**CASES["greedy"], return_dict_in_generate=True).past_key_values
        seen["cache"] = (len(cache.layers), cache.get_seq_length())
        seen["continued"] = continued(model)
        seen["busy"] = busy_times(model)
        seen |= rank_zero_decides(model)
        seen["errors"] |= bad_calls(model, folder)
        cut = [2] + [1] * (ranks - 2) + [NUM_LAYERS - ranks]
        model = load_stage(folder / codec, split=cut, prefill_chunk=4, dtype=torch.float32)
        seen["by hand"] = (model.stage.split, generate(model, CASES["left-padded"]))
    if ranks == 2:
        seen["tensor parallel"] = {name: tensor_parallel(folder, plan) for name, plan in PLANS.items()}
    torch.save(seen, folder / f"seen {ranks} {rank}.pt")
    seen["silent"] = silence(model)
    torch.save(seen, folder / f"seen {ranks} {rank}.pt")
    seen["death"] = death(model)
    torch.save(seen, folder / f"seen {ranks} {rank}.pt")


def rank_zero_decides(model: Any) -> dict[str, Any]:
    """What ends generation, and who hears of it."""
    first = model.stage.is_first
    heard = Heard() if first else None
    arguments = {"inputs": PROMPT, **_GREEDY}
    text = model.generate(**arguments, stopping_criteria=[After(14 if first else 13)], streamer=heard)
    in_time = model.generate(**arguments | {"max_new_tokens": 3}, max_time=60.0)
    config = GenerationConfig(**_GREEDY | {"max_new_tokens": 4})
    by_config = model.generate(PROMPT, generation_config=config)
    return {"stopped": text, "heard": heard and heard.tokens, "in time": in_time, "by config": by_config}


def busy_times(model: Any) -> list[tuple[float, float]]:
    """When this stage began and ended each chunk of a prompt, if a chunk takes it at least 40 ms."""
    began: list[float] = []
    ended: list[float] = []

    def begin(*_: Any) -> None:
        began.append(time.monotonic())
        time.sleep(0.04)

    first, last = model.model.layers[0], model.model.layers[-1]
    hooks = [first.register_forward_pre_hook(begin)]
    hooks.append(last.register_forward_hook(lambda *_: ended.append(time.monotonic())))
    model.generate(**CASES["left-padded"] | {"prefill_chunk_size": 1, "max_new_tokens": 1})
    for hook in hooks:
        hook.remove()
    return list(zip(began, ended, strict=True))


def bad_splits(folder: Path, rank: int) -> dict[str, str]:
    def error(split: list[int]) -> str:
        return message(load_stage, folder / "bf16", split=split)

    ranks = dist.get_world_size()
    other = [1] * (ranks - 1) + [NUM_LAYERS - ranks + 1]
    return {
        "too few": error([NUM_LAYERS]),
        "empty stage": error([0] * (ranks - 1) + [NUM_LAYERS]),
        "wrong sum": error([1] * ranks),
        "of another rank": error(other if rank == 0 else other[::-1]),
        "chunk": message(load_stage, folder / "bf16", prefill_chunk=0),
    }


def bad_calls(model: Any, folder: Path) -> dict[str, str]:
    rank = dist.get_rank()
    ids = PROMPT + rank
    other = None if rank == 0 else 9
    return {
        "ids": message(model.generate, ids, **_GREEDY),
        "shape": message(model.generate, PROMPT[:, rank:], **_GREEDY),
        "options": message(model.generate, PROMPT, **_GREEDY, top_k=other),
        "labels": message(model, PROMPT, labels=PROMPT),
        "hidden states": message(model, PROMPT, output_hidden_states=True),
        "nothing": message(model),
        "saved": message(model.save_pretrained, folder / "saved"),
    }


def silence(model: Any) -> str | None:
    """A process that does not answer: the others' error, after the group's timeout."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    model.stage = Stage(model.stage.rank, model.stage.split, group)
    dist.barrier()
    if model.stage.is_last:
        time.sleep(2)
        return None
    began = time.monotonic()
    error = message(model.generate, PROMPT, **_GREEDY)
    return error if time.monotonic() - began < 10 else None


def death(model: Any) -> str:
    """The last process dies in the middle of a text: the others' error."""
    stage = Stage(model.stage.rank, model.stage.split)
    model.stage = stage
    return message(
        model.generate, PROMPT, **_GREEDY, stopping_criteria=[Dies(PROMPT.shape[1] + 3, stage.is_last)]
    )


def tensor_parallel(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Greedy decoding with weights split over the ranks, and what `kv_b_proj` is then."""
    model = KimiK2ForCausalLM.from_pretrained(
        folder / "bf16", dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2, **plan)
    )
    weight = model.model.layers[0].self_attn.kv_b_proj.weight
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    cases = ("greedy", "static cache")
    return {"rows": local.shape[0]} | {name: generate(model, CASES[name]) for name in cases}
