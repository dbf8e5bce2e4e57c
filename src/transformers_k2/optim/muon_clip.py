"""MuonClip: Muon with Moonlight's RMS matching, AdamW for what is no hidden matrix, and QK-Clip (arXiv 2507.20534, Alg. 1).

`MuonClip.for_model(model, lr)` finds the parameters' roles and the attention heads by name; `MuonClip(groups, lr)` takes
groups made by hand. State is created in the first step, from the parameters as they are then, because FSDP2 and
Accelerate's `prepare` replace parameters after the optimizer is made. The update is muon.py's, the clip qk_clip.py's,
ranks distributed.py's; this file holds them together as a torch optimizer.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .distributed import Shared, is_whole, layout_of, local, mesh_group, step_shared
from .groups import DEFAULT_RULES, Rule, parameter_groups
from .muon import Group, Task, step_adamw, step_local
from .observe import LogitObserver
from .options import check_options, check_parameter, is_number
from .qk_clip import Attention, HeadRows, clip_factors, find_attention, row_factors, scale_rows


class MuonClip(torch.optim.Optimizer):
    """The optimizer of Kimi K2.

    The defaults of this constructor are the published algorithm: five Newton-Schulz steps in bfloat16, for float32
    matrices equal to torch.optim.Muon (adjust_lr_fn="match_rms_adamw") bit by bit. `for_model` chooses the arithmetic
    by device instead.

    Args:
        params: parameters, or groups. A group's "algorithm" is "muon" (default; [rows, in], or [experts, rows, in] as one
            matrix per expert) or "adamw"; "row_blocks" cuts rows into matrices, a repeated pattern of sizes: a fused
            gate_up_proj [E, 2I, H] has (I,). Every option below can differ between groups.
        lr: learning rate; the same for both algorithms, as in the report.
        momentum: mu of Muon.
        nesterov: look ahead by one momentum step. K2: no; Moonlight's code: yes.
        weight_decay: decoupled, for both algorithms, RMSNorm gains included.
        qk_clip_tau: a head's logits above it are scaled back to it after the step; None: no clipping, no tracking.
        ns_steps, ns_schedule, ns_dtype, ns_iteration, ns_eps: see `newton_schulz`. "auto" chooses bfloat16 where the device
            multiplies it, else float32; and Gram iterations where they are cheaper and no less exact.
        update_rms: RMS of a full-rank update, per unit of lr.
        betas, eps: AdamW's.
        state_dtype: of momenta, "float32" or "bfloat16". AdamW's second moment is always float32.
        master_weights: keep float32 copies of parameters in lower precision, update those and round.
        attention: the heads to clip, from `find_attention(model)`.
        process_group: ranks that hold the same parameters and see other data (DDP). They share out the matrices between
            them, and take the largest logits of all. Default: no sharing of plain tensors; logits over DTensors' meshes,
            or over all ranks. With pipeline stages, give the stage's group.

    Raises:
        ValueError: an option or a parameter that does not fit, named with what was expected.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.1,
        qk_clip_tau: float | None = 100.0,
        ns_steps: int = 5,
        *,
        ns_schedule: str = "muon",
        ns_dtype: str = "bfloat16",
        ns_iteration: str = "standard",
        ns_eps: float = 1e-7,
        update_rms: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        state_dtype: str = "float32",
        master_weights: bool = False,
        attention: Mapping[str, Attention] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "algorithm": "muon",
            "row_blocks": None,
            "rule": "",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_schedule": ns_schedule,
            "ns_dtype": ns_dtype,
            "ns_iteration": ns_iteration,
            "ns_eps": ns_eps,
            "update_rms": update_rms,
            "betas": tuple(betas),
            "eps": eps,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
        }
        if qk_clip_tau is not None and not (is_number(qk_clip_tau) and 0 < qk_clip_tau < math.inf):
            raise ValueError(
                f"qk_clip_tau is {qk_clip_tau!r}: expected a number > 0, or None for no clipping."
            )
        check_options(defaults)
        super().__init__(params, defaults)
        self.qk_clip_tau = qk_clip_tau
        self.process_group = process_group
        self.track_update_rms = False
        self.communicated_bytes = 0  # sent by this rank to others for the last step's matrices
        self._squares: dict[str, tuple[Tensor, int]] = {}
        self._stats: dict[str, dict[str, Tensor]] = {}
        self._attention = dict(attention or {}) if qk_clip_tau is not None else {}
        self._observer = LogitObserver(qk_clip_tau or math.inf)
        for name, item in self._attention.items():
            self._observer.watch(name, item.module, item.rows.num_heads)
        weakref.finalize(self, self._observer.close)  # a model may have several optimizers in its life

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.1,
        qk_clip_tau: float | None = 100.0,
        ns_steps: int = 5,
        *,
        rules: Sequence[Rule] = DEFAULT_RULES,
        attention: Mapping[str, str | HeadRows] | None = None,
        per_head: bool = False,
        ns_dtype: str = "auto",
        ns_iteration: str = "auto",
        process_group: ProcessGroup | None = None,
        **options: Any,
    ) -> MuonClip:
        """MuonClip for a whole model.

        Args:
            model: any module; the default rules know Kimi K2, DeepSeek-V3, Llama and Qwen2 names.
            rules: what each parameter is; see `Rule`.
            attention: heads that are not told by the names of submodules: {name pattern: "mla", "gqa" or HeadRows}.
            per_head: orthogonalise the up-projections of queries, keys and values head by head, not as one matrix.
            options: further options of `MuonClip`.

        Raises:
            ValueError: a trainable parameter without exactly one rule, or an option that does not fit.
        """
        if isinstance(model, DistributedDataParallel) and process_group is None:
            process_group = model.process_group
        wanted = qk_clip_tau is not None or per_head
        found = find_attention(model, attention) if wanted else {}
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise ValueError(f"MuonClip has no option {sorted(unknown)}: expected one of {sorted(_OPTIONS)}.")
        return cls(
            parameter_groups(model, rules, found, per_head),
            lr,
            momentum,
            nesterov,
            weight_decay,
            qk_clip_tau,
            ns_steps,
            ns_dtype=ns_dtype,
            ns_iteration=ns_iteration,
            attention=_clippable(found) if qk_clip_tau is not None else None,
            process_group=process_group,
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked as the constructor's are."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            for name, param in zip(_names(group), group["params"], strict=True):
                check_parameter(name, param, group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: the largest logits are collected and checked, weights are updated, heads are clipped.

        Collective where parameters are sharded or shared between ranks.

        Raises:
            FloatingPointError: a logit since the last step was infinite or NaN. No parameter has changed.
            ValueError: a parameter or its state does not fit (see the message).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        logits = self._largest_logits()
        self._check_state()
        self._squares = {}
        tasks: list[tuple[Tensor, Task]] = []
        for group in self.param_groups:
            stepped = [
                (name, param)
                for name, param in zip(_names(group), group["params"], strict=True)
                if param.grad is not None
            ]
            if group["algorithm"] == "adamw":
                self._adamw(group, [param for _, param in stepped])
            else:
                tasks.extend((param, self._task(name, param, group)) for name, param in stepped)
        here, shared = [], []
        for param, task in tasks:
            if is_whole(param) and (isinstance(param, DTensor) or self.process_group is None):
                here.append(task)
            else:
                shared.append(Shared(task, layout_of(param, self.process_group)))
        self.communicated_bytes = step_shared(shared, lambda: step_local(here))
        self._clip(logits)
        return loss

    def qk_clip_stats(self) -> dict[str, dict[str, Tensor]]:
        """What the last step saw and did, per attention module: CPU tensors [heads].

        `max_logit`: the largest logit since the step before (all ranks and micro-batches), or its upper bound where
        `exact` is False: the log-sum-exp of the row, at most log(keys) above, computed when no head needs clipping.
        `lower_bound`: what it is at least. `gamma`: the factor the head's logits were scaled by, 1 for most.
        -inf: no forward pass.
        """
        return {name: dict(stats) for name, stats in self._stats.items()}

    def update_rms(self) -> dict[str, float]:
        """RMS of every Muon update of the last step, per unit of lr, by parameter name; collective like `step`.

        Set `track_update_rms = True` before the step; it costs one pass over the updates.
        """
        if not self._squares:
            return {}
        values = torch.stack([squares for squares, _ in self._squares.values()])
        counts = torch.tensor([float(count) for _, count in self._squares.values()], device=values.device)
        packed = torch.stack([values, counts])
        if (group := self._data_group()) is not None:
            dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
        rms = (packed[0] / packed[1].clamp(min=1)).sqrt().tolist()
        return dict(zip(self._squares, rms, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own dtype: torch rounds float32 momenta to bfloat16 parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[param][name] = value.to(device=param.device)

    def __repr__(self) -> str:
        """One line a group; `param_groups` has every option."""
        clipped = (
            f"{len(self._attention)} attention modules at tau {self.qk_clip_tau}"
            if self._attention
            else "nothing"
        )
        lines = [f"MuonClip (QK-Clip: {clipped})"]
        for group in self.param_groups:
            size = sum(param.numel() for param in group["params"])
            cut = f", rows cut into {group['row_blocks']}" if group["row_blocks"] else ""
            lines.append(
                f"  {group['algorithm']:5} lr {float(group['lr']):g}: {len(group['params'])} parameters, {size:,} numbers"
                f"{cut}  {group['rule']}".rstrip()
            )
        return "\n".join(lines)

    def close(self) -> None:
        """Take the hooks off the attention modules, as the end of the optimizer's life does."""
        self._observer.close()

    # -- the step's parts

    def _task(self, name: str, param: Tensor, group: Group) -> Task:
        check_parameter(name, param, group)
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=_state_dtype(param, group))
        weight, copy = self._weight(param, group)
        task = Task(
            weight=local(weight),
            grad=_gradient(param),
            momentum=local(state["momentum_buffer"]),
            group=group,
            shape=tuple(param.shape),
            copy=None if copy is None else local(copy),
        )
        if self.track_update_rms:
            task.squares = torch.zeros((), device=task.weight.device)
            self._squares[name] = (task.squares, task.weight.numel())
        return task

    def _weight(self, param: Tensor, group: Group) -> tuple[Tensor, Tensor | None]:
        """What the update is applied to, and the parameter that has to follow it."""
        if not group["master_weights"] or param.dtype in (torch.float32, torch.float64):
            return param, None
        state = self.state[param]
        if "master" not in state:
            state["master"] = param.detach().to(torch.float32, copy=True)
        return state["master"], param

    def _adamw(self, group: Group, params: list[Tensor]) -> None:
        kept = [param for param in params if local(param).numel()]
        for param in params:
            state = self.state[param]
            if "step" not in state:
                dtype = _state_dtype(param, group)
                wide = torch.float64 if param.dtype == torch.float64 else torch.float32
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=wide)
            if not local(param).numel():
                state["step"] += 1
        if not kept:
            return
        pairs = [self._weight(param, group) for param in kept]
        states = [self.state[param] for param in kept]
        step_adamw(
            group,
            [local(weight) for weight, _ in pairs],
            [_gradient(param) for param in kept],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
        )
        for weight, copy in pairs:
            if copy is not None:
                local(copy).copy_(local(weight))

    def _data_group(self) -> ProcessGroup | None:
        """The ranks over which logits are compared; None for one process."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        if self.process_group is not None:
            return self.process_group
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        meshes = [param.device_mesh for param in params if isinstance(param, DTensor)]
        if not meshes:
            return dist.group.WORLD
        return mesh_group(max(meshes, key=lambda mesh: mesh.size()))

    def _largest_logits(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per module: value, exactness and lower bound [heads], on the CPU; the record starts anew."""
        if not self._attention:
            return {}
        packed = self._observer.packed(self.param_groups[0]["params"][0].device)
        if (group := self._data_group()) is not None:
            dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
        packed = packed.cpu()
        self._observer.reset()
        parts = packed.split(self._observer.num_heads, dim=1)
        logits = {}
        for name, (exact, upper, lower) in zip(self._observer.names, parts, strict=True):
            value = torch.maximum(exact, upper)
            if not bool((value < math.inf).all()):
                heads = [head for head, logit in enumerate(value.tolist()) if not logit < math.inf]
                raise FloatingPointError(
                    f"{name}: attention logits of heads {heads} are infinite or NaN; no parameter was changed. The forward "
                    "pass has overflowed: look for a diverged loss, or a learning rate that is too high."
                )
            logits[name] = (value, exact >= upper, torch.maximum(exact, lower))
        return logits

    def _clip(self, logits: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        self._stats = {}
        for name, (value, exact, lower) in logits.items():
            assert self.qk_clip_tau is not None
            gamma = clip_factors(value, self.qk_clip_tau)
            self._stats[name] = {"max_logit": value, "exact": exact, "lower_bound": lower, "gamma": gamma}
            if not bool((gamma < 1).any()):
                continue
            item = self._attention[name]
            for projection, runs in item.rows.projections:
                factors = row_factors(gamma, runs)
                for leaf in ("weight", "bias"):
                    param = self._trained(name, item.module.get_submodule(projection), projection, leaf)
                    if param is not None:
                        self._scale(param, factors)

    def _trained(self, name: str, module: nn.Module, projection: str, leaf: str) -> Tensor | None:
        """A parameter by its name in the groups: between forward and backward the module may hold FSDP's gathered copy."""
        full_name = ".".join(filter(None, (name, projection, leaf)))
        for group in self.param_groups:
            names = group.get("param_names", ())
            if full_name in names:
                return group["params"][names.index(full_name)]
        return getattr(module, leaf)

    def _scale(self, param: Tensor, factors: Tensor) -> None:
        master = self.state[param].get("master") if param in self.state else None
        if master is None:
            scale_rows(param, factors)
        else:
            scale_rows(master, factors)
            local(param).copy_(local(master))

    def _check_state(self) -> None:
        """State of parameters that are not ours any more means that they were replaced after the state was made."""
        params = set(chain.from_iterable(group["params"] for group in self.param_groups))
        if stale := [param for param in self.state if param not in params]:
            raise ValueError(
                f"{len(stale)} parameters with optimizer state are no longer in any group, the first of shape "
                f"{list(stale[0].shape)}: parameters were replaced after the first step. Expected sharding (FSDP2, "
                "Accelerate's prepare) before the first step and before load_state_dict."
            )


def _clippable(found: Mapping[str, Attention]) -> dict[str, Attention]:
    """The modules whose query and key projections are trained as they are.

    Under LoRA, or frozen, the projection is a base that others share: scaling it would change what adapters sit on.
    """
    kept = {name: item for name, item in found.items() if all(map(_is_trained, _projections(item)))}
    if left := [name for name in found if name not in kept]:
        warnings.warn(
            f"QK-Clip leaves {len(left)} of {len(found)} attention modules alone, because their query or key projections "
            f"are frozen or wrapped by an adapter: {left[0]}{' and others' if len(left) > 1 else ''}. "
            "qk_clip_tau=None says so and stops this warning.",
            stacklevel=3,
        )
    return kept


def _projections(item: Attention) -> list[nn.Module]:
    return [item.module.get_submodule(projection) for projection, _ in item.rows.projections]


def _is_trained(projection: nn.Module) -> bool:
    weight = dict(projection.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.requires_grad


def _gradient(param: Tensor) -> Tensor:
    """This rank's part of a gradient, placed as the parameter is."""
    grad = param.grad
    assert grad is not None
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def _names(group: Group) -> list[str]:
    count = len(group["params"])
    return group.get("param_names") or [
        f"parameter {index} of group {group['rule']!r}" for index in range(count)
    ]


def _state_dtype(param: Tensor, group: Group) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else getattr(torch, group["state_dtype"])


def muon_clip(**options: Any) -> tuple[Any, dict[str, Any]]:
    """What `transformers.Trainer(optimizer_cls_and_kwargs=...)` takes: `muon_clip(lr=2e-4)`.

    Trainer then calls `MuonClip.for_model(model, **options)` itself, when the model is in its final form.

    Raises:
        ValueError: no lr, or an option that `MuonClip.for_model` does not have.
    """
    known = inspect.signature(MuonClip.for_model).parameters.keys() - {"model", "options"} | _OPTIONS
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"muon_clip has no option {unknown}: expected some of {sorted(known)}.")
    if "lr" not in options:
        raise ValueError(
            "muon_clip needs lr: Trainer's own learning_rate does not reach an optimizer given this way."
        )
    return _for_model, options


def _for_model() -> Callable[..., MuonClip]:
    """Trainer calls factories twice: once for the maker, once with the model."""
    return MuonClip.for_model


_OPTIONS = {"ns_schedule", "ns_eps", "update_rms", "betas", "eps", "state_dtype", "master_weights"}
