"""A model laid out over ranks: built without storage, cut by transformers' own plans, then filled share by share.

FSDP2 and expert parallelism are transformers' (`DistributedConfig`); pipeline stages keep the names of the whole model
and pass hidden states through the layers of others. Only a rank's own rows are ever drawn or read, so the model may be
larger than any machine. What it gives up: quantised checkpoints, which have to be converted to bfloat16 first.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from ..configuration_kimi_k2 import KimiK2Config
from .layout import Layout, stage_layers
from .weights import Weights


class Elsewhere(nn.Module):
    """Stands where another pipeline stage has a module: hands its first input on."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The input, unchanged."""
        # FSDP2 warns of outputs that are views, and a missing head is given one.
        return hidden_states.clone() if hidden_states._is_view() else hidden_states


def build_model(
    config: KimiK2Config,
    layout: Layout,
    weights: Weights,
    dtype: torch.dtype = torch.float32,
    mixed_precision: bool = False,
) -> PreTrainedModel:
    """This rank's share of a model, with its weights.

    Collective over all ranks if the layout splits the model; torch.distributed must be initialised then.

    Args:
        weights: where values come from (see weights.py); the same on every rank.
        dtype: of the weights; the router's bias is always float32.
        mixed_precision: FSDP2 gathers weights as bfloat16 and reduces gradients as float32.

    Raises:
        ValueError: the layout does not fit the configuration or the number of ranks.
    """
    layout.check(config, dist.get_world_size() if dist.is_initialized() else 1)
    model = lay_out(config, layout, dtype, mixed_precision)
    materialise(model, weights)
    return model


def materialise(model: Any, weights: Weights) -> torch.device:
    """Give a model on the meta device storage and values; the device, this process's GPU or the CPU."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    model.to_empty(device=device)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its tables are no weights
    fill(model, weights)
    return device


def lay_out(
    config: KimiK2Config, layout: Layout, dtype: torch.dtype = torch.float32, mixed_precision: bool = False
) -> PreTrainedModel:
    """The model on the meta device, as this rank will hold it: its stage's layers, its shards as DTensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as from_pretrained; from_config casts it
    if not layout.splits_the_model:
        return model
    if layout.pipeline > 1:
        _keep_stage(model, layout)
    plan = DistributedConfig(
        dp_replicate_size=layout.replicate,
        fsdp_size=layout.shard,
        ep_size=layout.expert,
        fsdp_mixed_precision=mixed_precision,
    )
    model = type(model).maybe_distribute_model(model, plan, meshes(layout))
    if layout.data_size > 1:
        demand_sharded(model)
    model._is_distributed_loading_by_transformers = True  # Trainer: no wrapper around it
    return model


def meshes(layout: Layout) -> TransformersDeviceMesh:
    """The dense and the expert view of all ranks, under the names that transformers' plans ask for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outer = (layout.pipeline, layout.replicate)
    dense = init_device_mesh(
        device, (*outer, layout.shard, 1), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp")
    )
    expert = init_device_mesh(
        device,
        (*outer, layout.shard // layout.expert, layout.expert),
        mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"),
    )
    return TransformersDeviceMesh(dense, expert)


def demand_sharded(model: nn.Module) -> None:
    """Fail loudly where sharding was asked for and nothing is sharded (Accelerate on a CPU falls back to DDP silently).

    Raises:
        RuntimeError: a parameter is a plain tensor.
    """
    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        raise RuntimeError(
            f"Sharding was asked for, but {len(plain)} parameters are whole on every rank, {plain[0]} among them: "
            "expected DTensors."
        )


def fill(model: nn.Module, weights: Weights) -> None:
    """Give every parameter and persistent buffer its values, this rank's rows only."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
            if local.numel():
                values = weights.rows(name, tensor.shape, local_rows(tensor))
                local.copy_(values.reshape(local.shape))


def local_rows(tensor: Tensor) -> Tensor:
    """Which rows (entries of dimension 0) this rank holds, in its order: int64 [local rows]; none of a scalar."""
    rows = torch.arange(tensor.shape[0] if tensor.ndim else 0)
    if not isinstance(tensor, DTensor):
        return rows
    assert all(not placement.is_shard() or placement.dim == 0 for placement in tensor.placements)
    mesh = tensor.device_mesh
    return (
        distribute_tensor(rows.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None)
        .to_local()
        .cpu()
    )


def _keep_stage(model: PreTrainedModel, layout: Layout) -> None:
    """Replace what other stages hold; names stay those of the whole model."""
    stage = layout.stage(dist.get_rank())
    decoder = model.model
    own = stage_layers(len(decoder.layers), layout.pipeline, stage)
    for number in range(len(decoder.layers)):
        if number not in own:
            decoder.layers[number] = Elsewhere()
    if stage != 0:
        decoder.embed_tokens = Elsewhere()
    if stage != layout.pipeline - 1:
        decoder.norm = Elsewhere()
        model.lm_head = Elsewhere()
