"""Processes that meet, restart and are told to stop: threads stand for ranks on one store, torchrun starts real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from training_ranks import RECIPE, Run, free_port, lines, same_weights, text_file
from transformers_k2.training import machine

# -- joining


def meet(store: dist.Store, ranks: Sequence[int], size: int) -> dict[int, str]:
    """The attempt that each rank finds itself in; ranks that wait for others in vain are missing."""
    found: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: found.update({rank: machine._attempt(store.clone(), rank, size)})
        )
        for rank in ranks
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(2)
    return found


def test_the_processes_of_an_attempt_agree_on_its_name() -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1)
    )
    first = meet(store, range(4), 4)
    second = meet(store, range(4), 4)  # all keys of the first attempt are still there
    assert set(first) == set(second) == set(range(4))
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert first[0] != second[0]


def test_an_attempt_that_died_while_it_met_is_no_part_of_the_next() -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1)
    )
    store.set("name of 1", "a process that was killed")
    store.set("name of 2", "another one")
    attempt = meet(store, [2, 0, 1], 3)
    assert set(attempt) == {0, 1, 2}
    assert len(set(attempt.values())) == 1


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(machine, "_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match=r"2 of 3 processes have not come within .*: \[1, 2\]"):
        machine._attempt(store, 0, 3)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert machine.join() == 1
    assert (machine.rank(), machine.world_size(), machine.from_rank_0("x")) == (0, 1, "x")
    assert not dist.is_initialized()


# -- signals


def test_signals_are_remembered_and_the_second_sigterm_does_not_kill() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with machine.StopSignal().listening() as stop:
        assert not stop.agreed(torch.device("cpu"))
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the scheduler's, after the launcher's
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(torch.device("cpu"))
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_of_a_person_ends_the_process() -> None:
    if (child := os.fork()) == 0:
        with machine.StopSignal().listening() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop._at -= 2
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


# -- launchers

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
CRASH = """
import os, signal, sys

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".step-00000004.partial/rank-00001.safetensors"):
        try:
            os.close(os.open(os.environ["CRASHED"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two shards that nothing happens to."""
    text = text_file(tmp_path_factory.mktemp("machine"))
    run = Run(text, text.parent / "expected", ["parallel.shard=all"], 2)
    run.finish()
    return run


@contextmanager
def launched(run: Run, *options: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A launch agent with `run`'s command; it and its processes are gone afterwards."""
    command = [*LAUNCHER, *options, "-m", "transformers_k2.training", RECIPE, *run.arguments]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    with run.output.with_name("agent.log").open("a") as log:
        agent = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    try:
        yield agent
    finally:
        end(agent)


def end(agent: subprocess.Popen) -> None:
    """Kill an agent and its processes, as a node that dies would."""
    if agent.poll() is None:
        family = [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]
        for process in family:
            process.kill()
        psutil.wait_procs(family)
        agent.wait()


def wait_for_step(run: Run, step: int) -> None:
    deadline = time.monotonic() + 200
    metrics = run.unfinished / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b'"loss"') < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same(run: Run, expected: Run) -> None:
    assert same_weights(run.output, expected.output)
    for name in ("metrics.jsonl", "qk_clip.jsonl", "expert_load.jsonl"):
        assert lines(run.output, name) == lines(expected.output, name), name


@pytest.mark.slow
def test_a_crashed_rank_is_restarted_and_the_run_continues(expected: Run, tmp_path: Path) -> None:
    run = Run(expected.text, tmp_path / "run", expected.overrides, 2)
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    options = ("--standalone", "--nproc_per_node", "2", "--max-restarts", "1")
    crashed = tmp_path / "crashed"
    with launched(run, *options, PYTHONPATH=str(tmp_path), CRASHED=str(crashed)) as agent:
        assert agent.wait(300) == 0, (tmp_path / "agent.log").read_text()[-3000:]
    assert crashed.exists()
    assert "Continuing at step 2 of 6" in (tmp_path / "agent.log").read_text().replace("\n", " ")
    assert_same(run, expected)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves(expected: Run, tmp_path: Path) -> None:
    run = Run(expected.text, tmp_path / "run", [*expected.overrides, "checkpoint.every=null"], 2)
    options = ("--standalone", "--nproc_per_node", "2", "--shutdown-timeout", "120")
    with launched(run, *options) as agent:
        wait_for_step(run, 2)
        agent.terminate()
        assert agent.wait(200) != 0
    (checkpoint,) = (run.unfinished / "checkpoints").iterdir()
    assert checkpoint.name in [f"step-{step:08d}" for step in range(2, 6)]
    run.finish()
    assert_same(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_one_of_which_dies(expected: Run, tmp_path: Path, rendezvous: str) -> None:
    """Two agents on loopback. With c10d the agent that lives waits for the new one; with static both are started again."""
    run = Run(expected.text, tmp_path / "run", expected.overrides, 2)
    port = str(free_port())

    def node(number: int) -> tuple[str, ...]:
        common = ("--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "2")
        if rendezvous == "static":
            return (*common, "--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", port)
        place = ("--rdzv_backend", "c10d", "--rdzv_id", "7", "--rdzv_endpoint", f"localhost:{port}")
        return (*common, *place, "--rdzv_conf", f"is_host={number == 0}")

    # torch 2.13 otherwise gives an agent that joins in a later round no address of rank 0: both end with a timeout.
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if rendezvous == "c10d" else {}
    with launched(run, *node(0), **apart) as first, launched(run, *node(1), **apart) as second:
        wait_for_step(run, 3)
        end(second)
        if rendezvous == "static":
            end(first)
            with launched(run, *node(0)) as again, launched(run, *node(1)) as other:
                codes = [again.wait(300), other.wait(300)]
        else:
            with launched(run, *node(1), **apart) as other:
                codes = [first.wait(300), other.wait(300)]
    assert codes == [0, 0], (tmp_path / "agent.log").read_text()[-3000:]
    assert_same(run, expected)


# -- the files for `accelerate launch`

FOLDER = Path(__file__).resolve().parents[2] / "training_recipes/accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_launcher_files(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_processes % config.num_machines == 0
    assert config.num_processes > 1
    # Any other type starts one process, or shards what is sharded already.
    wanted = DistributedType.FSDP if path.stem == "accelerate_fsdp2" else DistributedType.MULTI_GPU
    assert config.distributed_type == wanted
    assert config.mixed_precision == "no"
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in readme


def test_the_slurm_script_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    assert "`slurm.sh`" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_launcher_for_cpus_starts_two_processes(expected: Run, tmp_path: Path) -> None:
    run = Run(expected.text, tmp_path / "run", expected.overrides, 2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / "cpu_x2.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    module = ["-m", "transformers_k2.training", RECIPE, *run.arguments]
    subprocess.run([*command, *module], env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert_same(run, expected)
