"""Whatever a checkpoint's headers, index and config say, it is opened or refused: by a ValueError, soon, in little memory.

Small checkpoints of every layout are damaged in one place: bytes at random, values of the JSON tree, or tensors whose
header is sound but not what the model asks for. A seed makes a damage, so a failure names what repeats it.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch

import checkpoints
from transformers_k2.checkpoint import DTYPE_BITS
from transformers_k2.conversion import convert, inspect, verify
from transformers_k2.conversion import layout as layouts
from transformers_k2.conversion.opened import open_model
from transformers_k2.lazy_tensors import OpenFiles
from transformers_k2.manifest import expected_tensors

SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
SECONDS, PATIENCE = 4.0, 60.0  # of a case on processors, and on the clock; most take milliseconds
MEGABYTES = 300  # that a case may add to the process at its peak
TO = "hub_bf16"
# What a value of a JSON file may be, and should not.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 10**5, 2**31, 2**32 + 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40),
    *(0.0, 2.0, 1.5, -0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "0", "\x00", "a\x00b", "\n", "..", "../x", "/etc/passwd", "a\\b", "C:x", "\u202e", "\ud800", "é" * 300),
    *("model.safetensors", "BF16", "F8_E4M3", "I32", "F4", "F6_E2M3", "C64", "bfloat16", "fp8", "re:(", "re:.*", "*"),
    *([], {}, [0], [1], [0, 0], [2, 2], [-1, 1], [None], [[]], [{}], ["x"], [2**63, 2**63], [0] * 70, {"": 0}, {"a": {}}),
]  # fmt: skip
TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"\\ud800", b"null", b"NaN", b"-", b"1e999",
          b"0", b"9" * 30, b"9" * 5000, b"\x00", b"\xff", b"\xef\xbb\xbf", b"/*", b"[" * 900, b'{"a":' * 950]  # fmt: skip

Files = dict[str, bytes]


class TooLong(BaseException):
    """A case did not end."""


class Stored(NamedTuple):
    """A tensor of a file that is made anew."""

    dtype: str
    shape: tuple[int, ...]


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the root."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def change_value(tree: dict[str, Any], rng: random.Random) -> None:
    """One value, key or entry of a JSON tree becomes another."""
    path = rng.choice(list(places(tree)))
    parent: Any = tree
    for key in path[:-1]:
        parent = parent[key]
    value = parent[path[-1]]
    match rng.randrange(6):
        case 0 if type(value) is int:
            parent[path[-1]] = rng.choice(
                [value + 1, value - 1, 2 * value, value // 2, -value, value + 8, 1 << rng.randrange(70)]
            )
        case 1:
            del parent[path[-1]]
        case 2 if isinstance(parent, dict):
            name = rng.choice(["", "x", "\x00", "__metadata__", "\ud800", f"{path[-1]}x", str(path[-1])[:-1]])
            parent[name] = parent.pop(path[-1])
        case 3:
            other: Any = tree
            for key in rng.choice(list(places(tree))):
                other = other[key]
            parent[path[-1]] = json.loads(json.dumps(other))
        case 4:
            for _ in range(rng.choice([1, 3, 60, 200])):
                value = rng.choice([[value], {"x": value}])
            parent[path[-1]] = value
        case _:
            parent[path[-1]] = rng.choice(VALUES)


def change_json(text: bytes, rng: random.Random) -> bytes:
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if tree:
            change_value(tree, rng)
    made = json.dumps(tree).encode()
    if rng.random() < 0.1:  # a key twice
        first = made.find(b'"')
        made = made[:first] + made[first:].replace(
            b'"', rng.choice([b'"x": 1, "x": 2, "', b'"__metadata__": {}, "']), 1
        )
    return made


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A bit, a byte, a piece."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(made)) if made else 0
        match rng.randrange(6):
            case 0 if made:
                made[at] ^= 1 << rng.randrange(8)
            case 1 if made:
                made[at] = rng.randrange(256)
            case 2:
                del made[at : at + rng.choice([1, 1, 8, 100, 10**6])]
            case 3:
                made[at:at] = rng.choice(TOKENS)
            case 4:
                made[at:at] = made[at : at + rng.choice([1, 8, 100])]
            case _:
                made[at : at + 1] = rng.choice(TOKENS)
    return bytes(made)


def change_length(data: bytes, rng: random.Random) -> bytes:
    """The eight bytes in front."""
    length = int.from_bytes(data[:8], "little")
    wrong = [0, 1, 2, length - 1, length + 1, length + 8, len(data) - 8, len(data) - 7, 10**8, 10**8 + 1]
    wrong += [
        2**31,
        2**32 + length,
        2**63 - 1,
        2**63,
        2**64 - 1,
        rng.randrange(2**64),
        rng.randrange(len(data)),
    ]
    return rng.choice(wrong).to_bytes(8, "little") + data[8:]


def change_tensors(files: Files, rng: random.Random) -> Files:
    """Tensors of another shape, type or name, too few or too many, in a file that is sound; and so is the index."""
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    header = json.loads(split(files[name])[0])
    metadata = header.pop("__metadata__", {})
    tensors = {key: Stored(entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
    for _ in range(rng.choice([1, 1, 2, 5])):
        key = rng.choice(list(tensors))
        dtype, shape = tensors[key]
        size = prod(shape)
        match rng.randrange(6):
            case 0:
                shapes = [
                    (size,),
                    (1, size),
                    (size, 1),
                    (1, 1, size),
                    (0,),
                    (0, 0),
                    (),
                    (*shape, 1),
                    (1, *shape),
                ]
                shapes += [shape[::-1], (0, *shape[1:]), (*shape[:-1], 0), shape[:-1], shape[1:], (1,) * 64]
                shapes += [
                    tuple(max(0, one + rng.choice([-1, 0, 1])) for one in shape),
                    tuple(2 * one for one in shape),
                ]
                shapes += [tuple(one // 2 for one in shape), (*shape[:-1], shape[-1] // 8 if shape else 1)]
                tensors[key] = Stored(dtype, rng.choice(shapes))
            case 1:
                tensors[key] = Stored(rng.choice(list(DTYPE_BITS)), shape)
            case 2:
                parts = [
                    "weight",
                    "weight_packed",
                    "weight_scale",
                    "weight_shape",
                    "weight_scale_inv",
                    "scales",
                    "biases",
                ]
                tensors.setdefault(
                    f"{key.rpartition('.')[0]}.{rng.choice(parts)}", rng.choice(list(tensors.values()))
                )
            case 3 if len(tensors) > 1:
                del tensors[key]
            case 4 if len(tensors) > 1:
                digits = [at for at, char in enumerate(key) if char.isdigit()]
                at = rng.choice(digits or [0])
                tensors[
                    key[:at] + rng.choice(["0", "1", "2", "9", "00", "9" * 30, "", "x"]) + key[at + 1 :]
                ] = tensors.pop(key)
            case _:
                other = rng.choice(list(tensors))
                tensors[key], tensors[other] = tensors[other], tensors[key]
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, (dtype, shape) in tensors.items():
        end = position + min(-(-prod(shape) * DTYPE_BITS[dtype] // 8), 10**6)
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    made = {
        name: joined(
            json.dumps(entries).encode(), rng.randbytes(position) if rng.random() < 0.5 else bytes(position)
        )
    }
    for index in [one for one in files if one.endswith(".index.json")]:
        content = json.loads(files[index])
        held = {key: file for key, file in content["weight_map"].items() if file != name}
        made[index] = json.dumps(content | {"weight_map": held | dict.fromkeys(tensors, name)}).encode()
    return made


def damaged(files: Files, rng: random.Random) -> Files:
    """The files that are not as they were."""
    shards = [name for name in files if name.endswith(".safetensors")]
    texts = [name for name in files if name.endswith(".json")]
    match rng.randrange(8):
        case 0:
            name = rng.choice(shards)
            return {name: change_length(files[name], rng)}
        case 1:
            name = rng.choice(shards)
            header, data = split(files[name])
            return {name: joined(change_bytes(header, rng), data)}
        case 2:
            name = rng.choice(shards)
            header, data = split(files[name])
            return {name: joined(change_json(header, rng), data)}
        case 3:
            name = rng.choice(texts)
            return {name: change_bytes(files[name], rng)}
        case 4 | 5:
            name = rng.choice(texts)
            return {name: change_json(files[name], rng)}
        case _:
            return change_tensors(files, rng)


@contextmanager
def limited() -> Iterator[None]:
    """No longer than that, on a busy machine as well."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE),
    )
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def forget_peak() -> None:
    """Let the kernel measure the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    """Of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:"))) * 1024


