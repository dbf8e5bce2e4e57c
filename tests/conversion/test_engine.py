"""The engine: whatever interrupts it, the result has the same bytes or is no checkpoint; memory does not grow."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import checkpoints
from conversion_results import read, same
from transformers_k2.conversion import crew, quantize
from transformers_k2.conversion.opened import open_model
from transformers_k2.conversion.staging import STAGING
from transformers_k2.conversion.tasks import Spec, header
from transformers_k2.lazy_tensors import OpenFiles
from transformers_k2.manifest import expected_tensors

OPTIONS: dict[str, Any] = {"shard_bytes": 400_000, "quiet": True}


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_UNIT", 256 * 20)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = checkpoints.per_expert(checkpoints.stock_model())
    folder = checkpoints.write(tmp_path_factory.mktemp("src") / "bf16", tensors, checkpoints.hub_config())
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "int4"
    quantize(src, folder, **OPTIONS)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forked(work: Callable[[], Any]) -> int:
    """Run `work` in a copy of this process; how that ended: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_each_change_of_a_file(act: Callable[[int], Any]) -> Iterator[tuple[Any, str, Any]]:
    """Patches for what changes files: `act` learns how many changes came before."""
    count = 0
    lock = threading.Lock()
    for owner, name in (
        (os, "pwrite"),
        (os, "replace"),
        (os, "ftruncate"),
        (Path, "touch"),
        (Path, "unlink"),
    ):
        real = getattr(owner, name)

        def patched(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            nonlocal count
            with lock:
                act(count)
                count += 1
            return real(*args, **kwargs)

        yield owner, name, patched


@pytest.fixture(scope="module")
def num_changes(src: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for change in at_each_change_of_a_file(seen.append):
            patch.setattr(*change)
        quantize(src, tmp_path_factory.mktemp("count") / "int4", **OPTIONS)
    return len(seen)


def killed_and_resumed(src: Path, dst: Path, at: int, whole: dict[str, bytes]) -> None:
    def work() -> None:
        for owner, name, patched in at_each_change_of_a_file(
            lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == at else None
        ):
            setattr(owner, name, patched)
        quantize(src, dst, **OPTIONS)

    assert forked(work) == -signal.SIGKILL
    if not (dst / "model.safetensors.index.json").exists():
        with pytest.raises(ValueError):
            open_model(dst, OpenFiles())
    quantize(src, dst, **OPTIONS)
    assert contents(dst) == whole


@pytest.mark.parametrize("part", [0.5, 0.93, 0.97])
def test_killed_and_resumed(
    part: float, src: Path, tmp_path: Path, whole: dict[str, bytes], num_changes: int
) -> None:
    killed_and_resumed(src, tmp_path / "dst", int(part * num_changes), whole)


@pytest.mark.slow
def test_killed_anywhere(src: Path, tmp_path: Path, whole: dict[str, bytes], num_changes: int) -> None:
    for at in [*range(0, num_changes - 30, 37), *range(num_changes - 30, num_changes - 1)]:
        killed_and_resumed(src, tmp_path / str(at), at, whole)


def failing(number: int, at: int) -> Callable[[int], None]:
    def act(count: int) -> None:
        if count >= at:
            raise OSError(number, os.strerror(number))

    return act


def interrupt(src: Path, dst: Path, at: int, patch: pytest.MonkeyPatch) -> None:
    """A disk that is full from one change of a file on."""
    with patch.context() as inner:
        owner, name, patched = next(iter(at_each_change_of_a_file(failing(errno.ENOSPC, at))))
        inner.setattr(owner, name, patched)
        with pytest.raises(
            ValueError, match=r"dst is full \(No space left on device\): free some space and repeat"
        ):
            quantize(src, dst, **OPTIONS)


def test_full_disk(
    src: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(src, tmp_path / "dst", 400, monkeypatch)
    left = contents(tmp_path / "dst")
    assert {name.removesuffix(".crc32.json") for name in left} < {
        *whole,
        "run.json",
        "lock.0",
    }  # finished shards only, nothing half-written
    assert [path.name for path in (tmp_path / "dst").iterdir()] == [STAGING]
    summary = quantize(src, tmp_path / "dst", **OPTIONS)
    assert 0 < summary.num_resumed == sum(name.endswith(".safetensors") for name in left)
    assert contents(tmp_path / "dst") == whole


def test_too_little_space(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1234}))
    with pytest.raises(ValueError, match=r"dst has 1,234 bytes free: expected [\d,]{9} for"):
        quantize(src, tmp_path / "dst", **OPTIONS)
    assert not (tmp_path / "dst").exists()


def test_an_unfinished_run_of_another_kind(
    src: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    interrupt(src, dst, 400, monkeypatch)
    before = contents(dst)
    with pytest.raises(
        ValueError, match=r"unfinished run with .*'group_size': 32.*, but this one has .*'group_size': 16"
    ):
        quantize(src, dst, group_size=16, **OPTIONS)
    assert contents(dst) == before
    times = (src / "model-1-of-3.safetensors").stat()
    os.utime(src / "model-1-of-3.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="whose files have changed since"):
        quantize(src, dst, **OPTIONS)
    os.utime(src / "model-1-of-3.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    quantize(src, dst, group_size=16, overwrite=True, **OPTIONS)
    config = json.loads((dst / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 16
    quantize(src, dst, overwrite=True, **OPTIONS)
    assert contents(dst) == whole


def test_destinations_that_are_refused(src: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(src)
    for dst, message in (
        (src, "overlap"),
        (src / "int4", "overlap"),
        (src.parent, "overlap"),
        (tmp_path / "link", "overlap"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(src, dst, overwrite=True, **OPTIONS)
    quantize(src, tmp_path / "dst", quiet=True)
    before = contents(tmp_path / "dst")
    with pytest.raises(ValueError, match=r"dst holds weights already: expected another folder, or overwrite"):
        quantize(src, tmp_path / "dst", **OPTIONS)
    assert contents(tmp_path / "dst") == before
    (tmp_path / "dst/notes.txt").write_text("kept")
    (tmp_path / "dst/adapter_model.safetensors").write_bytes(b"not of the checkpoint")
    quantize(src, tmp_path / "dst", overwrite=True, **OPTIONS)
    assert contents(tmp_path / "dst") == whole | {
        "notes.txt": b"kept",
        "adapter_model.safetensors": b"not of the checkpoint",
    }


def test_the_source_is_not_touched(src: Path, tmp_path: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in src.iterdir()}
    quantize(src, tmp_path / "dst", **OPTIONS)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in src.iterdir()} == before


def test_shards_and_index(src: Path, tmp_path: Path) -> None:
    summary = quantize(src, tmp_path / "dst", **OPTIONS)
    index = json.loads((tmp_path / "dst/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "dst").glob("*.safetensors"))
    number = len(shards)
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)
    ]
    assert summary.num_shards == number > 3
    for path in shards:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"][key] for key in file.keys()} == {path.name}  # noqa: SIM118
        largest = max(tensor.nbytes for tensor in read_one(path).values())
        assert sum(tensor.nbytes for tensor in read_one(path).values()) <= max(400_000, largest)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for path in shards for t in read_one(path).values()
    )
    quantize(src, tmp_path / "single", quiet=True)
    same(read(tmp_path / "single"), read(tmp_path / "dst"))


def read_one(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_a_source_that_shrinks_while_it_is_read(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.preadv", lambda *args: 0)
    with pytest.raises(
        ValueError, match=r"\.safetensors ends at byte .*: it was cut short while it was read"
    ):
        quantize(src, tmp_path / "dst", **OPTIONS)


def test_progress(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(src, tmp_path / "dst", shard_bytes=400_000)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(Console, "is_terminal", True)
    quantize(src, tmp_path / "loud", shard_bytes=400_000)
    assert "MB" in capsys.readouterr().err


LARGE = {
    "hidden_size": 8192,
    "moe_intermediate_size": 6144,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": None,
    "tie_word_embeddings": True,
}


def sparse_checkpoint(folder: Path) -> None:
    """300 MB of zeros in three matrices, which take no space on the disk."""
    folder.mkdir()
    config = checkpoints.hub_config(**LARGE)
    specs = [Spec(name, dtype, shape) for name, (shape, dtype) in expected_tensors(config).items()]
    start, _ = header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(spec.num_bytes for spec in specs))
    (folder / "config.json").write_text(json.dumps(config))


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the kernel does not tell anonymous memory"
)
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads at work on 100 MB matrices take less than one of them."""
    monkeypatch.setattr(crew, "_UNIT", 1 << 21)
    sparse_checkpoint(tmp_path / "src")
    assert (tmp_path / "src/model.safetensors").stat().st_size > 300e6

    def work() -> None:
        before, most, done = anonymous_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, anonymous_bytes() - before)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        quantize(tmp_path / "src", tmp_path / "dst", quiet=True)
        done.set()
        watcher.join()
        (tmp_path / "most").write_text(str(most))

    assert forked(work) == 0
    assert 1e6 < int((tmp_path / "most").read_text()) < 100e6
