"""Runs that are killed, told to stop, or moved to other processes: the same command ends with the same weights."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_ranks import Run, curve, lines, same_weights, text_file, watch_files, weights

FILES = ("metrics.jsonl", "qk_clip.jsonl", "expert_load.jsonl")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("surviving"))


@pytest.fixture(scope="module")
def undisturbed(text: Path) -> Path:
    """A run that nothing happened to; how many operations on files it took is in count.txt."""
    (count := text.parent / "count").mkdir()
    counted = functools.partial(watch_files, str(text.parent), None, str(count / "count.txt"))
    return Run(text, text.parent / "undisturbed", before=counted).finish()


def assert_same(folder: Path, expected: Path) -> None:
    """To the bit, with every line there once."""
    assert same_weights(folder, expected)
    for name in FILES:
        assert lines(folder, name) == lines(expected, name), name
    assert not list(folder.parent.glob(f"{folder.name}.unfinished"))


def close_to(folder: Path, expected: Path) -> None:
    """Float32 rounding apart."""
    for mine, its in zip(curve(folder), curve(expected), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    one, other = weights(expected), weights(folder)
    assert one.keys() == other.keys()
    assert all((other[name] - tensor).norm() <= 1e-5 * tensor.norm() for name, tensor in one.items())


def kill_at(run: Run, place: int | str, root: Path) -> None:
    """Start `run`, which kills itself at an operation on its files."""
    run.before = functools.partial(watch_files, str(root), place)
    codes = run()
    run.before = None
    assert codes[0] == -signal.SIGKILL, run.log()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_steps(run: Run) -> int:
    path = run.unfinished / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def test_kill_while_the_text_is_prepared_a_checkpoint_and_the_result_are_written(
    text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    own = (
        tmp_path / "text.txt"
    )  # a token cache of its own: the cache's name comes from the text, not from its place
    shutil.copy(text, own)
    run = Run(own, tmp_path / "run")
    kill_at(run, r"open .*/cache/.*partial/", tmp_path)
    assert not list((tmp_path / "cache").glob("[!.]*"))  # nothing that looks like a cache
    kill_at(run, r"open .*\.step-00000004\.partial/rank-00000\.safetensors", tmp_path)
    checkpoints = sorted(path.name for path in (run.unfinished / "checkpoints").iterdir())
    assert checkpoints == [".step-00000004.partial", "step-00000002"]
    kill_at(
        run, r"open .*unfinished/tokenizer_config\.json", tmp_path
    )  # the weights are there, the tokenizer not
    assert (run.unfinished / "model.safetensors").is_file()
    assert not run.output.exists()
    assert "Continuing at step 2 of 6" in run.log().replace("\n", " ")
    run.finish()
    assert_same(run.output, undisturbed)
    kept = sorted(path.name for path in (run.output / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


YARN = "{type: yarn, factor: 4.0, original_max_position_embeddings: 33, beta_fast: 1.0, beta_slow: 1.0, mscale: 1.0,"
YARN += " mscale_all_dim: 1.0}"
STAGES = (
    f"context={{stages: [{{steps: 3, sequence_length: 33, rope_scaling: {YARN}}},"
    " {steps: 3, sequence_length: 66, rope_scaling: null}],"
    f" final_rope_scaling: {YARN}, max_position_embeddings: 132, eval_lengths: [33, 132]}}"
)


def test_a_later_stage_goes_on_with_the_scaling_of_an_earlier_one(text: Path, tmp_path: Path) -> None:
    expected = Run(text, tmp_path / "expected", [STAGES]).finish()
    run = Run(text, tmp_path / "run", [STAGES])
    kill_at(run, r"os\.mkdir .*\.step-00000006\.partial", tmp_path)
    run.finish()
    assert "Continuing at step 4 of 6" in run.log().replace("\n", " ")
    assert_same(run.output, expected)


def test_sigterm_saves_and_the_same_command_goes_on(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = Run(text, tmp_path / "run", ["checkpoint.every=null"])
    processes = run.start()
    wait_for(lambda: num_steps(run) >= 2)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGTERM)
    assert run.wait(processes) == [143]
    stopped = num_steps(run)
    assert [path.name for path in (run.unfinished / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    assert f"SIGTERM: saved step {stopped} of 6" in run.log()
    run.finish()
    assert_same(run.output, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("parallel.shard=all",)], ids=["one", "two shards"])
def test_kill_at_random_operations_on_files(
    text: Path, undisturbed: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Each run is killed again and again, each time at another operation, until it has come to its end."""
    total = int((undisturbed.parent / "count" / "count.txt").read_text())
    rng, kills = random.Random(7), 0
    expected = undisturbed
    num_processes = 2 if overrides else 1
    if overrides:
        expected = Run(text, tmp_path / "expected", overrides, num_processes).finish()
    for number in range(3):
        run = Run(text, tmp_path / f"run{number}", overrides, num_processes)
        while not run.output.exists():
            run.before = functools.partial(watch_files, str(tmp_path), rng.randint(total // 8, total // 2))
            codes = run()
            assert set(codes) <= {0, -signal.SIGKILL}, run.log()
            kills += -signal.SIGKILL in codes
        assert_same(run.output, expected)
    assert kills >= 6


@pytest.mark.slow
def test_kill_at_random_moments(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    rng, kills, number = random.Random(11), 0, 0
    while kills < 20:
        run = Run(text, tmp_path / f"run{number}")
        number += 1
        while not run.output.exists():
            processes = run.start()
            wait_for(lambda run=run: run.unfinished.exists() or run.output.exists())
            time.sleep(rng.uniform(0, 2.5))
            processes[0].kill()
            processes[0].join()
            kills += processes[0].exitcode == -signal.SIGKILL
        assert_same(run.output, undisturbed)


MOVES = {
    "one, then two shards": ((1, []), (2, ["parallel.shard=all"])),
    "experts, then one": ((2, ["parallel.shard=all", "parallel.expert=2"]), (1, [])),
    "stages, then shards": (
        (2, ["parallel.pipeline=2", "training.micro_batch_size=2"]),
        (2, ["parallel.shard=all"]),
    ),
    "shards, then stages of experts": (
        (2, ["parallel.shard=all"]),
        (4, ["parallel.pipeline=2", "parallel.shard=2", "parallel.expert=2", "training.micro_batch_size=2"]),
    ),
    "four shards, then two copies": ((4, ["parallel.shard=all"]), (2, [])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_in_another_layout(text: Path, undisturbed: Path, tmp_path: Path, name: str) -> None:
    (processes, overrides), (then_processes, then) = MOVES[name]
    before = Run(text, tmp_path / "run", overrides, processes)
    kill_at(before, r"os\.mkdir .*\.step-00000004\.partial", tmp_path)
    after = Run(text, tmp_path / "run", then, then_processes)
    after.finish()
    assert "Continuing at step 2 of 6" in after.log().replace("\n", " ")
    close_to(after.output, undisturbed)


def stopped(text: Path, folder: Path, *overrides: str) -> Run:
    """A run with checkpoints of steps 2 and 4 that was killed in step 5."""
    run = Run(text, folder / "run", overrides)
    kill_at(run, r"os\.mkdir .*\.step-00000006\.partial", folder)
    return run


@pytest.mark.slow
def test_damaged_checkpoints(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = stopped(text, tmp_path)
    checkpoints = run.unfinished / "checkpoints"
    shards = checkpoints / "step-00000004" / "rank-00000.safetensors"
    whole = shards.read_bytes()
    shards.write_bytes(whole[: len(whole) // 2])
    assert run() == [1]
    assert "step-00000004" in run.log()
    assert "is damaged" in run.log()
    shards.unlink()
    assert run() == [1]
    assert "holds no rank-*.safetensors" in run.log()
    shards.write_bytes(whole)
    (checkpoints / "step-00000004" / "checkpoint.json").unlink()  # no longer complete: the one before counts
    run.finish()
    assert run.log().replace("\n", " ").count("Continuing at step 2 of 6") == 1
    assert_same(run.output, undisturbed)


@pytest.mark.slow
def test_another_recipe_does_not_continue_the_run(text: Path, tmp_path: Path) -> None:
    run = stopped(text, tmp_path)
    other = Run(text, run.output, ["optimizer.lr=0.02"])
    assert other() == [1]
    assert "optimizer.lr was 0.01, is 0.02" in other.log().replace("\n", " ")
    assert (run.unfinished / "checkpoints" / "step-00000004").is_dir()


def poison(first: int, last: int, value: float) -> None:
    """Multiply the loss of these steps (from 0), once in the life of the process."""
    from transformers_k2 import KimiK2ForCausalLM

    calls = {"steps": 0}
    forward = KimiK2ForCausalLM.forward

    @functools.wraps(forward)
    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training:
            if first <= calls["steps"] <= last:
                output.loss = output.loss * value
            calls["steps"] += 1
        return output

    KimiK2ForCausalLM.forward = poisoned


def test_a_loss_that_is_not_finite_stops_the_run(text: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = Run(text, tmp_path / "run", before=functools.partial(poison, 4, 4, float("nan")))
    assert run() == [1]
    said = run.log().replace("\n", " ")
    assert "Training stopped at step 5: the gradient norm is nan, the loss nan" in said
    assert "No weight was changed by this step" in said
    assert [line["step"] for line in lines(run.unfinished) if "loss" in line] == [1, 2, 3, 4]
    run.before = None
    run.finish()  # from step 4, without the poison
    assert_same(run.output, undisturbed)


GUARD = ("training.spike_guard={window: 4, factor: 5.0, max_skips: 2}",)


@pytest.mark.slow
def test_a_spike_is_skipped_and_remembered(text: Path, tmp_path: Path) -> None:
    """Step 4 (from 0) is poisoned; the run that was killed and continued skips it too, and goes on as if it had not."""
    spoiled = functools.partial(poison, 4, 4, 50.0)
    whole = Run(text, tmp_path / "whole", GUARD, before=spoiled)
    whole.finish()
    calm = Run(text, tmp_path / "calm", GUARD)
    calm.finish()
    numbers = [line["loss"] for line in lines(whole.output) if "loss" in line]
    quiet = [line["loss"] for line in lines(calm.output) if "loss" in line]
    assert numbers[:4] == quiet[:4]
    assert numbers[4] == pytest.approx(50 * quiet[4], rel=1e-5)
    assert numbers[5] != quiet[5]  # a step was left out
    assert abs(numbers[5] - quiet[5]) < 0.5
    meta = (whole.output / "checkpoints" / "step-00000006" / "checkpoint.json").read_text()
    assert '"skipped": [\n      4\n    ]' in meta
    again = Run(text, tmp_path / "again", GUARD)
    kill_at(again, r"os\.mkdir .*\.step-00000004\.partial", tmp_path)
    again.before = functools.partial(poison, 2, 2, 50.0)  # it goes on at step 2
    again.finish()
    assert same_weights(again.output, whole.output)
    stubborn = Run(text, tmp_path / "stubborn", GUARD, before=functools.partial(poison, 4, 5, 50.0))
    assert stubborn() == [1]
    assert "Training stopped at step 6: 2 steps in a row had a loss above" in stubborn.log().replace(
        "\n", " "
    )
