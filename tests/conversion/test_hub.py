"""Conversions of a hub repository while it is downloaded, by huggingface_hub from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import checkpoints
from conversion_results import problems, read, same
from transformers_k2.conversion import convert, hub

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The part of the hub's protocol that a download of one repository, owner/tiny, needs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.downloads: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.num_bytes = 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(self.server.folder.iterdir())
        if path.startswith("/api/models/owner/tiny/tree"):
            tree = [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0"} for one in names
            ]
            self.reply(200, json.dumps(tree).encode(), {})
            return
        if path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": one.name, "size": one.stat().st_size} for one in names]
            self.reply(200, json.dumps({"id": "owner/tiny", "sha": SHA, "siblings": siblings}).encode(), {})
            return
        prefix = f"/owner/tiny/resolve/{SHA}/"
        if not path.startswith(prefix) or not (self.server.folder / path.removeprefix(prefix)).is_file():
            self.reply(
                404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
            return
        name = path.removeprefix(prefix)
        content = (self.server.folder / name).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": SHA,
            "Accept-Ranges": "bytes",
        }
        if not body:
            self.reply(200, content, headers, body=False)
            return
        if (asked := self.headers.get("Range")) is None:
            self.server.downloads[name] += 1
            if name in self.server.broken:
                self.reply(403, b"{}", {"X-Error-Message": "no"})
            else:
                self.server.num_bytes += len(content)
                self.reply(200, content, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content) - 1) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.reply(206, part, headers)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    plain = checkpoints.per_expert(checkpoints.stock_model())
    config = checkpoints.hub_config() | {"quantization_config": checkpoints.FP8_CONFIG}
    checkpoints.write(tmp_path / "whole", checkpoints.to_fp8(plain), config, stray=False)
    folder = tmp_path / "upstream"
    convert(tmp_path / "whole", folder, "hub_fp8", shard_bytes=600_000)  # layer after layer, as the hub's are
    shutil.rmtree(tmp_path / "whole")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling_deepseek.py").write_text("raise SystemExit")
    served = Hub(folder)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setattr(hub, "HfApi", partial(hub.HfApi, endpoint=endpoint))
    for name in ("hf_hub_download", "hf_hub_url", "snapshot_download"):
        monkeypatch.setattr(hub, name, partial(getattr(hub, name), endpoint=endpoint))
    monkeypatch.setattr(
        hub, "snapshot_download", partial(hub.snapshot_download, cache_dir=tmp_path / "cache")
    )
    yield served
    served.shutdown()
    served.server_close()


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def expected(server: Hub) -> dict[str, torch.Tensor]:
    meaning = checkpoints.decoded(read(server.folder), torch.bfloat16)
    return {name: value for name, value in meaning.items() if "inv_freq" not in name}


def test_a_plan_needs_headers_only(server: Hub, tmp_path: Path) -> None:
    summary = convert("owner/tiny", tmp_path / "dst", "hub_bf16", dry_run=True)
    assert summary.num_tensors == len(expected(server))
    assert not any(name.endswith(".safetensors") for name in server.downloads)
    assert not (tmp_path / "dst").exists()


def test_shards_come_and_go(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is downloaded once, few are there at a time, and nothing is left beside the result."""
    held: list[int] = []
    fetch = hub.StreamedFiles._fetch_shard

    def counted(self: hub.StreamedFiles, path: Path) -> None:
        fetch(self, path)
        held.append(len(list(self.folder.glob(".*.here"))))

    monkeypatch.setattr(hub.StreamedFiles, "_fetch_shard", counted)
    convert("owner/tiny@main", tmp_path / "dst", "hub_bf16", shard_bytes=500_000, discard_source=True)
    same(read(tmp_path / "dst"), expected(server))
    assert problems(tmp_path / "dst") == []
    assert {path.name for path in tmp_path.iterdir()} == {"upstream", "dst"}
    assert {name: server.downloads[name] for name in shards(server.folder)} == dict.fromkeys(
        shards(server.folder), 1
    )
    assert len(shards(server.folder)) == 5
    assert max(held) < 5
    assert "modeling_deepseek.py" not in {path.name for path in (tmp_path / "dst").iterdir()}
    told = json.loads((tmp_path / "dst" / "conversion.json").read_text())
    assert told["from"]["repository"] == "owner/tiny"
    assert told["from"]["revision"] == SHA


def test_a_download_that_fails_is_resumed(server: Hub, tmp_path: Path) -> None:
    last = shards(server.folder)[-1]
    server.broken.add(last)
    options: dict[str, Any] = {"shard_bytes": 500_000, "discard_source": True}
    with pytest.raises((ValueError, OSError)):
        convert("owner/tiny", tmp_path / "dst", "hub_bf16", **options)
    assert not shards(tmp_path / "dst")
    server.broken.clear()
    summary = convert("owner/tiny", tmp_path / "dst", "hub_bf16", **options)
    assert summary.num_resumed > 0
    same(read(tmp_path / "dst"), expected(server))


def test_kept_in_the_cache(server: Hub, tmp_path: Path) -> None:
    for number in range(2):
        convert("owner/tiny", tmp_path / f"dst{number}", "transformers_fused")
    assert {name: server.downloads[name] for name in shards(server.folder)} == dict.fromkeys(
        shards(server.folder), 1
    )
    assert any((tmp_path / "cache").rglob("config.json"))


def test_errors(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"owner/other cannot be opened on the hub .*expected a checkpoint folder"
    ):
        convert("owner/other", tmp_path / "dst", "hub_bf16")
    with pytest.raises(ValueError, match="upstream is no id of a hub repository"):
        convert(server.folder, tmp_path / "dst", "hub_bf16", discard_source=True)
    with pytest.raises(ValueError, match="does not exist"):
        convert("no_such_folder", tmp_path / "dst", "hub_bf16")
