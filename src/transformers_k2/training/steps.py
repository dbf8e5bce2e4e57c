"""Which rows of the training data a process reads at a step: a function of step and rank, so that there is no state.

A run resumes at any step, on any number of processes, by asking for the same rows. A run has one phase, or several with
other sequence lengths; the tokens of a step are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .rows import IGNORED, Rows, collate, spread

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with rows of one length."""

    num_steps: int
    rows: Rows
    rows_per_step: int  # over all processes
    rows_per_micro_batch: int  # of one process


@dataclass(frozen=True)
class StepPlan:
    """The rows of every step, dealt out over the processes that read different data.

    Raises:
        ValueError: rows that do not divide by processes and micro-batches, with what would.
    """

    phases: tuple[Phase, ...]
    data_size: int
    data_rank: int

    def __post_init__(self) -> None:
        for phase in self.phases:
            if phase.rows_per_step % (self.data_size * phase.rows_per_micro_batch):
                raise ValueError(
                    f"A step reads {phase.rows_per_step} rows, which {self.data_size} data-parallel processes cannot "
                    f"share in micro-batches of {phase.rows_per_micro_batch}: expected training.batch_size to be a "
                    f"multiple of {self.data_size * phase.rows_per_micro_batch}; change it, or training.micro_batch_size."
                )
        if len({self._accumulation(phase) for phase in self.phases}) > 1:
            raise ValueError(
                "The phases of the run need different numbers of micro-batches per step: expected a "
                "training.micro_batch_size that holds the longest sequences a whole number of times."
            )

    @property
    def num_steps(self) -> int:
        """Of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def accumulation(self) -> int:
        """Micro-batches a process and step."""
        return self._accumulation(self.phases[0])

    def phase_of(self, step: int) -> tuple[int, int]:
        """The number of the phase that `step` (from 0) belongs to, and how many steps of it came before."""
        for number, phase in enumerate(self.phases):
            if step < phase.num_steps:
                return number, step
            step -= phase.num_steps
        raise IndexError(f"step is beyond the {self.num_steps} steps of the run")

    def micro_batch(self, step: int, number: int) -> Batch:
        """Micro-batch `number` of this process at `step`, both from 0."""
        index, inner = self.phase_of(step)
        phase = self.phases[index]
        local = phase.rows_per_step // self.data_size
        start = inner * phase.rows_per_step + self.data_rank * local + number * phase.rows_per_micro_batch
        rows = [phase.rows.row(row) for row in range(start, start + phase.rows_per_micro_batch)]
        return collate(rows)

    def loader(self, first_step: int, whole_steps: bool = False, num_workers: int = 0) -> DataLoader:
        """A DataLoader over the micro-batches from `first_step` on, or over whole steps; its length is that of the run."""
        per_step = 1 if whole_steps else self.accumulation
        return DataLoader(
            _MicroBatches(self, whole_steps),
            batch_size=None,
            sampler=_From(first_step * per_step, self.num_steps * per_step),
            num_workers=num_workers,
        )

    def _accumulation(self, phase: Phase) -> int:
        return phase.rows_per_step // (self.data_size * phase.rows_per_micro_batch)


@dataclass(frozen=True)
class _MicroBatches(Dataset):
    plan: StepPlan
    whole_steps: bool

    def __len__(self) -> int:
        return self.plan.num_steps * (1 if self.whole_steps else self.plan.accumulation)

    def __getitem__(self, index: int) -> Batch:
        if not self.whole_steps:
            return self.plan.micro_batch(*divmod(index, self.plan.accumulation))
        parts = [self.plan.micro_batch(index, number) for number in range(self.plan.accumulation)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@dataclass(frozen=True)
class _From(Sampler):
    """`first` to `total`, with the length of the whole: Trainer counts epochs by it."""

    first: int
    total: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))

    def __len__(self) -> int:
        return self.total


def held_out_batches(
    rows: Rows, num_rows: int, rows_per_batch: int, data_size: int, data_rank: int
) -> list[Batch]:
    """This process's share of `num_rows` held-out rows, evenly spread, in as many batches as every other process has.

    Sharded models compute together, so a process without rows left goes along with rows that no loss counts.
    """
    numbers = spread(len(rows), num_rows)
    mine = numbers[data_rank::data_size]
    longest = -(-len(numbers) // data_size)
    chosen = [rows.row(number) for number in mine]
    chosen += [_ignored(rows.row(numbers[0]))] * (longest - len(chosen))
    return [collate(chosen[start : start + rows_per_batch]) for start in range(0, longest, rows_per_batch)]


def _ignored(row: Batch) -> Batch:
    return {**row, "labels": torch.full_like(row["labels"], IGNORED)}
