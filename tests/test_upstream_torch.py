"""What the optimizer relies on in torch and transformers' Trainer: one assert a fact. A change here is news."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.attention import SDPBackend
from transformers import PreTrainedConfig
from transformers.trainer_optimizer import is_optimizer_factory

from transformers_k2 import KimiK2Config, muon_clip


def test_torch_rounds_loaded_state_to_the_parameters_dtype() -> None:
    """Why MuonClip loads state itself."""
    weight = nn.Parameter(torch.zeros(2, 2).bfloat16())
    optimizer = torch.optim.AdamW([weight])
    state = {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 2), 1 / 3), "exp_avg_sq": torch.ones(2, 2)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16


def test_torch_muon_takes_no_stacks() -> None:
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([nn.Parameter(torch.zeros(2, 3, 4))])


def test_attention_with_narrower_values_is_not_fused_on_a_cpu() -> None:
    """Why observe.py pads values."""
    query, key, value = (torch.zeros(1, 2, 8, dim) for dim in (24, 24, 16))
    assert torch._fused_sdp_choice(query, key, value) == SDPBackend.MATH.value
    assert torch._fused_sdp_choice(query, key, key) == SDPBackend.FLASH_ATTENTION.value


def test_placements_split_tensors_by_their_own_rule() -> None:
    """What distributed.py asks for every rank's rows."""
    rows = torch.arange(10)
    for placement, expected in (
        (Shard(0), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
        (_StridedShard(0, split_factor=2), [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], []]),
    ):
        pieces, _ = placement._split_tensor(rows, 4, with_padding=False, contiguous=True)
        assert [piece.tolist() for piece in pieces] == expected


def test_trainer_calls_factories_with_the_model() -> None:
    maker, options = muon_clip(lr=1e-3)
    assert is_optimizer_factory(maker)
    assert options == {"lr": 1e-3}


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_trainer_cannot_read_the_hubs_yarn_when_it_resumes(tmp_path: Path) -> None:
    """README's limits say so; when this fails, Trainer has learned it."""
    KimiK2Config().save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="max_position_embeddings"):
        PreTrainedConfig.from_json_file(tmp_path / "config.json")


def test_the_fused_cpu_kernel_says_zero_for_the_log_sum_exp_of_a_row_that_sees_nothing() -> None:
    """mla.py sets it to -inf, before blocks are combined."""
    q, mask = torch.randn(1, 1, 2, 8), torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, q, q, 0.0, False, attn_mask=mask[None, None]
    )
    assert lse[0, 0, 1] == 0
    assert torch.equal(output[0, 0, 1], torch.zeros(8))
