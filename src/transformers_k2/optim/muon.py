"""The arithmetic of one step, on plain local tensors: Muon on stacks of matrices, AdamW on everything else.

M = mu M + G;  O = NewtonSchulz(M) 0.2 sqrt(max(rows, columns));  W = W - lr (O + wd W)   (arXiv 2507.20534, Alg. 1).
The momentum is kept as (1 - mu) M, an average: Newton-Schulz does not see the scale. Operations come in the order of
torch.optim.Muon, so that float32 matrices get its result bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .newton_schulz import choose_dtype, choose_iteration, flops, orthogonalize

Group = dict[str, Any]
CHUNK = 2**26  # elements whose updates are held at a time


@dataclass
class Task:
    """One parameter's step: its local part, and what the step reads and writes.

    Args:
        weight: what is updated: the local parameter, or its float32 master [.., rows, in].
        copy: the low-precision parameter that follows a master, or None.
        shape: of the whole parameter, of which `weight` may be a shard.
    """

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    group: Group
    shape: tuple[int, ...]
    copy: Tensor | None = None
    squares: Tensor | None = None  # sum of the squared update, if it is wanted
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        self.cost = sum(
            count * flops(rows, columns, self.group["ns_steps"], self.iteration(rows, columns))
            for count, rows, columns in matrix_shapes(self.shape, self.group["row_blocks"])
        )

    @property
    def dtype(self) -> torch.dtype:
        """What Newton-Schulz computes in."""
        name = self.group["ns_dtype"]
        return choose_dtype(self.weight.device) if name == "auto" else getattr(torch, name)

    def iteration(self, rows: int, columns: int) -> Any:
        """`standard` or `gram`, for one of the parameter's matrices."""
        if (asked := self.group["ns_iteration"]) != "auto":
            return asked
        return choose_iteration(rows, columns, self.dtype, self.weight.device, self.group["ns_steps"])

    def orthogonal(self, batch: Tensor) -> Tensor:
        """U V^T of every matrix of [k, rows, columns], in `dtype`."""
        group = self.group
        iteration = self.iteration(*batch.shape[1:])
        return orthogonalize(
            batch, group["ns_steps"], group["ns_schedule"], self.dtype, iteration, group["ns_eps"]
        )

    def ratio(self, rows: int, columns: int) -> float:
        """What brings the update of a matrix to the RMS of AdamW's (arXiv 2502.16982, eq. 4)."""
        return self.group["update_rms"] * math.sqrt(max(rows, columns))