def look(folder: Path, dst: Path, number: int) -> Counter[str]:
    """What opening, inspecting, planning, converting and verifying a folder come to; the last three in turns."""

    def attempt(name: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except ValueError:
            seen[f"{name} refused"] += 1
            return False
        seen[f"{name} done"] += 1
        return True

    def opened() -> None:
        with OpenFiles() as files:
            open_model(folder, files)

    seen: Counter[str] = Counter()
    attempt("inspect", lambda: inspect(folder).lines())
    sound = attempt("open", opened)
    if number % 3 == 0:
        attempt("plan", lambda: convert(folder, dst, TO, dry_run=True))
    elif number % 3 == 1:
        attempt("verify", lambda: verify(folder, memory=1, quiet=True))
    elif sound and number % 2:
        attempt("convert", lambda: convert(folder, dst, TO, memory=1, quiet=True))
        if dst.exists():
            shutil.rmtree(dst)
    return seen


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each layout."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    config = checkpoints.hub_config(**SIZES)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    tensors = {
        name: torch.randn(shape).to(dtypes[dtype])
        for name, (shape, dtype) in expected_tensors(config).items()
    }
    hub = checkpoints.write(root / "hub_bf16", tensors, config, num_shards=2, stray=False)
    for name in layouts.names():
        if name != "hub_bf16":
            num_ranks = 2 if layouts.load(name).files else 1
            convert(hub, root / name, name, num_ranks=num_ranks, shard_bytes=40_000, quiet=True)
    return {folder.name: folder for folder in sorted(root.iterdir())}


