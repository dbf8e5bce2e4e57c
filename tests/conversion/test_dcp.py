"""Folders of torch.distributed.checkpoint, with torch's own save and load as the oracle, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    FileSystemReader,
    FileSystemWriter,
    HuggingFaceStorageReader,
    QuantizedHuggingFaceStorageReader,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.multiprocessing import start_processes

import checkpoints
import dcp_ranks
from conversion_results import read, same
from transformers_k2.checkpoint import CheckpointError
from transformers_k2.conversion import convert, dcp_writer, verify
from transformers_k2.conversion.dcp import METADATA, is_dcp, model_names, open_dcp
from transformers_k2.conversion.opened import open_model
from transformers_k2.lazy_tensors import OpenFiles

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage")

FORMS = list(SerializationFormat)
# Neither a vocabulary nor a number of experts that two ranks share evenly.
UNEVEN = {"vocab_size": 321, "n_routed_experts": 5}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return checkpoints.per_expert(checkpoints.stock_model(**UNEVEN))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return checkpoints.hub_config(**UNEVEN)


@pytest.fixture(scope="module")
def src(plain: Tensors, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("src") / "hub", plain, config)


@pytest.fixture(scope="module")
def ranks(plain: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes save."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(plain, folder / "plain.pt")
    arguments = (str(folder / "store"), str(folder / "plain.pt"), str(folder))
    start_processes(
        dcp_ranks.run, args=arguments, nprocs=2, start_method="fork"
    )  # which spares two imports of torch
    return folder


def save(state: dict[str, Any], folder: Path, form: SerializationFormat = FORMS[0]) -> Path:
    dcp.save(state, storage_writer=FileSystemWriter(folder, serialization_format=form), no_dist=True)
    return folder


def opened(folder: Path) -> Tensors:
    with OpenFiles() as files:
        return {name: lazy[...] for name, lazy in open_dcp(folder, files).tensors.items()}


def loaded(folder: Path, like: Tensors) -> Tensors:
    """Through torch's own reader, into empty tensors."""
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in like.items()}
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def with_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_one_process(form: SerializationFormat, tmp_path: Path) -> None:
    state = {
        "matrix": torch.randn(5, 3).bfloat16(),
        "vector": torch.randn(7),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "one": torch.randn(1, 1, 3),
        "counts": torch.arange(5),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "part": torch.randn(9, 4)[2:5],
    }
    if form == SerializationFormat.TORCH_SAVE:  # which keeps strides
        state["turned"] = torch.randn(4, 6).mT
        state["permuted"] = torch.randn(2, 3, 5).permute(2, 0, 1)
    folder = save({**state, "text": "an object"}, tmp_path / "dcp", form)
    assert is_dcp(folder)
    assert not is_dcp(tmp_path)
    with OpenFiles() as files:
        contents = open_dcp(folder, files)
        assert contents.objects == ("text",)
        found = {name: lazy[...] for name, lazy in contents.tensors.items()}
        assert torch.equal(found.pop("number"), state.pop("number"))
        same({name: tensor.contiguous() for name, tensor in found.items()}, state)
        for name in ("turned", "permuted") if "turned" in state else ():
            assert torch.equal(contents.tensors[name][1:3], state[name][1:3])
            assert torch.equal(contents.tensors[name][:, 1:2], state[name][:, 1:2])


