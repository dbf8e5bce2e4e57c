"""What lies in a folder: the tensors of a checkpoint by name, in whatever files, its config.json, and what stands beside.

Safetensors with an index or without, one file a model-parallel rank, an index alone, or torch.distributed.checkpoint's own
files. Names and headers only; what they mean is opened.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import resources
from ..checkpoint import (
    INDEX_SUFFIX,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    check_index,
    file_inside,
    read_header,
    read_json,
)
from ..lazy_tensors import LazyTensor, OpenFiles
from . import dcp
from . import layout as layouts
from .engine import RECORD
from .staging import STAGING, check_finished, is_complete

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
# What stands beside weights and is safe to copy: no code, no pickles.
_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_SIDE_NAMES = ("LICENSE", "NOTICE")
_NOT_COPIED = (CONFIG, "adapter_config.json", RECORD)


@dataclass(frozen=True)
class Found:
    """Tensors by name; of a layout with model-parallel ranks, one of each name a rank."""

    folder: Path
    tensors: Mapping[str, TensorInfo | LazyTensor | None]
    ranks: Sequence[Mapping[str, TensorInfo]]
    files: tuple[Path, ...]
    layout: str | None = None  # that the files' names prove
    dropped: tuple[tuple[str, str, int], ...] = ()


def find(path: Path, files: OpenFiles, layout: str | None, names_only: bool) -> Found:
    """The tensors in a folder, a file or an index.

    Args:
        files: open while weights are read.
        layout: of the names, if that is known: a DCP folder's may be wrapped.
        names_only: take them from the index where there is one.

    Raises:
        CheckpointError: there are none, or their files are broken or incomplete.
    """
    if dcp.is_dcp(path):
        return _dcp_of(path, files, layout)
    return _names_of(path) if names_only or path.name.endswith(INDEX_SUFFIX) else _files_of(path)


def _dcp_of(path: Path, files: OpenFiles, layout: str | None) -> Found:
    """The tensors of a DCP folder, without what wraps the model's names."""
    if is_complete(path / STAGING):
        check_finished(path)
    if others := sorted(one.name for one in path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} holds {dcp.METADATA} of torch.distributed.checkpoint and {others[0]}: expected one checkpoint."
        )
    tables = [layouts.load(name).kinds for name in ([layout] if layout else layouts.names())]
    contents = dcp.open_dcp(path, files)
    tensors, dropped = dcp.model_names(
        contents,
        lambda kinds: max(sum(num for kind, num in kinds.items() if kind in table) for table in tables),
    )
    return Found(path, tensors, (), contents.files, dropped=dropped)


def _files_of(path: Path) -> Found:
    """The tensors in a folder or file, from headers."""
    if path.is_dir():
        check_finished(path)
        if (found := rank_files(path)) is not None:
            layout, ranks = found
            headers = [read_header(file)[0] for file in ranks]
            tensors = {name: info for header in reversed(headers) for name, info in header.items()}
            return Found(path, tensors, headers, tuple(ranks), layout)
    checkpoint = Checkpoint.open(path)
    folder = path if path.is_dir() else path.parent
    return Found(folder, checkpoint.tensors, (), tuple(checkpoint.shards))


def rank_files(folder: Path) -> tuple[str, list[Path]] | None:
    """The layout whose model-parallel ranks have their files in a folder, and those files; None if there are none."""
    for name in layouts.names():
        pattern = layouts.load(name).files
        if pattern is not None and (ranks := _rank_files(folder, pattern)) is not None:
            return name, ranks
    return None


def _rank_files(folder: Path, pattern: str) -> list[Path] | None:
    """The files of all ranks in order; None if there are none.

    Raises:
        CheckpointError: some are missing.
    """
    text = re.escape(pattern)
    text = text.replace("<rank>", r"(?P<rank>\d{1,5})").replace("<ranks>", r"(?P<ranks>\d{1,5})")
    found = [match for path in folder.iterdir() if (match := re.fullmatch(text, path.name))]
    if not found:
        return None
    worlds = {int(match["ranks"]) for match in found}
    if len(worlds) > 1:
        raise CheckpointError(
            f"{folder} holds files of {sorted(worlds)} ranks: expected those of one number."
        )
    num_ranks = worlds.pop()
    by_rank = {int(match["rank"]): folder / match[0] for match in found}
    if lost := [rank for rank in range(num_ranks) if rank not in by_rank]:
        wanted = pattern.replace("<rank>", str(lost[0])).replace("<ranks>", str(num_ranks))
        raise CheckpointError(
            f"{folder} lacks {wanted} ({len(lost)} of {num_ranks} ranks): expected all of them."
        )
    return [file_inside(folder, by_rank[rank].name) for rank in range(num_ranks)]


def _names_of(path: Path) -> Found:
    """The tensors that an index names."""
    index = path if path.is_file() else path / f"model{INDEX_SUFFIX}"
    if not index.is_file():
        return _files_of(path)
    weight_map = check_index(read_json(index), None, str(index))
    return Found(index.parent, dict.fromkeys(weight_map), (), ())


def find_config(folder: Path, given: str | Path | None) -> dict[str, Any]:
    """The config.json that was given (a path, or a name in configs/), else the one in the folder."""
    if given is not None:
        path = Path(given)
        return read_json(path if path.is_file() else resources.find("configs", str(given)))
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} has no config.json: expected that of the model beside its weights, or config=... (--config)."
        )
    return read_json(file_inside(folder, CONFIG))


def side_files(folder: Path) -> dict[str, bytes | Path]:
    """Tokenizer, templates, generation config, licence: what to copy along; neither code nor pickles nor links away.

    A tokenizer_config.json loses its `auto_map`, which names code that is not copied.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, bytes | Path] = {
        path.name: file_inside(folder, path.name)
        for path in sorted(folder.iterdir())
        if (path.suffix in _SIDE_SUFFIXES or (path.name.startswith(_SIDE_NAMES) and not path.suffix))
        and path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name not in _NOT_COPIED
    }
    if TOKENIZER in found and "auto_map" in (content := read_json(folder / TOKENIZER)):
        del content["auto_map"]
        found[TOKENIZER] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return found
