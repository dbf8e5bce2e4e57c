"""Conversions that are killed, starved or fed with damage: the same bytes in the end, or an error and no checkpoint.

Kills are SIGKILL at random moments, disks are full by the kernel's own word where a test may mount a small one, processes
are processes. What may be read in between is asked of `open_model`, `verify` and transformers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import checkpoints
from transformers_k2.conversion import convert, crew, inspect, merge_adapter, quantize, verify
from transformers_k2.conversion.opened import open_model
from transformers_k2.conversion.staging import STAGING
from transformers_k2.lazy_tensors import OpenFiles

INDEX = "model.safetensors.index.json"
SHARD = 400_000
Work = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_UNIT", 256 * 20)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return checkpoints.per_expert(checkpoints.stock_model())


@pytest.fixture(scope="module")
def src(plain: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.write(tmp_path_factory.mktemp("src") / "bf16", plain, checkpoints.hub_config())
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def works(
    src: Path, plain: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Work]:
    """Conversions in several directions: what writes one to a folder."""
    root = tmp_path_factory.mktemp("others")
    config = checkpoints.hub_config(quantization_config=checkpoints.FP8_CONFIG)
    fp8 = checkpoints.write(root / "fp8", checkpoints.to_fp8(plain), config)
    adapter = lora(root / "adapter")
    options: dict[str, Any] = {"shard_bytes": SHARD, "quiet": True}
    return {
        "fp8 to bf16": lambda dst: convert(fp8, dst, "hub_bf16", codec="bf16", **options),
        "bf16 to int4": lambda dst: quantize(src, dst, **options),
        "fused": lambda dst: convert(src, dst, "transformers_fused", **options),
        "ranks": lambda dst: convert(src, dst, "deepseek_inference", codec="bf16", num_ranks=2, **options),
        "merge": lambda dst: merge_adapter(src, adapter, dst, **options),
    }


def lora(folder: Path) -> Path:
    """A per-expert adapter of two kinds of modules, in PEFT's files."""
    torch.manual_seed(1)
    folder.mkdir()
    modules = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]
    modules += [f"model.layers.1.mlp.experts.{expert}.down_proj" for expert in range(6)]
    tensors = {}
    for module in modules:
        width = 128 if module.endswith("o_proj") else 96
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn(3, width)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(256, 3)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(
    works: dict[str, Work], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """The files of a conversion that nothing disturbs."""
    root, known = tmp_path_factory.mktemp("whole"), {}

    def get(name: str) -> dict[str, bytes]:
        if name not in known:
            works[name](root / name)
            known[name] = contents(root / name)
        return known[name]

    return get


def forked(work: Callable[[], Any], **environment: str) -> int:
    """Start `work` in a copy of this process; its number. It ends with 0, with 3 after a ValueError, else with 1."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ |= environment
            work()
            code = 0
        except ValueError as error:
            code = 3
            os.write(2, f"{error}\n".encode())
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """How: a code, or minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nothing_wrong(dst: Path, whole: dict[str, bytes]) -> bool:
    """Everything under a final name is as it will be, and a folder that can be read is complete; whether it can."""
    here = contents(dst) if dst.exists() else {}
    for name, data in here.items():
        path = Path(name)
        if path.parts[0] != STAGING and path.name[0] != ".":
            assert whole[name] == data, name
        elif path.suffix == ".safetensors" and path.name[0] != ".":
            assert whole[path.name] == data, name  # a finished file that waits for the others
    done = {name: data for name, data in here.items() if Path(name).parts[0] != STAGING}
    complete = done == whole
    readers: dict[str, Callable[[], Any]] = {
        "open": lambda: open_model(dst, OpenFiles()),
        "verify": lambda: verify(dst, quiet=True),
    }
    if "config.json" in here and "model0-mp2.safetensors" not in whole:
        readers["transformers"] = lambda: AutoModelForCausalLM.from_pretrained(dst)
    for name, read in readers.items():
        if complete:
            continue
        # transformers has no ValueError for a folder without weights.
        with pytest.raises((ValueError, OSError) if name == "transformers" else ValueError):
            read()
    return complete


def finished(work: Work, dst: Path, whole: dict[str, bytes]) -> None:
    """The same command once more gives the same files; it refuses only what is complete."""
    if nothing_wrong(dst, whole) and not (dst / STAGING / "publishing").exists():
        with pytest.raises(ValueError, match="holds weights already"):
            work(dst)
        shutil.rmtree(dst / STAGING, ignore_errors=True)
    else:
        work(dst)
    assert contents(dst) == whole


def killed_and_finished(
    work: Work, dst: Path, whole: dict[str, bytes], rng: random.Random, num_kills: int
) -> None:
    """Kill a conversion, and its continuations, at random moments, then let it finish."""
    started = time.perf_counter()
    work(dst)
    seconds = time.perf_counter() - started
    shutil.rmtree(dst)
    kills = tries = 0
    while kills < num_kills:
        tries += 1
        assert tries < 10 * num_kills, "it ends before it can be killed"
        pid = forked(lambda: work(dst))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        assert code in (-signal.SIGKILL, 0)
        kills += code != 0
        if nothing_wrong(dst, whole):  # begin anew
            finished(work, dst, whole)
            shutil.rmtree(dst)
    finished(work, dst, whole)


@pytest.mark.parametrize("name", ["fp8 to bf16", "bf16 to int4", "fused", "ranks", "merge"])
def test_killed_at_random(
    name: str, works: dict[str, Work], whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    killed_and_finished(works[name], tmp_path / "dst", whole(name), random.Random(name), 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("name", ["fp8 to bf16", "bf16 to int4", "fused", "ranks", "merge"])
def test_killed_at_random_often(
    name: str, seed: int, works: dict[str, Work], whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    killed_and_finished(works[name], tmp_path / "dst", whole(name), random.Random(seed), 10)


# --- what the system refuses


@contextmanager
def refused(src: Path, dst: Path, match: str, whole: dict[str, bytes] | None = None) -> Iterator[None]:
    """An error in one line that says `match`; the source is as it was, and the destination no checkpoint."""
    before = {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in src.rglob("*")
    }
    there = contents(dst) if dst.exists() else None
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    after = {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in src.rglob("*")
    }
    assert after == before
    if whole is not None:  # it may go on later
        nothing_wrong(dst, whole)
    else:
        assert (contents(dst) if dst.exists() else None) == there


CALLS = {"pwrite": 300, "fsync": 5, "ftruncate": 2, "replace": 3}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_fails(
    call: str,
    number: int,
    src: Path,
    tmp_path: Path,
    works: dict[str, Work],
    whole: Callable[[str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, dst = whole("bf16 to int4"), tmp_path / "dst"
    real, left = getattr(os, call), CALLS[call]

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    num_open = len(os.listdir("/proc/self/fd"))
    message = (
        "dst is full.*free some space" if number == errno.ENOSPC else "dst cannot be finished.*Input/output"
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with refused(src, dst, message, expected):
            works["bf16 to int4"](dst)
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert not list(tmp_path.rglob("*.tmp"))
    works["bf16 to int4"](dst)
    assert contents(dst) == expected


def test_a_disk_that_fails_while_the_result_is_moved(
    src: Path,
    tmp_path: Path,
    works: dict[str, Work],
    whole: Callable[[str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, dst = whole("bf16 to int4"), tmp_path / "dst"
    real = os.replace

    def failing(source: Any, place: Any) -> None:
        if Path(place).name == INDEX:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with refused(src, dst, "dst is full", expected):
            works["bf16 to int4"](dst)
    with pytest.raises(ValueError, match="unfinished conversion: expected a checkpoint; repeat its command"):
        open_model(dst, OpenFiles())
    works["bf16 to int4"](dst)
    assert contents(dst) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts of Linux")
def test_a_limit_of_file_sizes(
    src: Path,
    tmp_path: Path,
    works: dict[str, Work],
    whole: Callable[[str], dict[str, bytes]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The kernel's own refusal."""
    dst = tmp_path / "dst"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, SHARD // 2))
        works["bf16 to int4"](dst)

    assert ended(forked(work)) == 3
    assert "dst cannot be finished ([Errno 27] File too large): mend that" in capfd.readouterr().err
    finished(works["bf16 to int4"], dst, whole("bf16 to int4"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system of its own")
@pytest.mark.parametrize("checked", [True, False])
def test_a_small_file_system(
    checked: bool, works: dict[str, Work], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """1 MB of memory in a namespace of the child's: refused before a byte is written, or when it is full."""
    libc = ctypes.CDLL(None, use_errno=True)
    (tmp_path / "small").mkdir()

    def work() -> None:
        new_namespace, private = 0x20000, (1 << 18) | (1 << 14)
        if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None):
            os._exit(77)
        small = tmp_path / "small"
        if libc.mount(b"tmpfs", str(small).encode(), b"tmpfs", 0, b"size=1m"):
            os._exit(77)
        if not checked:
            shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**12})  # type: ignore[assignment]
        try:
            works["bf16 to int4"](small / "dst")
        finally:
            left = contents(small)
            assert not any(name.endswith((INDEX, ".tmp")) for name in left), left
            assert all(STAGING in Path(name).parts for name in left), left
            assert not (checked and left)

    code = ended(forked(work))
    if code == 77:
        pytest.skip("no mounts here")
    assert code == 3
    told = capfd.readouterr().err
    assert ("bytes free: expected" if checked else "is full (No space left on device)") in told


@pytest.mark.parametrize("name", ["fp8 to bf16", "fused", "ranks"])
def test_too_little_space(
    name: str, src: Path, tmp_path: Path, works: dict[str, Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1234}))
    with refused(src, tmp_path / "dst", r"dst has 1,234 bytes free: expected [\d,]{9} for"):
        works[name](tmp_path / "dst")


def test_a_shard_that_cannot_be_read(
    src: Path,
    tmp_path: Path,
    works: dict[str, Work],
    whole: Callable[[str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bad sector half-way."""
    real, dst, count, expected = os.preadv, tmp_path / "dst", 0, whole("fused")

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count > 200:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        message = r"model-\d-of-3.safetensors cannot be read at byte [\d,]+: Input/output error"
        with refused(src, dst, message, expected):
            works["fused"](dst)
    finished(works["fused"], dst, expected)


# --- what a source may be


def copied(src: Path, folder: Path) -> Path:
    shutil.copytree(src, folder)
    return folder


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = INDEX) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def set_header(path: Path, text: bytes) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


FIRST = "model-1-of-3.safetensors"
NORM = "model.norm.weight"


def repeat_in_header(folder: Path) -> None:
    text = header(folder / FIRST).rstrip()
    name = next(key for key in json.loads(text) if key != "__metadata__")
    entry = json.dumps(json.loads(text)[name])
    set_header(folder / FIRST, text[:-1] + f', "{name}": {entry}}}'.encode())


def repeat_in_another(folder: Path) -> None:
    first, second = (folder / f"model-{number}-of-3.safetensors" for number in (1, 2))
    tensors, more = load_file(first), load_file(second)
    name = next(iter(tensors))
    save_file(more | {name: tensors[name]}, second)


def unclaimed(folder: Path) -> None:
    tensors = load_file(folder / FIRST) | {"model.layers.1.mlp.experts.0.extra.weight": torch.ones(3)}
    save_file(tensors, folder / FIRST)
    rewritten(folder, lambda index: index["weight_map"].update(dict.fromkeys(tensors, FIRST)))


def drop_entry(folder: Path) -> None:
    rewritten(folder, lambda index: index["weight_map"].pop(NORM))


def to_wrong_shard(folder: Path) -> None:
    other = {"model-1-of-3.safetensors": "model-2-of-3.safetensors"}
    rewritten(
        folder,
        lambda index: index["weight_map"].update(
            {NORM: other.get(index["weight_map"][NORM], "model-1-of-3.safetensors")}
        ),
    )


def directory(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def link_away(folder: Path) -> None:
    shutil.move(folder / FIRST, folder.parent / "elsewhere.safetensors")
    (folder / FIRST).symlink_to("../elsewhere.safetensors")


def pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({NORM: torch.ones(3)}, folder / "pytorch_model.bin")


def pickle_by_another_name(folder: Path) -> None:
    (folder / FIRST).write_bytes(pickle.dumps({NORM: [1, 2, 3]}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a byte short": (lambda it: cut(it / FIRST, (it / FIRST).stat().st_size - 1), "1 bytes too short"),
    "half": (lambda it: cut(it / FIRST, (it / FIRST).stat().st_size // 2), "bytes too short"),
    "cut in the header": (lambda it: cut(it / FIRST, 300), "its header alone has"),
    "empty": (lambda it: cut(it / FIRST, 0), r"is empty \(0 bytes\)"),
    "too long": (lambda it: cut(it / FIRST, (it / FIRST).stat().st_size + 4), "4 bytes too long"),
    "gone": (lambda it: (it / FIRST).unlink(), "lacks 1 of the 3 files"),
    "a directory": (directory, "is not a regular file"),
    "not in the index": (drop_entry, r"holds 1 tensor \('model.norm.weight'\) that .* does not name"),
    "in another shard": (to_wrong_shard, "holds 1 tensor .*model.norm.weight'.*which the index places in"),
    "twice in a header": (repeat_in_header, "repeats the key"),
    "in two shards": (repeat_in_another, "expected them once"),
    "claimed by nothing": (unclaimed, r"holds 1 tensors \(.*extra.weight\) that no row of the layout claims"),
    "a link that leaves": (link_away, "is a link to .*, outside the folder"),
    "pickles": (pickles, "pickle weights only"),
    "a pickle as a shard": (pickle_by_another_name, "a Python pickle, which is never opened"),
    "no config": (lambda it: (it / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda it: (it / "config.json").write_text("{"), "config.json is not JSON"),
}
HOSTILE: list[Any] = [
    *("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors"),
    *(
        "a\x00.safetensors",
        "\u202e.safetensors",
        "x" * 300 + ".safetensors",
        ".safetensors",
        "",
        "x.bin",
        7,
        None,
    ),
]
for hostile in HOSTILE:
    DAMAGES[f"an index that names {hostile!r:.30}"] = (
        lambda it, name=hostile: rewritten(it, lambda index: index["weight_map"].update({NORM: name})),
        "expected a (plain|file) name|expected \\*.safetensors",
    )


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_sources(what: str, src: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[what]
    broken = copied(src, tmp_path / "broken")
    damage(broken)
    for work in (
        lambda: convert(broken, tmp_path / "dst", "transformers_fused", quiet=True),
        lambda: verify(broken, quiet=True),
    ):
        with refused(broken, tmp_path / "dst", message):
            work()
    assert any(problem.severity == "error" for problem in inspect(broken).problems) or what in (
        "claimed by nothing",
        "no config",
    )


CONTRADICTIONS: dict[str, Any] = {
    "vocab_size": 321,
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 97,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 2,
    "num_attention_heads": 5,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 31,
    "qk_rope_head_dim": 32,
    "v_head_dim": 33,
    "attention_bias": True,
    "topk_method": "greedy",
    "tie_word_embeddings": None,  # no contradiction: null is false
    "text_config": {},
}


@pytest.mark.parametrize("layout", ["hub_bf16", "transformers_fused", "mlx", "deepseek_inference"])
def test_a_config_that_contradicts_the_tensors(layout: str, src: Path, tmp_path: Path) -> None:
    folder = src
    if layout != "hub_bf16":
        num_ranks = 2 if layout == "deepseek_inference" else 1
        codec = "affine" if layout == "mlx" else "bf16"
        folder = tmp_path / "broken"
        convert(src, folder, layout, codec=codec, num_ranks=num_ranks, quiet=True)
    else:
        folder = copied(src, tmp_path / "broken")
    sound = (folder / "config.json").read_text()
    for key, value in CONTRADICTIONS.items():
        (folder / "config.json").write_text(json.dumps(json.loads(sound) | {key: value}))
        if key == "tie_word_embeddings":
            open_model(folder, OpenFiles())
            continue
        with refused(folder, tmp_path / "dst", "config|lacks|shape|expected"):
            convert(folder, tmp_path / "dst", "hub_bf16", codec="bf16", quiet=True)


@pytest.mark.parametrize("other", ["F8_E5M2", "I8", "U8"])
def test_parts_of_another_type_are_not_misread(
    other: str, works: dict[str, Work], tmp_path: Path, src: Path
) -> None:
    """Their bytes fit, so a reader that does not look would read other numbers."""
    fp8 = tmp_path / "fp8"
    convert(src, fp8, "hub_fp8", quiet=True)
    path = fp8 / "model.safetensors"
    set_header(path, header(path).replace(b'"F8_E4M3"', f'"{other}"'.encode(), 1))
    with refused(fp8, tmp_path / "dst", f"is {other}: expected F8_E4M3"):
        convert(fp8, tmp_path / "dst", "hub_bf16", codec="bf16", quiet=True)


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)[0]
        file.seek(position)
        file.write(bytes([old ^ 1 << bit]))


def test_verify_finds_a_flipped_bit(
    works: dict[str, Work], whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    """In the data: of the tensor that has it. In the header: an error, or nothing that means anything."""
    dst, rng = tmp_path / "dst", random.Random(0)
    dst.mkdir()
    for name, data in whole("bf16 to int4").items():
        (dst / name).write_bytes(data)
    assert verify(dst, quiet=True).ok
    path = sorted(dst.glob("*.safetensors"))[1]
    text = header(path)
    entries = {key: entry["data_offsets"] for key, entry in json.loads(text).items() if key != "__metadata__"}
    for name in rng.sample(sorted(entries), min(15, len(entries))):
        start, end = entries[name]
        position, bit = 8 + len(text) + rng.randrange(start, end), rng.randrange(8)
        flip(path, position, bit)
        verdict = verify(dst, quiet=True)
        assert [fault.name for fault in verdict.faults] == [name], (name, position, bit)
        assert "checksum" in verdict.faults[0].text
        flip(path, position, bit)
    refusals = 0
    for _ in range(40):
        position, bit = rng.randrange(8 + len(text)), rng.randrange(8)
        flip(path, position, bit)
        try:
            verdict = verify(dst, quiet=True)
        except ValueError:
            refusals += 1
        else:  # in the metadata, which says how tensors were saved
            assert not verdict.ok or 8 < position < 60, (position, bit)
        flip(path, position, bit)
    assert refusals > 30
    assert verify(dst, quiet=True).ok


# --- several processes, and changes in between


def interrupted(work: Work, dst: Path) -> None:
    """An unfinished run with some finished files: killed by its own fifth rename of a shard."""

    def die() -> None:
        real, count = os.replace, 0

        def replace(source: Any, place: Any) -> None:
            nonlocal count
            real(source, place)
            count += str(place).endswith(".safetensors")
            if count == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        work(dst)

    assert ended(forked(die)) == -signal.SIGKILL
    assert list((dst / STAGING).glob("*.safetensors"))


def change_config(folder: Path) -> None:
    rewritten(folder, lambda config: config.update(torch_dtype="float32"), "config.json")


def touch(folder: Path) -> None:
    os.utime(folder / FIRST, ns=(0, 10**18))


def swap_data(folder: Path) -> None:
    """Same size, other numbers, written now."""
    save_file({name: -tensor for name, tensor in load_file(folder / FIRST).items()}, folder / FIRST)


@pytest.mark.parametrize("change", [change_config, touch, swap_data])
def test_a_source_that_changed_in_between(change: Callable[[Path], None], src: Path, tmp_path: Path) -> None:
    mine, dst = copied(src, tmp_path / "mine"), tmp_path / "dst"

    def work(dst: Path, **options: Any) -> None:
        convert(mine, dst, "hub_bf16", shard_bytes=SHARD, quiet=True, **options)

    interrupted(work, dst)
    change(mine)
    before = contents(dst)
    with refused(mine, dst, "unfinished run .*whose files have changed since"):
        work(dst)
    assert contents(dst) == before
    work(dst, overwrite=True)
    work(tmp_path / "anew")
    assert contents(dst) == contents(tmp_path / "anew")


@pytest.mark.parametrize(
    "options",
    [
        {"to": "transformers_fused"},
        {"dtype": "float32"},
        {"codec": "int4"},
        {"shard_bytes": SHARD + 1},
        {"config": "other.json"},
    ],
    ids=str,
)
def test_options_that_changed_in_between(options: dict[str, Any], src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    first: dict[str, Any] = {"to": "hub_bf16", "codec": "bf16", "shard_bytes": SHARD, "quiet": True}
    if "config" in options:
        other = tmp_path / "other.json"
        other.write_text(json.dumps(json.loads((src / "config.json").read_text()) | {"rope_theta": 7.0}))
        options = {"config": other}
    changed = first | options
    if changed["codec"] == "int4":
        changed["to"] = "hub_int4"
    if changed["to"] == "transformers_fused":
        changed["codec"] = None
    interrupted(lambda dst: convert(src, dst, **first), dst)
    with refused(src, dst, "unfinished run with .*, but this one has"):
        convert(src, dst, **changed)
    convert(src, dst, **first)
    convert(src, tmp_path / "anew", **first)
    assert contents(dst) == contents(tmp_path / "anew")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process(
    overwrite: bool,
    src: Path,
    works: dict[str, Work],
    whole: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """It is refused while the first is at work, also when it would drop the first one's files, which stay whole."""
    dst, go = tmp_path / "dst", tmp_path / "go"

    def slowly() -> None:
        real = os.replace

        def replace(source: Any, place: Any) -> None:
            while "/model-00002-of-" in str(place) and not go.exists():
                (tmp_path / "waits").touch()
                time.sleep(0.01)
            real(source, place)

        os.replace = replace
        works["bf16 to int4"](dst)

    whole("bf16 to int4")
    pid = forked(slowly)
    limit = time.monotonic() + 30
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < limit, "no file was finished"
        time.sleep(0.01)
    for group_size in (32, 16):
        options = {"shard_bytes": SHARD, "quiet": True, "overwrite": overwrite, "group_size": group_size}
        with pytest.raises(ValueError, match=r"is being written by another process|holds an unfinished run"):
            quantize(src, dst, **options)
    go.touch()
    assert ended(pid) == 0
    assert contents(dst) == whole("bf16 to int4")


@pytest.mark.parametrize("seed", range(4))
def test_one_of_two_that_start_at_once(
    seed: int, works: dict[str, Work], whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    dst, rng = tmp_path / "dst", random.Random(seed)
    expected = whole("bf16 to int4")
    start = time.monotonic() + 0.05

    def work(wait: float) -> None:
        while time.monotonic() < start + wait:
            time.sleep(0)
        works["bf16 to int4"](dst)

    waits = (0.0, rng.uniform(0, 0.004) if seed else 0.1)
    pids = [forked(partial(work, wait)) for wait in waits]
    assert sorted(map(ended, pids)) == [0, 3]
    assert contents(dst) == expected


def test_destinations_that_are_the_source(src: Path, tmp_path: Path) -> None:
    mine = copied(src, tmp_path / "mine")
    (tmp_path / "link").symlink_to(mine)
    for dst in (mine, mine / "inside", tmp_path, tmp_path / "link", tmp_path / "x/../mine"):
        with refused(mine, mine, "overlap: expected a folder of its own"):
            convert(mine, dst, "transformers_fused", overwrite=True, quiet=True)


def ranked(work: Work, dst: Path, rank: int) -> int:
    return forked(lambda: work(dst), RANK=str(rank), WORLD_SIZE="2")


@pytest.mark.parametrize("name", ["bf16 to int4", "ranks"])
@pytest.mark.parametrize("victim", [None, 0, 1])
def test_two_processes_write_one(
    name: str,
    victim: int | None,
    works: dict[str, Work],
    whole: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """As one does; also if one of them is killed and started again."""
    dst, expected, work = tmp_path / "dst", whole(name), works[name]
    pids = [ranked(work, dst, rank) for rank in (0, 1)]
    if victim is not None:
        limit = time.monotonic() + 30
        while not any((dst / STAGING).glob("*.safetensors")) and time.monotonic() < limit:
            if (dst / INDEX).exists() or (dst / "model0-mp2.safetensors").exists():
                break
            time.sleep(0.002)
        os.kill(pids[victim], signal.SIGKILL)
        if ended(pids[victim]) != 0 and not nothing_wrong(dst, expected):
            pids[victim] = ranked(work, dst, victim)
            assert ended(pids[victim]) in (0, 3)  # 3: the other one was done before it looked
        pids.pop(victim) if victim == 1 else pids.pop(0)
    for pid in pids:
        assert ended(pid) == 0
    assert contents(dst) == expected


def test_a_lock_is_for_the_living(
    works: dict[str, Work], whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    """The lock of a process that was killed is nobody's; that of one that lives is not taken away."""
    dst = tmp_path / "dst"
    interrupted(works["fused"], dst)
    assert (dst / STAGING / "lock.0").exists()
    with (dst / STAGING / "lock.0").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another process"):
            works["fused"](dst)
    works["fused"](dst)
    assert contents(dst) == whole("fused")
