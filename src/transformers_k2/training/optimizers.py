"""The optimizers a recipe can name, each a dataclass of its options: one table, nothing registers itself.

A row's `cls_and_kwargs()` is what `transformers.Trainer(optimizer_cls_and_kwargs=...)` takes, so a recipe's optimizer
also serves a Trainer that someone builds by hand. An optimizer that groups parameters by their role in the model is a
function of the model; Trainer calls such factories as `factory()(model, **kwargs)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ..optim import muon_clip
from .schema import Rule, above, at_least

Rate = Annotated[float, above(0)]
# Of an average that keeps this share of itself: 1 would never move.
Share = Annotated[float, Rule("from 0 to 1, 1 excluded", lambda value: 0 <= value < 1)]


class OptimizerOptions(Protocol):
    """What every row of the table offers."""

    @property
    def lr(self) -> float:
        """The peak learning rate; the recipe's schedule scales it."""
        ...

    def cls_and_kwargs(self, process_group: ProcessGroup | None = None) -> tuple[Any, dict[str, Any]]:
        """The pair that Trainer's `optimizer_cls_and_kwargs` takes.

        Args:
            process_group: ranks with the same parameters, which may share the work of a step.
        """
        ...


@dataclass(frozen=True)
class AdamW:
    """torch's AdamW with one group: weight decay applies to every parameter, RMSNorm gains and embeddings included.

    Trainer by default spares norms and biases. K2's predecessor found that decay on the norm gains matters at scale
    (Moonlight, arXiv 2502.16982), and one rule for all parameters leaves nothing to get wrong.
    """

    name: Literal["adamw"]
    lr: Rate
    betas: tuple[Share, Share]
    weight_decay: Annotated[float, at_least(0)]
    eps: Annotated[float, above(0)]

    def cls_and_kwargs(self, process_group: ProcessGroup | None = None) -> tuple[Any, dict[str, Any]]:
        """A factory of `torch.optim.AdamW` over all trainable parameters, and its options."""
        options = asdict(self)
        del options["name"]
        return lambda: adamw, options


@dataclass(frozen=True)
class MuonClip:
    """The options of `transformers_k2.MuonClip` that runs differ in; its docstring explains them.

    Left out: what the device decides (the dtype and form of Newton-Schulz).
    """

    name: Literal["muonclip"]
    lr: Rate
    momentum: Share
    nesterov: bool
    weight_decay: Annotated[float, at_least(0)]
    qk_clip_tau: Annotated[float, above(0)] | None
    ns_steps: Annotated[int, at_least(1)]
    ns_schedule: Literal["muon", "polar_express", "cans"]
    per_head: bool
    update_rms: Annotated[float, above(0)]
    betas: tuple[Share, Share]
    eps: Annotated[float, above(0)]
    state_dtype: Literal["float32", "bfloat16"]
    master_weights: bool

    def cls_and_kwargs(self, process_group: ProcessGroup | None = None) -> tuple[Any, dict[str, Any]]:
        """A factory of `MuonClip` for a whole model, and its options."""
        options = asdict(self)
        del options["name"]
        return muon_clip(**options, process_group=process_group)


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """AdamW over every trainable parameter; fused, because a call per tensor costs more than its arithmetic."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **options)


# A recipe's `optimizer.name` -> its options. A new optimizer is one dataclass and one row.
OPTIMIZERS: Mapping[str, type] = {"adamw": AdamW, "muonclip": MuonClip}
