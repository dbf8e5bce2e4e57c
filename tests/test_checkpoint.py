"""Checkpoint folders: what safetensors writes is read exactly, what it refuses is refused with the reason."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transformers_k2.checkpoint import (
    DTYPE_BITS,
    Checkpoint,
    CheckpointError,
    check_index,
    read_header,
    read_json,
    scan,
)

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    """Awkward ones: a scalar, an empty tensor, odd sizes, every dtype of a K2 checkpoint."""
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(7, 5).to(torch.bfloat16),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(3),
        "packed": torch.randint(-(2**31), 2**31 - 1, (3, 2), dtype=torch.int32),
        "shape": torch.tensor([3, 16], dtype=torch.int64),
        "fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False, True]),
    }


def write(folder: Path, shards: dict[str, list[str]], index: dict[str, Any] | None = None) -> Path:
    """Shards with the named tensors, and the index that fits them (or the one given)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tensors()
    for name, keys in shards.items():
        save_file({key: content[key] for key in keys}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    total = sum(content[key].nbytes for key in weight_map)
    index = index or {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def two_shards(folder: Path) -> Path:
    """Names as hubs have them: no padding, and the lexical order is not the numerical one."""
    keys = list(tensors())
    return write(folder, {"model-2-of-61.safetensors": keys[:3], "model-10-of-61.safetensors": keys[3:]})


def raw(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def refused(path: Path, message: str, opener: Callable[[Path], Any] = Checkpoint.open) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        opener(path)
    assert "\n" not in str(error.value)


def test_positions_dtypes_and_shapes_are_those_safetensors_wrote(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    checkpoint = Checkpoint.open(folder)
    assert sorted(checkpoint.tensors) == sorted(tensors())
    for name, tensor in tensors().items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        with info.shard.open("rb") as file:
            file.seek(info.start)
            stored = file.read(info.end - info.start)
        assert stored == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        with safe_open(info.shard, "pt") as theirs:
            assert theirs.get_slice(name).get_dtype() == info.dtype
            assert theirs.metadata() == checkpoint.shard_metadata[info.shard]
    assert checkpoint.num_bytes == checkpoint.index_metadata["total_size"]
    assert [path.name for path in checkpoint.shards] == [
        "model-10-of-61.safetensors",
        "model-2-of-61.safetensors",
    ]


def test_every_dtype_of_torch_that_safetensors_writes_is_known(tmp_path: Path) -> None:
    seen = set()
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        path = tmp_path / "model.safetensors"
        try:
            save_file({"x": torch.zeros(8, dtype=torch.uint8).view(dtype)}, path)
        except (KeyError, RuntimeError, NotImplementedError, SafetensorError):
            continue  # no file to read
        info = Checkpoint.open(tmp_path).tensors["x"]
        with safe_open(path, "pt") as theirs:
            assert (info.dtype, list(info.shape)) == (
                theirs.get_slice("x").get_dtype(),
                [8 * 8 // DTYPE_BITS[info.dtype]],
            )
        seen.add(info.dtype)
    assert seen >= {"BF16", "F32", "F16", "F8_E4M3", "I32", "I64", "U8", "BOOL"}


def test_a_single_file_a_file_by_its_path_and_shards_without_an_index(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert sorted(Checkpoint.open(tmp_path).tensors) == sorted(content)  # as transformers: that file alone
    assert sorted(Checkpoint.open(tmp_path / "adapter_model.safetensors").tensors) == ["other"]
    (tmp_path / "model.safetensors").rename(tmp_path / "weights-a.safetensors")
    (tmp_path / ".unfinished.safetensors").write_bytes(b"")
    union = Checkpoint.open(tmp_path)
    assert sorted(union.tensors) == sorted([*content, "other"])
    assert (union.index, union.index_metadata) == (None, {})
    save_file({"other": torch.ones(2)}, tmp_path / "weights-b.safetensors")
    refused(tmp_path, r"weights-b.*1 tensor \('other'\), which are also in 'adapter_model.safetensors'")


def test_a_hub_cache_snapshot_is_links_to_blobs(tmp_path: Path) -> None:
    source = two_shards(tmp_path / "source")
    cache = tmp_path / "models--moonshotai--Kimi-K2-Instruct"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(cache / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert sorted(Checkpoint.open(snapshot).tensors) == sorted(tensors())
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert sorted(Checkpoint.open(tmp_path / "shortcut").tensors) == sorted(tensors())
    # Another repository's blobs are outside this one, under their own name and behind a link.
    other = tmp_path / "models--evil--twin" / "snapshots" / "1"
    other.mkdir(parents=True)
    for path in snapshot.iterdir():
        (other / path.name).symlink_to(path.resolve())
    refused(other, "is a link to .*outside the folder")
    (other.parents[1] / "blobs").symlink_to(cache / "blobs")
    refused(other, "is a link to .*outside the folder")
    fake = tmp_path / "folder" / "snapshots" / "1"  # the shape of a cache in a place that is none
    fake.mkdir(parents=True)
    (tmp_path / "folder" / "blobs").mkdir()
    (cache / "blobs" / f"{0:064x}").rename(tmp_path / "folder" / "blobs" / "a")
    (fake / "model.safetensors").symlink_to("../../blobs/a")
    refused(fake, "is a link to .*outside the folder")


def test_links_inside_the_folder_are_followed_and_links_out_of_it_are_not(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "folder")
    shard = folder / "model-2-of-61.safetensors"
    (folder / "store").mkdir()
    shard.rename(folder / "store" / "a")
    shard.symlink_to("store/a")
    assert sorted(Checkpoint.open(folder).tensors) == sorted(tensors())
    shard.unlink()
    (folder / "store" / "a").rename(tmp_path / "secret")
    shard.symlink_to(tmp_path / "secret")
    refused(folder, r"model-2-of-61.safetensors is a link to .*secret, outside the folder")
    assert Checkpoint.open(shard).tensors  # the user's own path is followed
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(folder, r"lacks 1 of the 2 files that its index names \('model-2-of-61")


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors"),
        *("C:x.safetensors", "model.safetensors/", "..", ".", "", ".hidden.safetensors"),
        *("x\0.safetensors", "x\n.safetensors", "x\x1b[2J.safetensors", "\ud800.safetensors"),
        *("x" * 250 + ".safetensors", "pytorch_model.bin", "x.SAFETENSORS"),
    ],
)
def test_an_index_may_only_name_plain_safetensors_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = write(tmp_path / "folder", {}, {"weight_map": {"a": name}})
    refused(folder, r"index.json names the file '.*expected")
    with pytest.raises(CheckpointError, match=r"^fetched index names the file"):
        check_index({"weight_map": {"a": name}}, None, "fetched index")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is a JSON list: expected an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"weight_map": {}, "n": ' + "9" * 5000 + "}", "is not JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "maps 'a' to 1: expected a file name"),
        ('{"weight_map": {"a": null}}', "maps 'a' to None: expected a file name"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "repeats the key 'a'"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a git-LFS pointer"),
        (
            '{"weight_map": {"a": "gone.safetensors", "b": "too.safetensors"}}',
            r"lacks 2 of the 2 files that its index",
        ),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, message)


def test_check_index_alone_and_with_a_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-000163.safetensors", "b": "model-1-of-61.safetensors"}}
    assert check_index(index, None, "index") == index["weight_map"]
    with pytest.raises(CheckpointError, match=r"model-00001-of-000163.safetensors is missing"):
        check_index(index, tmp_path, "index")
    for name in index["weight_map"].values():
        (tmp_path / name).touch()
    assert check_index(index, tmp_path, "index") == index["weight_map"]
    for wrong in (None, [], {"weight_map": {"a": ["x"]}}):
        with pytest.raises(CheckpointError):
            check_index(wrong, None, "index")


def test_two_indexes_and_a_file_beside_an_index_are_ambiguous(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, "holds model.safetensors and an index that does not name it")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).rename(folder / "a.safetensors.index.json")
    assert sorted(Checkpoint.open(folder).tensors) == sorted(tensors())  # one index under another name
    (folder / "b.safetensors.index.json").write_text("{}")
    refused(folder, "has several indexes")


ONE = json.dumps(entry(0, 4)).encode()
# What the header promises, and the words of the complaint; safetensors itself must refuse each of them too.
HEADERS = {
    "gap": (
        raw({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)),
        "'b' leaves a gap before it: expected offset 4, not 6",
    ),
    "gap at the start": (
        raw({"a": entry(2, 4)}, bytes(4)),
        "'a' leaves a gap before it: expected offset 0, not 2",
    ),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "'b' overlaps the one before it"),
    "too long": (raw({"a": entry(0, 4)}, bytes(7)), "is 3 bytes too long: expected"),
    "too short": (raw({"a": entry(0, 4)}, bytes(3)), "is 1 bytes too short: expected"),
    "no data": (raw({"a": entry(0, 4)}), "is 4 bytes too short"),
    "reversed": (raw({"a": entry(4, 0, [4])}, bytes(4)), r"has data_offsets \[4, 0\]"),
    "negative": (raw({"a": entry(-4, 0, [4])}, bytes(4)), r"has data_offsets \[-4, 0\]"),
    "fraction": (raw({"a": entry(0, 4) | {"data_offsets": [0, 4.0]}}, bytes(4)), "has data_offsets"),
    "three offsets": (raw({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, bytes(4)), "two data_offsets"),
    "shape": (raw({"a": entry(0, 4, [5])}, bytes(4)), r"'a' has 4 bytes: expected 5 for U8 of shape \[5\]"),
    "item size": (raw({"a": entry(0, 4, [4], "BF16")}, bytes(4)), "has 4 bytes: expected 8 for BF16"),
    "sub-byte": (raw({"a": entry(0, 4, [4], "F4")}, bytes(4)), "has 4 bytes: expected 2 for F4"),
    "negative size": (raw({"a": entry(0, 4, [-2, -2])}, bytes(4)), r"has the shape \[-2, -2\]"),
    "huge size": (raw({"a": entry(0, 0, [1 << 70, 0])}), "has the shape"),
    "text size": (raw({"a": entry(0, 4, ["4"])}, bytes(4)), r"has the shape \['4'\]"),
    "true size": (raw({"a": entry(0, 1, [True])}, bytes(1)), r"has the shape \[True\]"),
    "dtype": (raw({"a": entry(0, 4, dtype="Q4_K")}, bytes(4)), "has the dtype 'Q4_K': expected one of"),
    "dtype list": (raw({"a": entry(0, 4, dtype=[])}, bytes(4)), r"has the dtype \[\]"),
    "no dtype": (raw({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4)), "two data_offsets"),
    "not an object": (raw({"a": 3}), "is 3: expected dtype"),
    "metadata": (raw({"__metadata__": {"format": 1}}), "has __metadata__ that is not all text"),
    "list": (raw(b"[]"), "begins with b'\\['"),
    "not JSON": (raw(b'{"a": '), "is not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "is not JSON"),
    "repeated": (raw(b'{"a":%b,"a":%b}' % (ONE, ONE), bytes(4)), "repeats the key 'a'"),
    "length": (struct.pack("<Q", 1 << 62) + b"{}", "begins with a header length of 4,611,686"),
    "length over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "expected at most 100,000,000"),
    "length 0": (struct.pack("<Q", 0) + bytes(20), "begins with a header length of 0"),
    "cut header": (raw({"a": entry(0, 4)})[:30], "is at least .* bytes too short: its header alone has"),
    "seven bytes": (bytes(7), "has 7 bytes: expected a safetensors file"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 17\n", "is a git-LFS pointer"),
    "zip": (b"PK\x03\x04\x14\x00\x08\x08archive/data.pkl" + bytes(50), "is a zip archive, as torch.save"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(30), "is a GGUF file"),
    "html": (b"<!DOCTYPE html><html>Not found</html>", "is an HTML or XML page"),
    "json": (b'{"error": "Repository not found"}', "is a JSON file"),
}
# Python's JSON keeps the last of two equal keys; so does safetensors, where it is no error to it.
OURS_ALONE = {"repeated"}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused_and_safetensors_agrees(tmp_path: Path, case: str) -> None:
    content, message = HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(tmp_path, message)
    refused(path, message, read_header)
    if case not in OURS_ALONE:
        with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt"):
            pass


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_under_a_safetensors_name_is_recognised(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        {"a": torch.zeros(3)}, tmp_path / "model.safetensors", _use_new_zipfile_serialization=not legacy
    )
    refused(tmp_path, "model.safetensors is a .*pickle, which is never opened")


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["consolidated.00.pth"],
        ["x.ckpt"],
        ["w.pt"],
        ["pytorch_model.bin.index.json", "README.md"],
    ],
)
def test_pickles_alone_are_refused_with_the_reason(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x02.")
    refused(tmp_path, f"holds pickle weights only \\('{re.escape(names[0])}'\\), which are never opened")
    save_file(tensors(), tmp_path / "model.safetensors")
    assert sorted(Checkpoint.open(tmp_path).tensors) == sorted(
        tensors()
    )  # pickles beside safetensors do not matter


def test_no_folder_no_weights_and_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no weights")
    os.mkfifo(tmp_path / "model.safetensors")  # reading it would wait for ever
    refused(tmp_path, "model.safetensors is not a regular file")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "model.safetensors is not a regular file")


def test_the_index_and_the_shards_must_agree(tmp_path: Path) -> None:
    names = list(tensors())
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    right = {key: name for name, keys in shards.items() for key in keys}
    promised = {"weight_map": right | {"ghost": "a.safetensors"}}
    refused(
        write(tmp_path / "1", shards, promised), r"places 1 tensor \('ghost'\) in 'a.safetensors'.*holds 3"
    )
    forgotten = {"weight_map": {key: name for key, name in right.items() if key != "packed"}}
    refused(
        write(tmp_path / "2", shards, forgotten),
        r"a.safetensors holds 1 tensor \('packed'\) that .* not name",
    )
    moved = {"weight_map": right | {"packed": "b.safetensors"}}
    refused(
        write(tmp_path / "3", shards, moved),
        r"\('packed'\), which the index places in 'b.safetensors'.* \(1 more problems\)",
    )
    doubled = {"a.safetensors": names[:3], "b.safetensors": names[2:]}
    folder = write(tmp_path / "4", doubled)
    refused(folder, r"a.safetensors holds 1 tensor \('packed'\), which are also in 'b.safetensors'")
    assert scan(folder).checkpoint.tensors["packed"].shard.name == "b.safetensors"  # where the index puts it


def test_scan_reports_all_problems_and_what_it_could_not_read(tmp_path: Path) -> None:
    names = list(tensors())
    shards = {f"{number}.safetensors": names[2 * number : 2 * number + 2] for number in range(4)}
    folder = write(tmp_path, shards)
    (folder / "0.safetensors").unlink()
    os.truncate(folder / "1.safetensors", (folder / "1.safetensors").stat().st_size - 5)
    found = scan(folder)
    told = [str(problem) for problem in found.problems]
    assert len(told) == 2
    assert "lacks 1 of the 4 files that its index names ('0.safetensors')" in told[0]
    assert "1.safetensors is 5 bytes too short" in told[1]
    assert found.unread == set(names[:4])
    assert sorted(found.checkpoint.tensors) == sorted(names[4:])


def test_names_are_shown_on_one_line_without_control_characters(tmp_path: Path) -> None:
    name = "x\n\x1b[31m" + "y" * 500
    (tmp_path / "model.safetensors").write_bytes(raw({name: entry(0, 4, [5])}, bytes(4)))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_json_files_have_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(CheckpointError, match=r"has 1,073,741,824 bytes: expected JSON of at most"):
        read_json(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")


def test_random_damage_is_judged_as_safetensors_judges_it(tmp_path: Path) -> None:
    """Flip, insert, cut: both readers accept a damaged header, with the same tensors, or neither does."""
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    choices = random.Random(20250711)
    pieces = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"0",
        b"1",
        b"-",
        b" ",
        b"null",
        b"1.0",
        b"F32",
        b"\xff",
        b"\0",
    ]
    accepted = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        at = choices.randrange(9, end)
        how = choices.randrange(4)
        if how == 0:
            damaged[at] = choices.randrange(256)
        elif how == 1:
            damaged[at] = choices.choice(b'0123456789{}[]",: ')
        elif how == 2:
            del damaged[choices.randrange(len(damaged)) :]
        else:
            header = damaged[8:end]
            header[at - 8 : at - 8] = choices.choice(pieces)
            damaged = bytearray(raw(bytes(header), damaged[end:]))
        path.write_bytes(damaged)
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                theirs = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError):
            theirs = None
        try:
            ours = {name: (info.shape, info.dtype) for name, info in read_header(path)[0].items()}
        except CheckpointError:
            ours = None
        if theirs is None and ours is not None:
            assert b"-0" in damaged[8 : end + 2]  # zero to Python, no unsigned number to Rust
        else:
            assert ours == theirs, bytes(damaged[8:end])
        accepted += ours is not None
    assert 50 < accepted < 1450
