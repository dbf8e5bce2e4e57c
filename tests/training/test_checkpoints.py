"""Checkpoints hold what torch's own state dicts hold, are whole or not there, and only the newest stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transformers_k2.parallel import Layout
from transformers_k2.training.checkpoints import META, STATE, Checkpoints


class Small(nn.Module):
    """A frozen weight, a buffer, an odd shape, tied weights and a parameter that no gradient reaches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(7, 5, bias=False).requires_grad_(False)
        self.head = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.randn(2, 3, 4))
        self.short = nn.Parameter(torch.randn(5).bfloat16())
        self.register_buffer("bias", torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x) + self.bias + self.short)


def trained(seed: int, steps: int = 3) -> tuple[Small, torch.optim.Optimizer]:
    model = Small(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: Small, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()


def save(checkpoints: Checkpoints, step: int, model: nn.Module, optimizer: Any, **extra: Any) -> Path:
    return checkpoints.save(step, model, optimizer, '{"global_step": 1}\n', extra)


def test_a_restored_model_and_optimizer_go_on_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, Layout())
    model, optimizer = trained(0)
    path = save(checkpoints, 3, model, optimizer, guard={"losses": [1.5]})
    assert checkpoints.read_meta(path) | {"scalars": None} == {
        "step": 3,
        "scalars": None,
        "guard": {"losses": [1.5]},
    }
    other, other_optimizer = trained(1, 0)
    other.base.load_state_dict(model.base.state_dict())  # frozen: comes from where the base came from
    checkpoints.load_model(path, other)
    checkpoints.load_optimizer(path, other, other_optimizer)
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    found = other_optimizer.state_dict()["state"]
    assert found.keys() == expected.keys()
    for number, state in expected.items():
        assert state.keys() == found[number].keys()
        for key, value in state.items():
            assert torch.equal(found[number][key], value), key
            assert found[number][key].dtype == value.dtype
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_newest_stay_and_what_is_not_finished_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, Layout())
    assert checkpoints.latest() is None
    model, optimizer = trained(0)
    for step in (5, 10, 100):
        save(checkpoints, step, model, optimizer)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-00000010", "step-00000100"]
    (half := checkpoints.folder / ".step-00000200.partial").mkdir()
    (half / META).write_text("{}")
    (checkpoints.folder / "step-00000300").mkdir()  # emptied by hand
    (checkpoints.folder / "step-1").mkdir()
    assert checkpoints.latest() == checkpoints.path(100)
    assert (checkpoints.path(100) / STATE).is_file()
    save(checkpoints, 100, model, optimizer)  # again, as after a resume at 10
    assert checkpoints.latest() == checkpoints.path(100)


def test_a_model_that_does_not_fit_is_told(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, Layout())
    model, optimizer = trained(0)
    path = save(checkpoints, 1, model, optimizer)
    other, _ = trained(0, 0)
    other.head = nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"model.head.weight is \(3, 5\), expected shape \(4, 5\)"):
        checkpoints.load_model(path, other)
    other, _ = trained(0, 0)
    other.register_parameter("new", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"model.new is missing"):
        checkpoints.load_model(path, other)
    shards = path / "rank-00000.safetensors"
    shards.write_bytes(shards.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rank-00000.safetensors is damaged .* step-00000001"):
        checkpoints.load_model(path, model)
