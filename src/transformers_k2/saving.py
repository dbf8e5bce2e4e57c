"""`save_pretrained` for the Kimi K2 classes: the hub's layout, and never a half-written folder.

transformers writes into the folder directly, config first: a crash leaves a new config beside old shards. Here it writes
into a hidden folder next to them, and the finished files are then moved over the old ones, the index last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import sync, write_text
from .quantization.packed_experts import hub_form

_STAGING = ".saving"
_INDEX_NAME, _SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


def save_pretrained(
    model: Any,
    upstream: Callable[..., None],
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    *args: Any,
    keep_auto_map: bool = False,
    **kwargs: Any,
) -> None:
    """Save `model` through `upstream`, transformers' own save_pretrained. See KimiK2PreTrainedModel.save_pretrained.

    Adapters, distributed training checkpoints and pushes to the hub are written by transformers in place.

    Raises:
        ValueError: `save_directory` is a file, or each rank has only its pipeline stage of the model.
    """
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"save_pretrained needs a folder, but {target} is a file.")
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is not None and distributed.pp_size > 1:  # upstream would write the first stage alone
        raise ValueError(
            f"A model split into {distributed.pp_size} pipeline stages cannot be saved, because each rank has only its own "
            "layers: load it with pp_size=1."
        )
    adapter = getattr(model, "_hf_peft_config_loaded", False)
    in_place = adapter or kwargs.get("push_to_hub") or kwargs.get("distributed_checkpoint")
    with _only_true_quantization(model), hub_form(model):
        if in_place:
            upstream(save_directory, is_main_process, *args, **kwargs)
            return
        staging = target / _STAGING
        writes = model.should_save_on_this_rank(is_main_process)
        if writes:
            shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        upstream(staging, is_main_process, *args, **kwargs)
        if writes:
            if keep_auto_map:
                write_text(staging / "config.json", model.config.to_json_string(keep_auto_map=True))
            _publish(staging, target)
        # Other ranks must not read the folder before the files are in place.
        model.barrier_after_gathered_checkpoint_save(distributed)


@contextmanager
def _only_true_quantization(model: Any) -> Iterator[None]:
    """Hide a quantization_config that does not describe the weights in memory (a model built from a hub config)."""
    stored = getattr(model.config, "quantization_config", None)
    if stored is None or getattr(model, "hf_quantizer", None) is not None:
        yield
        return
    del model.config.quantization_config
    try:
        yield
    finally:
        model.config.quantization_config = stored


def _publish(staging: Path, target: Path) -> None:
    """Move the finished files over the old ones; then remove the old save's weight files that were not replaced."""
    old_index = target / _INDEX_NAME
    old = {_SINGLE_NAME, _INDEX_NAME}
    if old_index.is_file():
        old |= {
            Path(name).name
            for name in json.loads(old_index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    files = sorted(path for path in staging.iterdir() if path.is_file())
    for path in files:
        # safetensors makes its files readable by their owner only
        shutil.copymode(staging / "config.json", path)
        sync(path)
    new = {path.name for path in files}
    # Weights first, then the files that describe them; what points at the shards comes last.
    for path in sorted(files, key=lambda path: (path.suffix == ".json", path.name == _INDEX_NAME)):
        os.replace(path, target / path.name)
    for name in sorted(old - new):
        (target / name).unlink(missing_ok=True)
    staging.rmdir()
    sync(target)
