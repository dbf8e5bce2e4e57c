"""The same run on one process and on several, in every layout: one loss curve, one set of weights.

The one process is the reference: test_train.py holds its losses against a forward pass by hand, and here a plain loop
over whole batches with torch's AdamW walks the same curve.
"""

from __future__ import annotations

import functools
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from training_ranks import ADAMW, Run, compute_in_float32, curve, lines, text_file, watch_files, weights
from transformers_k2.parallel import Layout, RandomWeights, build_model
from transformers_k2.training import build_config, load_recipe
from transformers_k2.training.rows import JoinedRows
from transformers_k2.training.sources import Source
from transformers_k2.training.token_cache import build_cache, encode_texts, split

STAGES = ("parallel.pipeline=2", "training.micro_batch_size=2")
# name -> processes, overrides. A step has 8 rows; 9 rows are held out, which no number of processes divides.
LAYOUTS = {
    "shards": (2, ["parallel.shard=all"]),
    "stages, some at a time": (2, [*STAGES, "parallel.micro_batches_per_run=3"]),
    "copies": (2, []),
    "copies, accumulated": (2, ["training.micro_batch_size=2"]),
    "experts": (2, ["parallel.shard=all", "parallel.expert=2"]),
    "four copies": (4, []),
    "four shards": (4, ["parallel.shard=all", "training.micro_batch_size=1"]),
    "four shards and experts": (4, ["parallel.shard=4", "parallel.expert=2"]),
    "an expert each": (4, ["parallel.shard=4", "parallel.expert=4"]),
    "copies of shards": (4, ["parallel.shard=2"]),
    "copies of shards and experts": (
        4,
        ["parallel.shard=2", "parallel.expert=2", "training.micro_batch_size=1"],
    ),
    "copies of stages": (4, [*STAGES]),
    "stages of shards": (4, [*STAGES, "parallel.shard=2"]),
    "stages of experts": (4, [*STAGES, "parallel.shard=2", "parallel.expert=2"]),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    return Run(text_file(folder), folder / "one", before=compute_in_float32).finish()


def assert_same_run(folder: Path, expected: Path) -> None:
    """Float32 rounding apart; steps and where evaluations come are equal."""
    assert [line["step"] for line in lines(folder)] == [line["step"] for line in lines(expected)]
    for mine, its in zip(curve(folder), curve(expected), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    one, other = weights(expected), weights(folder)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if name.endswith(
            "e_score_correction_bias"
        ):  # moves by whole steps: a token routed elsewhere would show
            assert torch.equal(other[name], tensor), name
        assert (other[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    mine, its = (
        [[layer["counts"] for layer in line["layers"].values()] for line in lines(path, "expert_load.jsonl")]
        for path in (folder, expected)
    )
    assert [step[: len(mine[0])] for step in its] == mine  # rank 0 of stages counts its own layers


def in_layout(name: str, one: Path) -> Run:
    num_processes, overrides = LAYOUTS[name]
    output = one.parent / name.replace(", ", " ").replace(" ", "_")
    return Run(one.parent / "text.txt", output, overrides, num_processes, before=compute_in_float32)


def test_shards_are_one_process(one: Path) -> None:
    assert_same_run(in_layout("shards", one).finish(), one)


def announce_pipeline_runs() -> None:
    from transformers_k2.parallel.pipeline import Pipeline

    compute_in_float32()

    run_even = Pipeline._run_even

    def announced(self: Any, batch: Any, size: int, scale: Any) -> Any:
        print(f"<{len(batch['input_ids']) // size} of {size}>", end="")
        return run_even(self, batch, size, scale)

    Pipeline._run_even = announced


def test_stages_are_one_process(one: Path) -> None:
    """Four micro-batches of 2 rows, three of them at a time."""
    run = in_layout("stages, some at a time", one)
    run.before = announce_pipeline_runs
    assert_same_run(run.finish(), one)
    assert "<3 of 2><1 of 2>" in run.log()
    assert "<4 of 2>" not in run.log()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS][2:])
def test_every_layout_is_one_process(name: str, one: Path) -> None:
    assert_same_run(in_layout(name, one).finish(), one)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["separate", "unpacked"])
def test_packed_and_padded_rows_in_every_layout(packing: str, one: Path) -> None:
    """Rows with different numbers of predicted tokens, which ranks and micro-batches must not average."""
    text = one.parent / "text.txt"
    # eps far above float32's noise, of which AdamW's first steps would show the sign
    overrides = [f"data.packing={packing}", ADAMW.replace("1e-8", "1e-4")]
    expected = Run(text, one.parent / packing, overrides, before=compute_in_float32).finish()
    assert curve(expected)[0] != curve(one)[0]
    for name in ("copies, accumulated", "four shards and experts", "stages of experts"):
        num_processes, layout = LAYOUTS[name]
        output = one.parent / f"{packing}_{name.replace(', ', ' ').replace(' ', '_')}"
        run = Run(text, output, [*overrides, *layout], num_processes, before=compute_in_float32)
        assert_same_run(run.finish(), expected)


def test_one_process_is_a_plain_loop(one: Path) -> None:
    """Whole batches, torch's AdamW, no Trainer: the curve of a run that accumulates micro-batches of 2 rows."""
    overrides = [ADAMW, "router.bias_update_speed=0", "router.balance_loss=0", "training.micro_batch_size=2"]
    folder = Run(one.parent / "text.txt", one.parent / "adamw", overrides).finish()
    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode = functools.partial(encode_texts, tokenizer=tokenizer)
    cache = build_cache(
        Source(str(one.parent / "text.txt")), encode, tokenizer, folder / "again", recipe.data.seed
    )
    training, _ = split(cache, recipe.data.held_out_share)
    rows = JoinedRows(cache, training, recipe.data.sequence_length, recipe.data.seed)
    config = build_config(recipe)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    model = build_model(config, Layout(), RandomWeights(config, recipe.training.seed)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    low, high, steps = 5e-4, 3e-3, recipe.training.steps
    start = steps - recipe.num_steps(recipe.schedule.decay)
    expected = []
    for step in range(steps):
        place = max(step - start, 0) / (steps - start)
        optimizer.param_groups[0]["lr"] = low + (high - low) * (1 + math.cos(math.pi * place)) / 2
        ids = torch.stack([rows.row(8 * step + row)["input_ids"] for row in range(8)])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm or math.inf)
        optimizer.step()
        expected.append((loss.item(), norm.item()))
    found = [(line["loss"], line["grad_norm"]) for line in lines(folder) if "loss" in line]
    for mine, its in zip(found, expected, strict=True):
        assert mine == pytest.approx(its, rel=2e-5)


# -- Accelerate's own FSDP2

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DeepseekV3DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ENGINE = ["parallel.engine=accelerate", "parallel.shard=all"]


def promote() -> None:
    """Let Accelerate shard on CPUs, as it does on GPUs: there it would train copies and not say so."""
    compute_in_float32()
    import accelerate
    import transformers.trainer
    from accelerate.utils import DistributedType

    class Promoted(accelerate.Accelerator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            plugin = accelerate.FullyShardedDataParallelPlugin()
            super().__init__(*args, **kwargs)
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = plugin

    transformers.trainer.Accelerator = Promoted


@pytest.mark.slow
def test_accelerates_own_fsdp2_is_one_process(one: Path) -> None:
    text = one.parent / "text.txt"
    run = Run(text, one.parent / "accelerate", ENGINE, 2, FSDP, promote)
    kill_at_step_4 = functools.partial(promote_and_kill, str(one.parent))
    run.before = kill_at_step_4
    assert -signal.SIGKILL in run()
    run.before = promote
    assert_same_run(run.finish(), one)
    assert "Continuing at step 2 of 6" in run.log().replace("\n", " ")


def promote_and_kill(root: str) -> None:
    promote()
    watch_files(root, r"os\.mkdir .*\.step-00000004\.partial")


@pytest.mark.slow
def test_copies_are_refused_where_shards_were_asked_for(one: Path) -> None:
    run = Run(one.parent / "text.txt", one.parent / "refused", ENGINE, 2, FSDP)
    assert 0 not in run()
    assert "RuntimeError: Sharding was asked for, but" in run.log()
    assert not (run.unfinished / "checkpoints").exists()
