"""Training over pipeline stages: torch's schedules around stage models that still are whole models by name.

A stage's model runs its usual forward: the first stage from token ids, the others from the hidden states they receive,
the last one to the loss, so that whatever the model's own forward does (masks of packed rows, a loss in chunks) is done
here too. FSDP2 adds up gradients over micro-batches and reduces them once, at the end of a run of the schedule. What it
gives up: stages of several runs of layers (interleaving), and memory: for a run live the unreduced gradients of a stage's
gathered weights, and torch's receive buffers, which are hidden states and their gradients of all its rows at once. So a
large step is cut into several runs; each has a bubble and a reduction of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.utils import TransformersDeviceMesh

from .layout import Layout

SCHEDULES = ("1f1b", "gpipe")
_REQUIRED = ("input_ids", "labels")
_OPTIONAL = ("position_ids", "attention_mask")


class Pipeline:
    """Runs the stage model of this rank as part of its pipeline column: the ranks that see the same rows.

    Every method is collective over all ranks, which give batches of the same shapes. All ranks of a column give the
    same batch: a dict of `input_ids` and `labels`, int64 [rows, length] (labels as transformers': not shifted, -100
    for none), and optionally `position_ids` and `attention_mask`, whose first dimension is rows.

    Args:
        model: this rank's share, from `build_model` with this layout.
        layout: pipeline > 1.
        schedule: "1f1b" keeps activations of at most as many micro-batches as there are stages; "gpipe" of all of them.
        micro_batches_per_run: how many go through the pipeline together, at most; None: all of a step.

    Attributes:
        data_group: the ranks of this stage, which hold the same layers and see different rows: what MuonClip and
            RouterBalance take as process_group.

    Raises:
        ValueError: an unknown schedule, a layout without pipeline stages, or a number below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        schedule: str = "1f1b",
        micro_batches_per_run: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}: expected one of {', '.join(SCHEDULES)}.")
        if layout.pipeline == 1:
            raise ValueError("parallel.pipeline is 1: expected at least 2 stages to run as a pipeline.")
        if micro_batches_per_run is not None and (
            type(micro_batches_per_run) is not int or micro_batches_per_run < 1
        ):
            raise ValueError(
                f"micro_batches_per_run is {micro_batches_per_run!r}: expected an integer >= 1, or None for all of a step."
            )
        self.model = model
        self.layout = layout
        self.micro_batches_per_run = micro_batches_per_run
        self.schedule = schedule
        self.stage = layout.stage(dist.get_rank())
        self.device = next(model.parameters()).device
        ranks: TransformersDeviceMesh | None = model._mesh_manager
        assert ranks is not None
        self._column: ProcessGroup = ranks.get_mesh("pp").get_group()
        self.data_group: ProcessGroup = ranks.get_mesh(("dp_replicate", "fsdp"))._flatten("data").get_group()
        mixed = isinstance(model, FSDPModule) and model.config.distributed_config.fsdp_mixed_precision
        self._dtype = torch.bfloat16 if mixed else model.dtype  # of hidden states on their way

    @property
    def is_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage == self.layout.pipeline - 1

    def step(
        self, batch: Mapping[str, Tensor], micro_batch_size: int, num_items: int | float | Tensor
    ) -> Tensor:
        """Forward and backward passes over this column's rows. Gradients are added to those that are there.

        They are one process's over the whole global batch, if every column gives its share of it.

        Args:
            batch: see the class. The rows need not be a multiple of the micro-batch: the rest makes a pipeline of its own
                after the first, with a bubble and a gradient reduction of its own.
            micro_batch_size: rows that pass through a stage together.
            num_items: predicted labels of the global batch, over all columns (and accumulated calls).

        Returns:
            The sum of this column's losses over `num_items`, float32 [], on all of its ranks.

        Raises:
            ValueError: a batch or a micro-batch size that does not fit.
        """
        # FSDP divides sums over ranks by their number, as it would for means: undone here as in transformers' Trainer.
        data_size = self.layout.data_size
        scale = data_size / torch.as_tensor(num_items, device=self.device)
        return self._run(batch, micro_batch_size, scale.float()).float() / data_size

    def evaluate(self, batch: Mapping[str, Tensor], micro_batch_size: int) -> tuple[Tensor, Tensor]:
        """Forward passes only, in evaluation mode, so that no statistic of training counts them.

        Returns:
            The sum of this column's losses, float64 [], and the number of its predicted labels, int64 [].

        Raises:
            ValueError: as `step`.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            total = self._run(batch, micro_batch_size, None)
        finally:
            self.model.train(was_training)
        return total, (batch["labels"][:, 1:] != -100).sum().to(self.device)

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """As the function `clip_grad_norm`, over all stages."""
        return clip_grad_norm(self.model, self.layout, max_norm)

    def gather(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the ranks of this column know, in the order of the stages, under names of the whole model; collective."""
        parts: list[dict[str, Any]] = [{} for _ in range(self.layout.pipeline)]
        dist.all_gather_object(parts, values, group=self._column)
        return {name: value for part in parts for name, value in part.items()}

    def _run(self, batch: Mapping[str, Tensor], micro_batch_size: int, scale: Tensor | None) -> Tensor:
        """Sum of the micro-batches' losses (scaled for a backward pass; None: no backward), float64 [], on all ranks."""
        _check(batch, micro_batch_size)
        batch = {name: rows.to(self.device) for name, rows in batch.items()}
        num_rows = len(batch["input_ids"])
        even = num_rows - num_rows % micro_batch_size
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        rows_per_run = micro_batch_size * (self.micro_batches_per_run or num_rows)
        for start, end in pairwise([*range(0, even, rows_per_run), even, num_rows]):
            if start < end:
                part = {name: rows[start:end] for name, rows in batch.items()}
                total += self._run_even(part, min(micro_batch_size, end - start), scale)
        dist.broadcast(total, group=self._column, group_src=self.layout.pipeline - 1)
        return total

    def _run_even(self, batch: dict[str, Tensor], size: int, scale: Tensor | None) -> Tensor:
        """As `_run`, but rows are a multiple of `size`, and the sum is on the last stage only; zero elsewhere."""
        input_ids, labels = batch.pop("input_ids"), batch.pop("labels")
        num_micro_batches = len(input_ids) // size
        stage = _Stage(self, (size, input_ids.shape[1]))
        # With fewer micro-batches than stages 1F1B is GPipe (and torch's refuses); without a backward pass too.
        few = num_micro_batches < self.layout.pipeline or scale is None
        kind = ScheduleGPipe if few or self.schedule == "gpipe" else Schedule1F1B
        schedule = kind(
            stage,
            num_micro_batches,
            loss_fn=lambda nll, _: nll if scale is None else nll * scale,
            scale_grads=False,
        )
        inputs: dict[str, Any] = batch | ({"labels": labels} if self.is_last else {})
        losses: list[Tensor] = []
        run = schedule.eval if scale is None else schedule.step
        with torch.no_grad() if scale is None else nullcontext():
            run(
                *((input_ids,) if self.stage == 0 else ()),
                target=labels if self.is_last else None,
                losses=losses,
                return_outputs=False,
                **inputs,
            )
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        return sum((loss.detach().double() for loss in losses), start=nothing)


