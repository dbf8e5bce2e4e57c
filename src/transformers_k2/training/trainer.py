"""transformers' Trainer with what a recipe needs: exact resuming in any layout, exact evaluation, pipeline stages.

Trainer steps, wraps, logs and calls callbacks; this subclass decides which rows a process reads, saves and loads without
pickles (Trainer refuses models that were sharded when they were built), evaluates the same number on any number of
processes, and hands a step to the pipeline where there is one. What it gives up: Trainer's own data loading, checkpoint
folders and metrics (`compute_metrics`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer

from ..moe import RouterBalance
from ..parallel import Layout, demand_sharded
from ..parallel.pipeline import Pipeline, clip_grad_norm
from .checkpoints import Checkpoints
from .errors import NonFiniteLossError
from .rows import IGNORED
from .spikes import SpikeGuard
from .steps import Batch, StepPlan


class RecipeTrainer(Trainer):
    """Trainer for rows that are a function of the step.

    Args:
        layout: how the processes share the model.
        plan: which rows this process reads.
        held_out: the batches of the held-out rows, this process's share.
        checkpoints: where to save and look; None: neither.
        pipeline: for layouts with stages.
        balance: gets each sequence's weight in the balance loss, and padding tokens to leave out.
        spike_guard: skips steps whose loss jumps.
        phase_begins: called with the number of each phase before its first step.
        kwargs: Trainer's. `max_grad_norm` and `gradient_accumulation_steps` of its arguments count.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        plan: StepPlan,
        held_out: list[Batch],
        checkpoints: Checkpoints | None = None,
        pipeline: Pipeline | None = None,
        balance: RouterBalance | None = None,
        spike_guard: SpikeGuard | None = None,
        phase_begins: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layout, self.plan, self.held_out = layout, plan, held_out
        self.checkpoints, self.pipeline, self.balance = checkpoints, pipeline, balance
        self.spike_guard, self.phase_begins = spike_guard, phase_begins
        self._phase = -1
        self._resumed_from: Path | None = None
        if pipeline is not None and balance is not None:
            # Its micro-batches pass through the model one at a time.
            pipeline.model.register_forward_pre_hook(self._leave_padding_out, with_kwargs=True)
        self._micro_batch = 0
        self._step_loss = torch.zeros((), device=self.args.device)

    # -- data

    def get_train_dataloader(self) -> DataLoader:
        """The rows from the resumed step on."""
        first = 0
        if self._resumed_from is not None:
            assert self.checkpoints is not None
            first = self.checkpoints.read_meta(self._resumed_from)["step"]
        return self.plan.loader(
            first, whole_steps=self.pipeline is not None, num_workers=self.args.dataloader_num_workers
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Predicted tokens of the step, over all processes that read different rows."""
        count = sum(
            (_num_predicted(batch["labels"]) for batch in batch_samples), torch.zeros((), dtype=torch.long)
        )
        count = count.to(device)
        if self.layout.data_size > 1:
            dist.all_reduce(count)
            count = count // self.layout.pipeline  # every stage counted the same rows
        return count

    # -- steps

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        model: Any = self.model
        if self.layout.shard > 1 and not any(isinstance(item, DTensor) for item in model.parameters()):
            demand_sharded(model)
        return prepared

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, or of the whole step through the pipeline."""
        step = self.state.global_step
        self._begin_micro_batch(step)
        rows_of_step = self.plan.phases[self._phase].rows_per_step
        if self.balance is not None:
            self.balance.sequence_weight = self.layout.data_size / rows_of_step
        if self.pipeline is None:
            mask = inputs.get("attention_mask")
            if self.balance is None or mask is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                with self.balance.tokens(mask.bool().to(self.args.device)):
                    loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            inputs = self._prepare_inputs(inputs)
            micro = self.plan.phases[self._phase].rows_per_micro_batch
            with self.accelerator.autocast():
                loss = self.pipeline.step(inputs, micro, num_items_in_batch)
            loss = loss * self.layout.data_size  # logs take the mean over processes
        self._step_loss += loss.detach()
        return loss

    def _leave_padding_out(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert self.balance is not None
        mask = kwargs.get("attention_mask")
        self.balance.token_mask = None if mask is None else mask.bool()

    def _begin_micro_batch(self, step: int) -> None:
        phase, _ = self.plan.phase_of(step)
        per_step = 1 if self.pipeline is not None else self.plan.accumulation
        if self._micro_batch % per_step == 0:
            self._micro_batch = 0
            self._step_loss.zero_()
            if phase != self._phase and self.phase_begins is not None:
                self.phase_begins(phase)
            self._phase = phase
        # Seeded by position: a resumed run draws what an uninterrupted one does, on any number of processes.
        key = f"{self.args.seed} {step} {self._micro_batch} {self.plan.data_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1)
        self._micro_batch += 1

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._norm(model, None) if grad_norm is None else grad_norm

    def _norm(self, model: nn.Module, limit: float | None) -> Tensor:
        norm: Any
        trained: Any = self.model
        if self.layout.splits_the_model:
            norm = clip_grad_norm(trained, self.layout, limit)
        elif limit is None:
            norm = super()._get_grad_norm(model)
        else:
            norm = super()._clip_grad_norm(model)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(value):
            raise NonFiniteLossError(self._report_non_finite(value))
        if self.spike_guard is not None and self.spike_guard.spikes(self.state.global_step, self.mean_loss()):
            for parameter in model.parameters():
                parameter.grad = None
        return torch.tensor(value)

    def mean_loss(self) -> float:
        """The loss of the step so far, the same on every process; collective."""
        loss = self._step_loss.clone()
        if self.layout.world_size > 1:
            dist.all_reduce(loss)
            loss /= self.layout.world_size
        return loss.item()

    def _report_non_finite(self, norm: float) -> str:
        model: Any = self.model
        gradients = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        local = [
            (name, g.to_local() if isinstance(g, DTensor) else g) for name, g in gradients if g is not None
        ]
        bad = [name for name, gradient in local if not bool(torch.isfinite(gradient).all())]
        where = (
            f"{len(bad)} gradients here are not finite, {bad[0]} first"
            if bad
            else "gradients overflow their sum"
        )
        return (
            f"Training stopped at step {self.state.global_step + 1}: the gradient norm is {norm}, the loss "
            f"{self._step_loss.item():.4g}; {where}. No weight was changed by this step."
        )

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        # Trainer takes plain parameters for copies on all ranks; in a pipeline each stage has its own.
        if self.pipeline is None:
            super()._sync_replicated_trainable_parameters(model)

    # -- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss over all held-out tokens, to rounding the same on any number of processes."""
        metrics = {"eval_loss": self.held_out_loss(self.held_out)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_loss(self, batches: list[Batch]) -> float:
        """The mean loss over the tokens of all processes' batches; collective, with as many batches on each."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                if self.pipeline is not None:
                    loss, count = self.pipeline.evaluate(inputs, len(inputs["input_ids"]))
                else:
                    count = _num_predicted(inputs["labels"])
                    loss = model(**inputs, use_cache=False, num_items_in_batch=torch.ones_like(count)).loss
            total += torch.tensor([float(loss), float(count)], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if self.layout.world_size > 1:
            total = total.to(self.args.device)
            dist.all_reduce(total)
        return float(total[0] / total[1])

    # -- checkpoints

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As Trainer's; `resume_from_checkpoint` is a folder of `Checkpoints`, or True for the newest one, if any."""
        if resume_from_checkpoint is True:
            assert self.checkpoints is not None
            resume_from_checkpoint = self.checkpoints.latest()
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(
            resume_from_checkpoint=str(self._resumed_from) if self._resumed_from else None, **kwargs
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.checkpoints is not None
        optimizer: Any = self.optimizer
        extra = {"spike_guard": self.spike_guard.state() if self.spike_guard else None}
        state = json.dumps(_trainer_state(self), indent=2) + "\n"
        self.checkpoints.save(
            self.state.global_step, self.accelerator.unwrap_model(model), optimizer.optimizer, state, extra
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.checkpoints is not None
        self.checkpoints.load_model(
            Path(resume_from_checkpoint), self.accelerator.unwrap_model(model or self.model)
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.checkpoints is not None
        optimizer: Any = self.optimizer
        path = Path(checkpoint)
        self.checkpoints.load_optimizer(path, self.accelerator.unwrap_model(self.model), optimizer.optimizer)
        meta = self.checkpoints.read_meta(path)
        if self.spike_guard is not None and meta["spike_guard"] is not None:
            self.spike_guard.restore(meta["spike_guard"])
        scheduler: Any = self.lr_scheduler
        scheduler.last_epoch = meta["step"]
        scheduler._step_count = meta["step"] + 1
        rates = [
            base * rate(meta["step"])
            for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: every micro-batch has a seed of its own."""


def _num_predicted(labels: Tensor) -> Tensor:
    """How many tokens are predicted: the first of a row never is."""
    return (labels[:, 1:] != IGNORED).sum()


def _trainer_state(trainer: Trainer) -> dict[str, Any]:
    """What TrainerState.load_from_json reads; the history of logs is in metrics.jsonl."""
    state = {
        key: value for key, value in vars(trainer.state).items() if isinstance(value, (int, float, str, bool))
    }
    return {**state, "log_history": []}
