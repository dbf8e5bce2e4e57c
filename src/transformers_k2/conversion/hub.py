"""Convert a repository of the hub while it is downloaded: a terabyte never needs two.

The headers of all shards are fetched first, a few megabytes, and stand in a folder as files of the right size without data,
so that the whole conversion is planned and checked before the first weight is downloaded. A shard is fetched when the first
tensor of it is read, the next one meanwhile, and given up again when everything made of it is on the disk.

Given up: a shard whose download was cut short is resumed by huggingface_hub, but a shard that was given up and is needed by
a file that must be begun anew is downloaded again.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from ..checkpoint import INDEX_SUFFIX, MAX_HEADER_BYTES, CheckpointError
from ..files import put_in_place, temporary_name
from ..lazy_tensors import OpenFiles
from .tasks import File

_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
_SMALL = 64 << 20  # bytes; what is larger beside the shards is no tokenizer, template or licence
_SIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_SHARDS = ".safetensors"


class Repository(NamedTuple):
    """A repository at one commit: its files and their sizes in bytes."""

    id: str
    revision: str
    sizes: Mapping[str, int]

    @property
    def shards(self) -> list[str]:
        """Names of the files with weights."""
        return sorted(name for name in self.sizes if name.endswith(_SHARDS))


def repository_id(source: str | Path) -> tuple[str, str | None] | None:
    """("owner/name", revision) if this is no path that exists but may be a hub id, `owner/name` or `owner/name@revision`."""
    match = _ID.fullmatch(str(source))
    if match is None or Path(source).exists() or Path(source).suffix in (".json", _SHARDS):
        return None
    return match["id"], match["revision"]


def open_repository(name: str, revision: str | None = None) -> Repository:
    """The files of a repository, its revision pinned to a commit.

    Raises:
        ValueError: there is none of that name, or it may not be read, or it holds no safetensors.
    """
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}{at} cannot be opened on the hub ({str(error).splitlines()[0]}): expected a checkpoint folder, or "
            "the id of a model repository, as owner/name or owner/name@revision."
        ) from error
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or () if "/" not in one.rfilename}
    assert info.sha is not None
    found = Repository(name, info.sha, sizes)
    if not found.shards:
        raise CheckpointError(f"{name} holds no {_SHARDS} files: expected a checkpoint in safetensors.")
    return found


def download(repository: Repository) -> Path:
    """Everything a conversion needs, into the hub's cache; the folder it is in there."""
    wanted = [*repository.shards, *_beside(repository)]
    return Path(snapshot_download(repository.id, revision=repository.revision, allow_patterns=wanted))


class StreamedFiles(OpenFiles):
    """Shards of a repository in a folder of their own, each there while it is needed."""

    def __init__(self, repository: Repository, folder: Path) -> None:
        super().__init__()
        self.repository, self.folder = repository, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._locks = {folder / name: threading.Lock() for name in repository.shards}
        self._here = {path for path in self._locks if self._marker(path).exists()}
        self._needs: dict[str, set[Path]] = {}
        self._left: Counter[Path] = Counter()
        self._order: list[Path] = []
        self._ahead: dict[Path, Future[None]] = {}
        self._downloads = ThreadPoolExecutor(1)
        self.callback(self._downloads.shutdown, cancel_futures=True)
        for name in _beside(repository):
            if not (folder / name).exists():
                self._fetch(folder / name)
        for path in self._locks:
            if not path.exists():
                self._hollow(path)

    def plan(self, files: Sequence[File]) -> None:
        """Which shards each file that is to be written needs, in the order of the files."""
        self._needs = {
            file.name: {info.shard for task in file.tasks() for info in task.value.sources()}
            for file in files
        }
        self._left = Counter(path for paths in self._needs.values() for path in paths)
        self._order = list(dict.fromkeys(path for paths in self._needs.values() for path in sorted(paths)))

    def written(self, name: str) -> None:
        """A file is on the disk: give up the shards that nothing needs any more."""
        for path in self._needs.pop(name, ()):
            self._left[path] -= 1
            if not self._left[path]:
                with self._locks[path]:
                    self.close_file(path)
                    self._hollow(path)
                    self._here.discard(path)

    def _descriptor(self, path: Path) -> int:
        with self._locks[path]:
            if path not in self._here:
                self._download(path)
                self._look_ahead(path)
        return super()._descriptor(path)

    def _look_ahead(self, path: Path) -> None:
        """Begin with the next shard that is not here."""
        for other in self._order[self._order.index(path) + 1 :] if path in self._order else ():
            if other not in self._here and other not in self._ahead and self._left[other]:
                self._ahead[other] = self._downloads.submit(self._fetch_shard, other)
                return

    def _download(self, path: Path) -> None:
        if (running := self._ahead.pop(path, None)) is not None:
            running.result()
        else:
            self._fetch_shard(path)
        self._here.add(path)

    def _fetch_shard(self, path: Path) -> None:
        self._fetch(path)
        self._marker(path).touch()

    def _fetch(self, path: Path) -> None:
        incoming = self.folder / ".incoming" / path.name
        hf_hub_download(self.repository.id, path.name, revision=self.repository.revision, local_dir=incoming)
        found, wanted = (incoming / path.name).stat().st_size, self.repository.sizes[path.name]
        if found != wanted:
            raise CheckpointError(
                f"{path.name} of {self.repository.id} came with {found:,} bytes: expected {wanted:,}."
            )
        os.replace(incoming / path.name, path)
        shutil.rmtree(incoming)

    def _hollow(self, path: Path) -> None:
        """The header of a shard, and a hole in place of its data."""
        self._marker(path).unlink(missing_ok=True)
        if path.exists():
            with path.open("rb") as file:
                start = file.read(8)
                start += file.read(int.from_bytes(start, "little"))
        else:
            start = self._header(path.name)
        temporary = temporary_name(path)
        with temporary.open("wb") as file:
            file.write(start)
            file.truncate(self.repository.sizes[path.name])
        put_in_place(temporary, path)

    def _header(self, name: str) -> bytes:
        """The start of a shard, up to its data."""
        start = self._range(name, 0, min(1 << 18, self.repository.sizes[name]))
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES or 8 + length > self.repository.sizes[name]:
            raise CheckpointError(
                f"{name} of {self.repository.id} begins with a header of {length:,} bytes: expected a safetensors file."
            )
        if 8 + length > len(start):
            start += self._range(name, len(start), 8 + length)
        return start[: 8 + length]

    def _range(self, name: str, start: int, stop: int) -> bytes:
        url = hf_hub_url(self.repository.id, name, revision=self.repository.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        response = http_backoff("GET", url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        content = response.content[: stop - start]
        if len(content) != stop - start:
            raise CheckpointError(
                f"{url} gave {len(content):,} bytes of {stop - start:,} asked for: expected a server that sends ranges."
            )
        return content

    def _marker(self, path: Path) -> Path:
        """Says that a shard's data are here."""
        return path.with_name(f".{path.name}.here")


def _beside(repository: Repository) -> list[str]:
    """Configuration, index, tokenizer, licence; no code, no pickles."""
    return [
        name
        for name, size in repository.sizes.items()
        if not name.startswith(".")
        and size <= (1 << 29 if name.endswith(INDEX_SUFFIX) else _SMALL)
        and (name.endswith(_SIDE) or name.startswith(("LICENSE", "NOTICE")))
    ]