class _Stage(PipelineStage):
    """A stage whose tensors have known shapes, and whose model is called by keyword.

    Left to find the shapes out, torch runs the model on uninitialised memory, which MuonClip and RouterBalance would see.
    """

    def __init__(self, pipeline: Pipeline, shape: tuple[int, int]) -> None:
        hidden = (*shape, pipeline.model.config.hidden_size)
        states = torch.empty(hidden, dtype=pipeline._dtype, device="meta", requires_grad=True)
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            pipeline.model,
            pipeline.stage,
            pipeline.layout.pipeline,
            pipeline.device,
            input_args=tokens if pipeline.stage == 0 else states,
            output_args=loss if pipeline.is_last else states,
            group=pipeline._column,
        )
        self.dtype = pipeline._dtype

    def _post_metadata_inference_cleanup(self) -> None:
        # torch's drops the gradients of FSDP2's parameters, as leftovers of a trial run. There was none; these are ours.
        pass

    def forward_maybe_with_nosync(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """One micro-batch: ids [rows, length] or hidden states [rows, length, hidden] -> hidden states or a loss []."""
        inputs = {"input_ids" if self.is_first else "inputs_embeds": args[0]}
        if self.is_last:
            # Divided later, outside: FSDP2 rounds tensors that it is given as arguments to its parameters' dtype.
            return self.submod(**inputs, **kwargs, num_items_in_batch=1, use_cache=False).loss
        # No head here: what takes the place of logits are the hidden states.
        return self.submod(**inputs, **kwargs, use_cache=False).logits.to(self.dtype)


def clip_grad_norm(model: nn.Module, layout: Layout, max_norm: float | None) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most `max_norm`; None only measures it.

    For any layout, experts on a mesh of their own among them: every element counts once, however many ranks hold it.
    Collective over all ranks.

    Returns:
        The norm before, float32 [], the same on every rank.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for grad in grads:
        copies = layout.data_size // _num_shards(grad)
        total += torch.linalg.vector_norm(_local(grad), dtype=torch.float32).double().square() / copies
    if dist.is_initialized():
        dist.all_reduce(total)
    norm = total.sqrt().float()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_'s
        for grad in grads:
            _local(grad).mul_(factor)
    return norm


def _num_shards(tensor: Tensor) -> int:
    """Into how many pieces a tensor is cut."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    count = 1
    for dimension, placement in enumerate(tensor.placements):
        assert not placement.is_partial()
        count *= 1 if placement.is_replicate() else mesh.size(dimension)
    return count


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check(batch: Mapping[str, Tensor], micro_batch_size: int) -> None:
    if type(micro_batch_size) is not int or micro_batch_size < 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size!r}: expected an integer >= 1.")
    missing, unknown = set(_REQUIRED) - batch.keys(), batch.keys() - {*_REQUIRED, *_OPTIONAL}
    if missing or unknown:
        raise ValueError(
            f"A batch has {sorted(batch)}: expected {' and '.join(_REQUIRED)}, and optionally {' and '.join(_OPTIONAL)}."
        )
    rows = batch["input_ids"].shape[0]
    for name, values in batch.items():
        if values.shape[0] != rows or rows == 0:
            raise ValueError(
                f"{name} has {values.shape[0]} rows and input_ids {rows}: expected as many, and some."
            )
