"""Open a folder of safetensors by its headers alone, and trust none of it.

A published checkpoint is a terabyte written by strangers and carried by tools that stop half-way: the faults
worth catching (a shard cut short, an index that names another folder, a git-LFS pointer in place of a shard)
all show in a few megabytes of headers, before the first weight is read. Every fault is one `CheckpointError`
that names the file.

What it gives up: it reads no weight and verifies no checksum, so a flipped bit inside a tensor passes. Pickle
files are never opened, only recognised and refused.

Decisions:
* With an index, the index says which shards exist. Without one, `model.safetensors` is the checkpoint;
  failing that, all
  `*.safetensors` together, provided that no tensor name occurs twice (a missing shard cannot be noticed
  then). `model.safetensors` next to an index that does not name it is refused: transformers would load that
  file alone.
* No number is ever parsed out of a file name: `model-1-of-61` and `model-00001-of-000163` are both published.
* Shards are plain names inside the folder. A symbolic link may leave the folder in one case only, the hub
  cache's
  `snapshots/<revision>/name -> blobs/<hash>` of the same repository. A path the user gives is followed
  wherever it leads.
"""

from __future__ import annotations

import gc
import json
import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

# https://huggingface.co/docs/safetensors: an 8-byte little-endian length, a JSON header of that length, then
# the data.
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_JSON_BYTES = 1 << 29  # the index of K2.5 (208,550 tensors) takes about 32 MB
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")

DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# How files that are often found under a safetensors name begin.
_LFS = b"version https://git-lfs"
_FOREIGN = {
    _LFS: "a git-LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"PK\x03\x04": "a zip archive, as torch.save writes: a pickle, which is never opened: convert it",
    b"\x80": "a Python pickle, which is never opened because it can run code: convert it",
    b"GGUF": "a GGUF file",
    b"{": "a JSON file",
    b"<": "an HTML or XML page, probably the error page of a download",
}


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one line that names the file and what was expected."""


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: bytes `start` to `end` of the file `shard` (not of its data section)."""

    name: str
    dtype: str  # as safetensors spells it: "BF16", "F8_E4M3", "I32"
    shape: tuple[int, ...]
    shard: Path
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint folder, known from its headers.

    `index_metadata` is the index's "metadata" (empty without an index); `shard_metadata` each shard's own.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]
    index: Path | None = None
    index_metadata: dict[str, Any] = field(default_factory=dict)
    shard_metadata: dict[Path, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """The checkpoint in a folder, or in one .safetensors file, with every header checked.

        Raises:
            CheckpointError: the first thing that is wrong; `scan` lists them all.
        """
        found = scan(path)
        if found.problems:
            more = f" ({len(found.problems) - 1} more problems)" if found.problems[1:] else ""
            raise CheckpointError(f"{found.problems[0]}{more}")
        return found.checkpoint

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers not counted: what an index calls `total_size`."""
        return sum(info.end - info.start for info in self.tensors.values())


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's cycle collector off: 208,000 tensors without a cycle cost it 40% of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Scan(NamedTuple):
    """A checkpoint as far as it can be read, and all that is wrong with its files."""

    checkpoint: Checkpoint
    problems: list[CheckpointError]
    unread: set[str]  # tensors which the index places in shards that are missing or cannot be read


@no_collector()
def scan(path: str | Path) -> Scan:
    """Read the headers of a checkpoint and collect every problem instead of raising at the first.

    Raises:
        CheckpointError: there is no such folder or file at all.
    """
    path = Path(path)
    if path.is_file():
        return _read_shards(path.parent, [path.name], None, {}, {}, [], follow=True)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: expected a checkpoint folder or a .safetensors file.")

    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    shards = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    problems: list[CheckpointError] = []

    def complain(text: str) -> None:
        problems.append(CheckpointError(text))

    standard = "model" + INDEX_SUFFIX
    if len(indexes) > 1 and standard not in indexes:
        complain(f"{path} has several indexes ({_some(indexes)}): expected {standard}.")
        indexes = []
    if indexes:
        index = path / (standard if standard in indexes else indexes[0])
        try:
            content = read_json(file_inside(path, index.name))
            weight_map = _weight_map(content, str(index))
        except CheckpointError as error:
            problems.append(error)  # go on with the shards that are there
        else:
            used = sorted(set(weight_map.values()))
            if "model.safetensors" in shards and "model.safetensors" not in used:
                why = "transformers would load that file alone"
                complain(
                    f"{path} holds model.safetensors and an index that does not name it; {why}: remove one."
                )
            metadata = content.get("metadata") or {}
            if type(metadata) is not dict:
                complain(f"{index} has metadata {_show(metadata)}: expected an object.")
                metadata = {}
            return _read_shards(path, used, index, weight_map, metadata, problems)
    elif "model.safetensors" in shards:
        shards = ["model.safetensors"]
    if not shards and not problems:
        problems.append(_no_weights(path, names))
    return _read_shards(path, shards, None, {}, {}, problems)


def check_index(index: Any, folder: str | Path | None, source: str) -> dict[str, str]:
    """The `weight_map` of a parsed index: tensor name -> shard file name, every file name proven harmless.

    Args:
        index: what json.loads gave for a `*.safetensors.index.json`.
        folder: where the shards must exist; None (an index fetched by itself) checks names only.
        source: what to call the index in messages.

    Raises:
        CheckpointError: no usable weight_map, a file name that is not plain, or a file that is missing.
    """
    weight_map = _weight_map(index, source)
    if folder is not None:
        for name in sorted(set(weight_map.values())):
            file_inside(Path(folder), name)
    return weight_map


def file_inside(folder: Path, name: str) -> Path:
    """`folder / name`, proven to be a regular file that does not leave the folder (see the module docstring).

    Raises:
        CheckpointError: it is missing, is no regular file, or is a link to somewhere else.
    """
    path = folder / name
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(f"{path} cannot be followed ({error}): expected a file.") from None
    # The hub cache: home is models--owner--name/snapshots/<revision>, perhaps with a subfolder. `home` is resolved,
    # so a `blobs` that is itself a link to somewhere else does not match.
    snapshots = [parent.parent for parent in home.parents if parent.name == "snapshots"]
    blobs = [repository / "blobs" for repository in snapshots if repository.name.startswith("models--")]
    if target.parent != home and home not in target.parents and target.parent not in blobs:
        raise CheckpointError(
            f"{path} is a link to {target}, outside the folder: expected a file of its own, or a hub cache's "
            "link to ../../blobs; copy or hard-link it."
        )
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is missing: the index names it; download it again.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file: expected a file.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file (config, index), with a size limit and no repeated keys.

    Raises:
        CheckpointError: it cannot be read, is too large, is no JSON object, or repeats a key.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes: expected JSON of at most {MAX_JSON_BYTES:,}.")
        return _parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the `__metadata__` of one safetensors file, every promise of the header checked.

    Raises:
        CheckpointError: the file is not safetensors, or its header and its length disagree.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file: expected a safetensors file.")
        if status.st_size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes): expected safetensors; download it again.")
        with path.open("rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if problem := _not_safetensors(start, length, status.st_size):
                raise CheckpointError(f"{path} {problem}")
            file.seek(8)
            header = _parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    metadata = header.pop("__metadata__", None) or {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError(
            f"the header of {path} has __metadata__ that is not all text: expected strings."
        )
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    _check_layout(tensors.values(), path, 8 + length, status.st_size)
    return tensors, metadata


def _read_shards(
    folder: Path,
    names: list[str],
    index: Path | None,
    weight_map: dict[str, str],
    index_metadata: dict[str, Any],
    problems: list[CheckpointError],
    follow: bool = False,
) -> Scan:
    """Read the headers of `names` and compare what they hold with what the index promises."""

    def complain(text: str) -> None:
        problems.append(CheckpointError(text))

    promised: defaultdict[str, set[str]] = defaultdict(set)
    for tensor, name in weight_map.items():
        promised[name].add(tensor)
    headers: dict[str, dict[str, TensorInfo]] = {}
    metadata: dict[Path, dict[str, str]] = {}
    unread: set[str] = set()
    if lost := [name for name in names if not os.path.exists(folder / name)]:
        count = f"{len(lost):,} of the {len(names):,} files that its index names ({_some(lost)})"
        complain(f"{folder} lacks {count}: download what is missing.")
        unread.update(*(promised[name] for name in lost))
    for name in sorted(set(names) - set(lost)):
        try:
            path = folder / name if follow else file_inside(folder, name)
            headers[name], metadata[path] = read_header(path)
        except CheckpointError as error:
            problems.append(error)
            unread |= promised[name]

    tensors: dict[str, TensorInfo] = {}
    for name, header in headers.items():
        others: defaultdict[str, list[str]] = defaultdict(list)
        if index is None:
            for tensor in header.keys() & tensors.keys():
                others[tensors[tensor].shard.name].append(tensor)
        else:
            if absent := promised[name] - header.keys():
                held = f"that shard holds {len(header):,} tensors, not these"
                complain(f"{index} places {_count(absent)} in {name!r}: {held}.")
            surplus = header.keys() - promised[name]
            if leftover := surplus - weight_map.keys():
                complain(f"{folder / name} holds {_count(leftover)} that {index.name} does not name.")
            for tensor in sorted(surplus - leftover):
                others[weight_map[tensor]].append(tensor)
        for other, twice in sorted(others.items()):
            both = index is None or twice[0] in headers.get(other, ())
            also = f"which {'are also' if both else 'the index places'} in {other!r}: expected them once"
            complain(f"{folder / name} holds {_count(twice)}, {also}.")
        if others:  # the index decides which copy counts; without one, the first
            kept = {key for key in header if key not in tensors or weight_map.get(key) == name}
            header = {key: header[key] for key in header if key in kept}
        tensors.update(header)
    shards = tuple(metadata)
    return Scan(Checkpoint(folder, tensors, shards, index, index_metadata, metadata), problems, unread)


def _weight_map(index: Any, source: str) -> dict[str, str]:
    weight_map = index.get("weight_map") if type(index) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(f"{source} has no weight_map: expected tensor name -> shard file name.")
    for tensor, name in weight_map.items():
        if type(name) is not str:
            raise CheckpointError(f"{source} maps {_show(tensor)} to {_show(name)}: expected a file name.")
    for name in sorted(set(weight_map.values())):
        if not _is_plain_name(name):
            raise CheckpointError(f"{source} names the file {_show(name)}: expected a plain name.")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{source} names the file {_show(name)}: expected *.safetensors.")
    return weight_map


def _is_plain_name(name: str) -> bool:
    """No folder, parent, drive letter, stream or control character; no length that file systems refuse."""
    if name.startswith(".") or any(mark in name for mark in "/\\:") or not name.isprintable():
        return False
    return 0 < len(name.encode("utf-8", "replace")) <= 255


def _no_weights(folder: Path, names: list[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(
            f"{folder} holds pickle weights only ({_some(pickles)}), which are never opened because a pickle "
            "can run code: expected *.safetensors; convert them where you trust their source."
        )
    return CheckpointError(
        f"{folder} holds no weights: expected *.safetensors, and an index if there are several."
    )


def _not_safetensors(start: bytes, length: int, size: int) -> str | None:
    """What a file is by its first bytes, if it is not safetensors; a length that can be is believed first."""
    fits = 2 <= length <= min(MAX_HEADER_BYTES, size - 8)
    if fits and start[8:9] == b"{":
        return None
    if start[8:9] == b"{" and size - 8 < length <= MAX_HEADER_BYTES:
        missing = length - size + 8
        return f"is at least {missing:,} bytes too short: its header alone has {length:,}, the file {size:,}."
    for magic, meaning in _FOREIGN.items():
        if start.startswith(magic):
            return f"is {meaning} (expected a safetensors file)."
    if size < 10:
        return f"has {size} bytes: expected a safetensors file, whose header alone takes 10."
    if not fits:
        limit = f"at most {MAX_HEADER_BYTES:,} and within its {size:,} bytes"
        return f"begins with a header length of {length:,}: expected {limit}; it is not a safetensors file."
    return f"has a header that begins with {start[8:9]!r}: expected '{{'; it is not a safetensors file."


def _parse_json(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object without repeated keys (Python would keep the last value, another reader the first)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{source} repeats the key {_show(key)}: expected each key once.")
        return result

    if data.startswith(_LFS):
        raise CheckpointError(f"{source} is {_FOREIGN[_LFS]}.")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source} is not JSON ({reason}): expected UTF-8 JSON.") from None
    if type(content) is not dict:
        raise CheckpointError(f"{source} is a JSON {type(content).__name__}: expected an object.")
    return content


def _tensor(name: str, entry: Any, path: Path, base: int) -> TensorInfo:
    """One entry of a header; offsets become positions in the file."""
    if problem := _entry_problem(entry):
        raise CheckpointError(f"the header of {path}: tensor {_show(name)} {problem}.")
    start, end = entry["data_offsets"]
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, base + start, base + end)


def _entry_problem(entry: Any) -> str | None:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return f"is {_show(entry)}: expected dtype, shape and two data_offsets"
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        return f"has the dtype {_show(dtype)}: expected one of {', '.join(DTYPE_BITS)}"
    # 64 dimensions is torch's limit; the bounds keep the product below cheap.
    sizes = shape if type(shape) is list and len(shape) <= 64 else [None]
    for size in sizes:
        if type(size) is not int or not 0 <= size < 1 << 63:
            return f"has the shape {_show(shape)}: expected a list of sizes"
    if type(start) is not int or type(end) is not int or not 0 <= start <= end < 1 << 63:
        return f"has data_offsets {_show([start, end])}: expected 0 <= start <= end"
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (end - start) * 8 != num_bits:
        return f"has {end - start:,} bytes: expected {-(-num_bits // 8):,} for {dtype} of shape {shape}"
    return None


def _check_layout(tensors: Iterable[TensorInfo], path: Path, base: int, size: int) -> None:
    """The tensors must fill the file from its header to its last byte, without a hole or an overlap."""
    position = base
    for info in sorted(tensors, key=attrgetter("start", "end")):
        if info.start != position:
            what = "overlaps the one before it" if info.start < position else "leaves a gap before it"
            where = f"expected offset {position - base:,}, not {info.start - base:,}"
            raise CheckpointError(f"the header of {path}: tensor {_show(info.name)} {what}: {where}.")
        position = info.end
    if size != position:
        wrong = f"{abs(size - position):,} bytes too {'short' if size < position else 'long'}"
        expected = f"expected {position:,} by its header, found {size:,}; download it again"
        raise CheckpointError(f"{path} is {wrong}: {expected}.")


def _show(value: Any) -> str:
    """An untrusted value for a message: on one line, without control characters, and not too long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _some(names: Iterable[str]) -> str:
    """Up to three names."""
    names = sorted(names)
    return ", ".join(_show(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _count(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names):,} tensor{'s' if len(names) > 1 else ''} ({_some(names)})"
