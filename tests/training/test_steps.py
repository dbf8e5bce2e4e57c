"""Which rows are read when: every row of a step once, whatever the number of processes, and the same after a resume."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from transformers_k2.training.rows import IGNORED, Row
from transformers_k2.training.steps import Phase, StepPlan, held_out_batches


class Numbered:
    """Row i is i, `length` times."""

    def __init__(self, length: int, num_rows: int = 1000) -> None:
        self.length, self.num_rows = length, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> Row:
        ids = torch.full((self.length,), index)
        return {"input_ids": ids, "labels": ids.clone()}


def plan(data_size: int, rank: int, micro: int = 1, *more: Phase) -> StepPlan:
    return StepPlan((Phase(3, Numbered(5), 12, micro), *more), data_size, rank)


def numbers(batch: Row) -> list[int]:
    assert torch.equal(batch["input_ids"], batch["labels"])
    return batch["input_ids"][:, 0].tolist()


@pytest.mark.parametrize(("data_size", "micro"), [(1, 12), (1, 5 - 1), (2, 3), (3, 1), (12, 1)])
def test_the_processes_read_every_row_once(data_size: int, micro: int) -> None:
    plans = [plan(data_size, rank, micro) for rank in range(data_size)]
    for step in range(3):
        read = [
            numbers(part.micro_batch(step, number)) for part in plans for number in range(part.accumulation)
        ]
        assert all(len(batch) == micro for batch in read)
        assert sorted(chain(*read)) == list(range(12 * step, 12 * step + 12))


def test_a_loader_starts_where_a_run_was_left() -> None:
    part = plan(2, 1, 2)
    whole = [numbers(batch) for batch in part.loader(0)]
    assert len(whole) == len(part.loader(0)) == len(part.loader(2)) == 9
    assert [numbers(batch) for batch in part.loader(2)] == whole[6:]
    assert [numbers(batch) for batch in part.loader(1, num_workers=1)] == whole[3:]
    steps = [numbers(batch) for batch in part.loader(1, whole_steps=True)]
    assert steps == [[*chain(*whole[3:6])], [*chain(*whole[6:])]]


def test_phases_follow_each_other_with_as_many_tokens() -> None:
    part = plan(2, 0, 4 - 2, Phase(2, Numbered(10), 6, 1))
    assert part.num_steps == 5
    assert [part.phase_of(step) for step in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with pytest.raises(IndexError):
        part.phase_of(5)
    batches = list(part.loader(2))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5)] * 3 + [(1, 10)] * 6
    assert [numbers(batch) for batch in batches[3:]] == [[0], [1], [2], [6], [7], [8]]


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"12 rows, which 5 data-parallel .* multiple of 5"):
        plan(5, 0)
    with pytest.raises(ValueError, match="multiple of 10"):
        plan(2, 0, 5)
    with pytest.raises(ValueError, match="different numbers of micro-batches"):
        plan(2, 0, 2, Phase(2, Numbered(10), 6, 3))


@pytest.mark.parametrize("data_size", [1, 2, 4, 7])
def test_held_out_rows_are_judged_once_and_every_process_goes_along(data_size: int) -> None:
    shares = [held_out_batches(Numbered(3, 10), 5, 2, data_size, rank) for rank in range(data_size)]
    assert len({len(share) for share in shares}) == 1
    judged: list[int] = []
    for share in shares:
        for batch in share:
            counted = (batch["labels"] != IGNORED).all(1)
            assert torch.equal((batch["labels"] != IGNORED).any(1), counted)
            judged += batch["input_ids"][counted, 0].tolist()
    assert sorted(judged) == [0, 2, 4, 6, 9]
