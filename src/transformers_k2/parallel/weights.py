"""Where a model's first values come from, row by row, so that a rank draws or reads only what it holds.

`RandomWeights` draws each expert and each block of rows from a seed of its own: the values depend on the seed and the
name alone, never on how many ranks there are. `CheckpointWeights` reads a folder in the hub's layout.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..configuration_kimi_k2 import KimiK2Config
from ..lazy_tensors import OpenFiles
from ..lazy_weights import lazy_weights
from ..manifest import WRAPPER_PREFIX

_BLOCK = 1024  # rows of a matrix that share a seed: fewer seeds than rows, and little drawn in vain


class Weights(Protocol):
    """A source of values for parameters and buffers, by the model's names."""

    def rows(self, name: str, shape: Sequence[int], rows: Tensor) -> Tensor:
        """Entries `rows` (int64, ascending within runs) of dimension 0 of `name`, whose whole shape is `shape`."""
        ...


class RandomWeights:
    """transformers' initialisation of DeepSeek-V3: normal matrices, norms of one, a router bias of zero.

    Args:
        config: its `initializer_range` is the standard deviation, its `pad_token_id` the embedding row of zeros.
        seed: together with a tensor's name and row it decides every value.
    """

    def __init__(self, config: KimiK2Config, seed: int) -> None:
        self.std = config.initializer_range
        self.padding = config.pad_token_id
        self.seed = seed

    def rows(self, name: str, shape: Sequence[int], rows: Tensor) -> Tensor:
        """float32 [rows, *shape[1:]]."""
        if name.endswith("norm.weight"):
            return torch.ones(len(rows))
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(len(rows))
        size = 1 if len(shape) == 3 else _BLOCK
        values = torch.empty(len(rows), *shape[1:])
        numbers = rows // size
        for block in numbers.unique().tolist():
            chosen = numbers == block
            start = block * size
            drawn = torch.empty(min(size, shape[0] - start), *shape[1:])
            drawn.normal_(0.0, self.std, generator=self._generator(name, block))
            values[chosen] = drawn[rows[chosen] - start]
        if name.endswith("embed_tokens.weight") and self.padding is not None:
            values[rows == self.padding] = 0.0
        return values

    def _generator(self, name: str, block: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed} {name} {block}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class CheckpointWeights:
    """A folder in the hub's layout, in any of its codecs; FP8 and INT4 weights are multiplied out as they are read.

    Raises:
        ValueError: the folder is no such checkpoint, or a part of a weight is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = OpenFiles()
        weakref.finalize(self, files.close)
        # In float32 nothing is rounded yet, whatever the model's dtype.
        weights = lazy_weights(Checkpoint.open(self.folder).tensors, files, torch.float32)
        self.weights = {name.removeprefix(WRAPPER_PREFIX): weight for name, weight in weights.items()}

    def rows(self, name: str, shape: Sequence[int], rows: Tensor) -> Tensor:
        """[rows, *shape[1:]] in the file's dtype, float32 if that is FP8 or INT4.

        Raises:
            ValueError: no such tensor, or another shape than `shape`.
        """
        weight = self.weights.get(name)
        if weight is None:
            raise ValueError(f"{self.folder}: the tensor {name} is missing.")
        if weight.shape != tuple(shape):
            raise ValueError(f"{self.folder}: {name} has shape {weight.shape}, expected {tuple(shape)}.")
        runs = torch.where(rows[1:] != rows[:-1] + 1)[0] + 1
        pieces = [run for run in torch.tensor_split(rows, runs.tolist()) if len(run)]
        return torch.cat([weight[int(run[0]) : int(run[-1]) + 1,] for run in pieces])