def matrix_shapes(shape: Sequence[int], blocks: tuple[int, ...] | None) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of the matrices in a parameter [rows, in] or [experts, rows, in] cut into row blocks."""
    count, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    if not blocks:
        return [(count, rows, columns)]
    return [(count * (rows // sum(blocks)), block, columns) for block in blocks]


def matrices(tensor: Tensor, blocks: tuple[int, ...] | None) -> list[Tensor]:
    """Views [k, rows, columns] of all matrices in a parameter, one stack per entry of `blocks`."""
    if not blocks:
        return [tensor.unsqueeze(0) if tensor.ndim == 2 else tensor]
    period = sum(blocks)
    cut = tensor.unflatten(-2, (tensor.shape[-2] // period, period)).split(blocks, dim=-2)
    return [stack.view(-1, *stack.shape[-2:]) for stack in cut]


def momentum_updates(tasks: Sequence[Task]) -> list[Tensor]:
    """Advance the momenta and return what is to be orthogonalised; tasks share momentum and nesterov.

    The results may be the momenta themselves: they are for reading. Momenta of another dtype than the gradients are
    advanced in float32.
    """
    momentum, nesterov = tasks[0].group["momentum"], tasks[0].group["nesterov"]
    grads, states = [task.grad for task in tasks], [task.momentum for task in tasks]
    if all(grad.dtype == state.dtype for grad, state in zip(grads, states, strict=True)):
        torch._foreach_lerp_(states, grads, 1 - momentum)
        return list(torch._foreach_lerp(grads, states, momentum)) if nesterov else states
    updates = []
    for grad, state in zip(grads, states, strict=True):
        grad = grad.float()
        average = state if state.dtype == torch.float32 else state.float()
        average.lerp_(grad, 1 - momentum)
        state.copy_(average)
        updates.append(grad.lerp(average, momentum) if nesterov else average)
    return updates


def decay(tasks: Iterable[Task]) -> None:
    """Decoupled weight decay, W - lr wd W."""
    for task in tasks:
        task.weight.mul_(1 - float(task.group["lr"]) * task.group["weight_decay"])


def apply_update(task: Task, weight: Tensor, update: Tensor, rows: int, columns: int) -> None:
    """W - lr ratio O on a view of the weight, `update` [k, rows, columns] or a shard of it."""
    ratio = task.ratio(rows, columns)
    weight.add_(update, alpha=-(float(task.group["lr"]) * ratio))
    if task.squares is not None:
        task.squares.add_(update.float().square().sum() * ratio**2)


def finish(task: Task) -> None:
    """Bring the low-precision copy up to its master."""
    if task.copy is not None:
        task.copy.copy_(task.weight)


def step_local(tasks: Sequence[Task]) -> None:
    """Step parameters whose matrices are all here, matrices of one shape together."""
    for chunk in _chunks(sorted(tasks, key=lambda task: (task.group["rule"], task.weight.shape))):
        stacks: dict[tuple[Any, ...], list[tuple[Task, Tensor, Tensor]]] = {}
        decay(chunk)
        for task, update in zip(chunk, momentum_updates(chunk), strict=True):
            blocks = task.group["row_blocks"]
            for weight, matrix in zip(matrices(task.weight, blocks), matrices(update, blocks), strict=True):
                rows, columns = matrix.shape[1:]
                key = (rows, columns, task.weight.device, task.dtype, task.iteration(rows, columns))
                stacks.setdefault(key, []).append((task, weight, matrix))
        for entries in stacks.values():
            for (task, weight, _), update in zip(entries, _orthogonal(entries), strict=True):
                apply_update(task, weight, update, *update.shape[1:])
        for task in chunk:
            finish(task)


def _orthogonal(entries: Sequence[tuple[Task, Tensor, Tensor]]) -> Iterable[Tensor]:
    """One call for all stacks on a GPU; on a CPU, where matrices go one by one anyhow, without copying them together."""
    task = entries[0][0]
    if task.weight.device.type == "cpu":
        for _, _, matrix in entries:
            yield task.orthogonal(matrix)
    else:
        whole = task.orthogonal(torch.cat([matrix.to(task.dtype) for _, _, matrix in entries]))
        yield from whole.split([matrix.shape[0] for _, _, matrix in entries])


def _chunks(tasks: Sequence[Task]) -> Iterable[list[Task]]:
    """Runs of tasks of one group whose updates fit into CHUNK elements."""
    chunk: list[Task] = []
    for task in tasks:
        full = sum(other.weight.numel() for other in chunk) + task.weight.numel() > CHUNK
        if chunk and (full or task.group is not chunk[0].group):
            yield chunk
            chunk = []
        chunk.append(task)
    if chunk:
        yield chunk


def step_adamw(
    group: Group,
    weights: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    """torch's AdamW on local tensors. Where dtypes differ, arithmetic is float32 and the results are rounded into place."""
    kept = [weights, averages, squares]
    dtypes = {tensor.dtype for tensors in (*kept, grads) for tensor in tensors}
    same = len(dtypes) == 1
    work = kept if same else [[tensor.float() for tensor in tensors] for tensors in kept]
    adamw(
        work[0],
        grads if same else [grad.float() for grad in grads],
        work[1],
        work[2],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    if not same:
        for targets, results in zip(kept, work, strict=True):
            for target, result in zip(targets, results, strict=True):
                if target is not result:
                    target.copy_(result)