def fuzz(bases: dict[str, Path], root: Path, seeds: range) -> Counter[str]:
    """Damage after damage; what became of them."""
    contents = {
        name: {path.name: path.read_bytes() for path in folder.iterdir()} for name, folder in bases.items()
    }
    seen: Counter[str] = Counter()
    faults: dict[str, str] = {}
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(bases))
        folder, changed = root / name, damaged(contents[name], rng)
        if not folder.exists():
            shutil.copytree(bases[name], folder)
        for file, data in changed.items():
            (folder / file).write_bytes(data)
        forget_peak()
        before = status("VmRSS")
        try:
            with limited():
                seen += look(folder, root / "dst", seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            faults.setdefault(where, f"seed {seed} ({name}): {error}")
        if (more := status("VmHWM") - before) > MEGABYTES << 20:
            faults.setdefault(f"memory {seed}", f"seed {seed} ({name}): {more >> 20} MB")
        for file in changed:
            (folder / file).write_bytes(contents[name][file])
    assert not faults, "\n".join(f"{where}: {told}" for where, told in faults.items())
    return seen


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell peaks of memory"
)
def test_damaged_headers_indexes_and_configs(bases: dict[str, Path], tmp_path: Path) -> None:
    seen = fuzz(bases, tmp_path, range(600))
    # The damages go deep enough to matter: some are harmless, most are not.
    assert seen["open refused"] > 300
    assert seen["verify done"] > 20
    assert seen["convert done"] > 4


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 999_999, "n_routed_experts": 1},
        {"num_nextn_predict_layers": 400_000},
        {"n_routed_experts": 499_999},
        {"n_routed_experts": 10**30},
    ],
    ids=str,
)
def test_a_config_that_asks_for_the_moon(
    sizes: dict[str, int], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Names are made before they are looked for: millions of them take a minute and gigabytes."""
    folder = shutil.copytree(bases["hub_bf16"], tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    with limited(), pytest.raises(ValueError, match="expected at most"):
        open_model(folder, OpenFiles())
    with limited():
        assert any("expected at most" in problem.text for problem in inspect(folder).problems)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell peaks of memory"
)
def test_many_more(bases: dict[str, Path], tmp_path: Path) -> None:
    fuzz(bases, tmp_path, range(10_000, 18_000))