@pytest.mark.parametrize("form", FORMS)
def test_two_processes(form: SerializationFormat, ranks: Path) -> None:
    expected = {
        name: dcp_ranks.values(shape, seed)
        for seed, (name, (shape, _)) in enumerate(dcp_ranks.PLACEMENTS.items())
    }
    folder = ranks / f"odd {form.name}"
    same(opened(folder), expected)
    if form == SerializationFormat.TORCH_SAVE:  # the only one that torch's reader of such folders knows
        same(loaded(folder, expected), expected)
    with OpenFiles() as files:
        tensors = open_dcp(folder, files).tensors
        for name, tensor in expected.items():
            region = tuple(slice(size // 3, size - size // 4) for size in tensor.shape)
            assert torch.equal(tensors[name][region], tensor[region]), name
    same(opened(ranks / "fsdp"), {"weight": dcp_ranks.values((11, 6), 0), "bias": dcp_ranks.values((11,), 2)})


@pytest.mark.parametrize("form", FORMS)
def test_a_training_state_of_two_processes(
    form: SerializationFormat, ranks: Path, src: Path, plain: Tensors, tmp_path: Path
) -> None:
    folder = ranks / f"model {form.name}"
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(folder, tmp_path / "dst", "hub_bf16")
    summary = convert(folder, tmp_path / "dst", "hub_bf16", config=src / "config.json", quiet=True)
    same(read(tmp_path / "dst"), plain)
    assert summary.lines[1:] == (
        "left out: 3 x optim.* (training state, no part of the model)",
        "left out: 1 x step (no tensor, but a pickled object, which is never opened)",
    )
    verdict = verify(folder, src, config=src / "config.json", quiet=True)
    assert verdict.ok
    assert verdict.num_tensors == len(plain)


@pytest.mark.parametrize("prefix", ["", "model.", "app.model.", "state_dict.model."])
def test_prefixes(prefix: str, plain: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in plain.items()}
    head = prefix.removesuffix("model.")
    state[f"{head}optimizer.state.{next(iter(plain))}.exp_avg"] = torch.ones(2)
    state[f"{prefix}model.layers.0.mlp._extra_state"] = "an object"
    folder = with_config(save(state, tmp_path / "dcp"), config)
    with OpenFiles() as files:
        model = open_model(folder, files)
        assert model.layout == "hub_bf16"
        same({name: model.read(name).values()[...] for name in model.names}, plain)
    assert [(what, num) for what, _, num in model.dropped] == [
        (f"{head}optimizer.*", 1),
        (f"{prefix}model.layers.#.mlp._extra_state", 1),
    ]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_packed_weights_beside_a_vision_tower(
    prefix: str, plain: Tensors, config: dict[str, Any], tmp_path: Path
) -> None:
    """K2.5's names, whose own prefix is not stripped."""
    packed = checkpoints.to_int4(plain)
    tensors = {f"language_model.{name}": tensor for name, tensor in packed.items()}
    tensors |= {"vision_tower.blocks.0.wqkv.weight": torch.randn(24, 16)}
    text = config | {"quantization_config": checkpoints.INT4_CONFIG}
    wrapper = {"model_type": "kimi_k25", "text_config": text, "dtype": "bfloat16"}
    state = {prefix + name: tensor for name, tensor in tensors.items()}
    folder = with_config(save(state, tmp_path / "dcp"), wrapper)
    convert(folder, tmp_path / "dst", "k25_int4", quiet=True)
    same(read(tmp_path / "dst"), tensors)


def test_what_nothing_claims(plain: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in plain.items()}
    folder = with_config(save(state | {"ema.decay": torch.ones(2)}, tmp_path / "more"), config)
    with OpenFiles() as files, pytest.raises(ValueError, match=r"holds 1 tensors \(ema.decay\) that no row"):
        open_model(folder, files)
    lost = state.pop("model.model.norm.weight")
    folder = with_config(save(state, tmp_path / "less"), config)
    with OpenFiles() as files, pytest.raises(ValueError, match=r"lacks 1 tensors \(model.norm.weight\)"):
        open_model(folder, files)
    contents = save({"model.a": lost, "a": lost, "model.b": lost}, tmp_path / "twice")
    with OpenFiles() as files, pytest.raises(ValueError, match=r"a and model\.a are both there"):
        model_names(open_dcp(contents, files), lambda kinds: sum(kinds.values()) if "b" in kinds else 0)


@pytest.mark.parametrize("layout", ["torchtitan", "transformers_fused", "hub_bf16"])
def test_written_and_read_again(
    layout: str, src: Path, plain: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp_writer, "_CHUNK_BYTES", 50_000)  # less than an expert's matrix
    (src / "tokenizer_config.json").write_text("{}")
    summary = convert(src, tmp_path / "dcp", layout, container="dcp", shard_bytes=1_000_000, quiet=True)
    convert(src, tmp_path / "files", layout, quiet=True)
    expected = read(tmp_path / "files")
    same(loaded(tmp_path / "dcp", expected), expected)
    metadata = FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    assert metadata.keys() == expected.keys()
    chunks = [chunk.sizes.numel() for entry in metadata.values() for chunk in entry.chunks]
    assert max(chunks) * 2 <= 50_000
    assert len(chunks) > len(expected) + 40
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == summary.num_shards > 3
    assert json.loads((tmp_path / "dcp/config.json").read_text())["vocab_size"] == 321
    assert (tmp_path / "dcp/tokenizer_config.json").exists()
    with OpenFiles() as files:
        assert open_model(tmp_path / "dcp", files).layout == layout
    convert(tmp_path / "dcp", tmp_path / "back", "hub_bf16", quiet=True)
    same(read(tmp_path / "back"), plain)
    verdict = verify(tmp_path / "dcp", quiet=True)
    assert verdict.ok
    assert verdict.num_tensors == len(plain)
    assert verify(tmp_path / "dcp", src, quiet=True).ok


def test_written_from_fp8(src: Path, plain: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    """Decoded on the way, in float32."""
    stored = checkpoints.to_fp8(plain)
    fp8 = checkpoints.write(
        tmp_path / "fp8", stored, config | {"quantization_config": checkpoints.FP8_CONFIG}
    )
    convert(fp8, tmp_path / "dcp", "transformers_fused", dtype="float32", container="dcp", quiet=True)
    convert(tmp_path / "dcp", tmp_path / "back", "hub_bf16", dtype="float32", quiet=True)
    same(read(tmp_path / "back"), checkpoints.decoded(stored, torch.float32))


def test_destinations(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = tmp_path / "dcp"
    with pytest.raises(ValueError, match="container is 'zip': expected one of safetensors, dcp"):
        convert(src, dst, "hub_bf16", container="zip")
    with pytest.raises(ValueError, match="container is 'dcp', but the weights are of fp8"):
        convert(src, dst, "hub_fp8", container="dcp")
    convert(src, dst, "hub_bf16", container="dcp", quiet=True)
    before = {path.name: path.read_bytes() for path in dst.iterdir()}
    for container, message in (("dcp", "another folder, or overwrite"), ("safetensors", "another folder")):
        with pytest.raises(ValueError, match=message):
            convert(src, dst, "hub_bf16", container=container)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="2 processes were started: expected one"):
            convert(src, dst, "torchtitan", container="dcp", overwrite=True)
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == before
    convert(src, dst, "torchtitan", container="dcp", overwrite=True, shard_bytes=1_000_000, quiet=True)
    convert(src, dst, "hub_bf16", container="dcp", overwrite=True, quiet=True)
    assert {
        path.name: path.read_bytes() for path in dst.iterdir()
    } == before  # and no file of the other is left
    with pytest.raises(ValueError, match=r"holds model-1-of-3.safetensors: expected another folder"):
        convert(dst, src, "hub_bf16", container="dcp", overwrite=True)
    (dst / "model.safetensors").write_bytes(b"")
    with (
        OpenFiles() as files,
        pytest.raises(ValueError, match=r"and model.safetensors: expected one checkpoint"),
    ):
        open_model(dst, files)


def test_a_run_that_fails(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, and numbers that are not finite: no folder is left; a second run is not disturbed."""
    num, real = 0, Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal num
            num += 1
            if num > 300:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        return Full(path, mode) if path.suffix == ".distcp" else real(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(ValueError, match=r"dcp is full \(No space left on device\)"):
            convert(src, tmp_path / "dcp", "hub_bf16", container="dcp", quiet=True)
    assert num > 300
    assert not (tmp_path / "dcp").exists()
    convert(src, tmp_path / "dcp", "hub_bf16", container="dcp", quiet=True)
    huge = {
        name: tensor.float() * (1e39 if name == "model.norm.weight" else 1)
        for name, tensor in read(src).items()
    }
    checkpoints.write(tmp_path / "huge", huge, checkpoints.hub_config(**UNEVEN), stray=False)
    with pytest.raises(
        ValueError, match=r"model.norm.weight, rows 0 to 255: expected weights that are finite in BF16"
    ):
        convert(
            tmp_path / "huge", tmp_path / "bad", "hub_bf16", dtype="bfloat16", container="dcp", quiet=True
        )
    assert not (tmp_path / "bad").exists()


def test_a_run_that_is_killed(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files are written, and while they are moved into place: no checkpoint; repeated, the same bytes."""
    options: dict[str, Any] = {"container": "dcp", "shard_bytes": 1_000_000, "quiet": True}
    convert(src, tmp_path / "whole", "torchtitan", **options)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    dst, real = tmp_path / "dst", os.replace
    for name in ("__0_3_0.distcp", METADATA):

        def killed(source: Any, target: Any, name: str = name) -> None:
            if Path(target).name == name and Path(target).parent == dst:
                os._exit(9)
            real(source, target)

        if (pid := os.fork()) == 0:
            os.replace = killed
            convert(src, dst, "torchtitan", **options)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        with OpenFiles() as files, pytest.raises(ValueError, match="unfinished conversion"):
            open_model(dst, files)
    with pytest.raises(ValueError, match="holds an unfinished run with"):
        convert(src, dst, "hub_bf16", **options)
    convert(src, dst, "torchtitan", **options)
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == whole


@pytest.mark.parametrize("form", FORMS)
def test_files_that_are_cut_or_missing(form: SerializationFormat, tmp_path: Path) -> None:
    folder = save({"a": torch.randn(40, 30), "b": torch.randn(8)}, tmp_path / "dcp", form)
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 5, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp (has|ends)"):
            opened(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing, which holds a part of a"):
        opened(folder)
    file.write_bytes(whole)
    metadata = (folder / METADATA).read_bytes()
    for size in (0, 1, len(metadata) // 2, len(metadata) - 1):
        (folder / METADATA).write_bytes(metadata[:size])
        with pytest.raises(
            CheckpointError, match=r"\.metadata cannot be read .*expected a pickle of torch's, whole"
        ):
            opened(folder)
    for other in ([], {"state_dict_metadata": {}}, None):
        (folder / METADATA).write_bytes(pickle.dumps(other))
        with pytest.raises(CheckpointError, match=r"\.metadata has no .*expected the metadata"):
            opened(folder)


def test_damaged_zips(tmp_path: Path) -> None:
    folder = save({"a": torch.randn(40, 30)}, tmp_path / "dcp")
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    for at in (len(whole) - 22, len(whole) - 200):
        file.write_bytes(whole[:at] + bytes(len(whole) - at))
        with pytest.raises(CheckpointError, match=r"a at byte 0 is damaged"):
            opened(folder)
    file.write_bytes(whole.replace(b"FloatStorage", b"ShortStorage"[:12]))
    with pytest.raises(CheckpointError, match=r"is torch.int16 \[40, 30\]: expected torch.float32"):
        opened(folder)


class Runs:
    """What a malicious pickle would do."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def test_malicious_pickles(tmp_path: Path) -> None:
    folder = save({"a": torch.randn(4, 3)}, tmp_path / "dcp")
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')"
    cases = {
        "posix.system": pickle.dumps(Runs(os.system, f"touch {mark}")),
        "builtins.eval": pickle.dumps(Runs(eval, code)),
        "builtins.getattr": b"cbuiltins\ngetattr\n.",
        "torch.serialization.load": pickle.dumps(Runs(torch.load, str(mark))),
        "torch.load": b"ctorch\nload\n.",
        "antigravity.x": b"cantigravity\nx\n.",
        "torch._inductor": b"ctorch\n_inductor\n.",
        "torch.distributed.checkpoint.metadata.os": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x02os\x93.",
        "torch.distributed.checkpoint.metadata.os.system": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata"
        b"\x8c\x09os.system\x93.",
    }
    good = (folder / METADATA).read_bytes()
    for name, data in cases.items():
        (folder / METADATA).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"a pickle that names {name}, which was not run"):
            opened(folder)
    assert "antigravity" not in sys.modules
    # Records cannot be turned into what is called, nor torch's own classes changed.
    spoilt = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'__init__'\nS'x'\nstb."
    (folder / METADATA).write_bytes(spoilt)
    before = dcp.Metadata.__init__
    with pytest.raises(CheckpointError):
        opened(folder)
    assert dcp.Metadata.__init__ is before
    assert not mark.exists()

    # The same in a tensor's own pickle.
    (folder / METADATA).write_bytes(good)
    file = folder / "__0_0.distcp"
    size, target = file.stat().st_size, io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(target, "w") as other:
        for entry in archive.infolist():
            evil = entry.filename.endswith("data.pkl")
            other.writestr(entry.filename, cases["posix.system"] if evil else archive.read(entry))
        other.writestr("archive/filler", b"")
    assert target.tell() < size
    with zipfile.ZipFile(target, "a") as other:
        other.comment = bytes(size - target.getbuffer().nbytes)
    file.write_bytes(target.getvalue())
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        opened(folder)
    assert not mark.exists()


def edited(folder: Path, change: Any) -> None:
    """Torch's own metadata, changed."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_metadata_that_does_not_fit(ranks: Path, tmp_path: Path) -> None:
    def hole(metadata: dcp.Metadata) -> None:
        metadata.state_dict_metadata["a"].size = torch.Size([5, 3])

    def packed(metadata: dcp.Metadata) -> None:
        next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]

    def outside(metadata: dcp.Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../outside"

    def beyond(metadata: dcp.Metadata) -> None:
        metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([5, 3])

    def complex_numbers(metadata: dcp.Metadata) -> None:
        metadata.state_dict_metadata["a"].properties.dtype = torch.complex64

    (tmp_path / "outside").write_bytes(b"")
    for number, (change, message) in enumerate(
        (
            (hole, r"a is in 1 chunks that do not make up \[5, 3\]"),
            (packed, r"a went through zstd: expected a checkpoint that was saved without extensions"),
            (outside, r"outside the folder"),
            (beyond, r"chunks that do not make up \[4, 3\]"),
            (complex_numbers, r"a is complex64: expected one of"),
        )
    ):
        folder = save({"a": torch.randn(4, 3)}, tmp_path / str(number))
        edited(folder, change)
        with pytest.raises(CheckpointError, match=message):
            opened(folder)


def test_huggingface_reader(src: Path, plain: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    """torch's reader of safetensors folders reads ours, plain and in FP8."""
    convert(src, tmp_path / "bf16", "hub_bf16", shard_bytes=1_000_000, quiet=True)
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in plain.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "bf16")), no_dist=True)
    same(state, plain)
    convert(src, tmp_path / "fp8", "hub_fp8", shard_bytes=1_000_000, quiet=True)
    expected = checkpoints.decoded(read(tmp_path / "fp8"), torch.float32)
    assert sum(name.endswith("_scale_inv") for name in read(tmp_path / "fp8")) > 40
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    reader = QuantizedHuggingFaceStorageReader(str(tmp_path / "fp8"), target_dtype=torch.float32)
    dcp.load(state, storage_reader=reader, no_dist=True)
    same(state, expected)
