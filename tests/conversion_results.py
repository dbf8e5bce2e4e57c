"""What tests of converters look at: a written folder through safetensors' own reader, and `inspect`'s complaints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from transformers_k2.conversion import inspect

Tensor = torch.Tensor


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors, by safetensors' own reader."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def stray(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}


def problems(folder: Path) -> list[str]:
    return [problem.text for problem in inspect(folder).problems if problem.severity != "note"]
