"""The spike guard against thresholds worked out with NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from transformers_k2.training.errors import LossSpikeError
from transformers_k2.training.spikes import SpikeGuard

CALM = [3.0, 2.9, 3.05, 2.95, 2.8, 2.85]


def filled(losses: list[float] = CALM, **changes: int) -> SpikeGuard:
    guard = SpikeGuard(**{"window": 6, "factor": 4.0, "max_skips": 3} | changes)
    assert not any(guard.spikes(step, loss) for step, loss in enumerate(losses))
    return guard


def test_nothing_is_skipped_before_the_window_is_full() -> None:
    filled([3.0, 100.0, 3.0, 1e6, 3.0, 2.0])


def test_the_threshold_is_the_median_and_its_deviation() -> None:
    guard = filled()
    middle = float(np.median(CALM))
    deviation = float(np.median(np.abs(np.array(CALM) - middle)))
    limit = max(middle + 4 * deviation, 1.1 * middle)
    assert guard.threshold() == pytest.approx(limit)
    assert not guard.spikes(6, limit - 1e-6)
    guard = filled()
    assert guard.spikes(6, limit + 1e-6)
    assert guard.skipped == [6]
    assert guard.threshold() == pytest.approx(limit)  # a skipped loss does not count
    assert filled([2.0] * 6).threshold() == pytest.approx(2.2)  # equal losses have no deviation
    wild = filled([1.0, 5.0, 1.0, 5.0, 1.0, 5.0])
    assert wild.threshold() == pytest.approx(3 + 4 * 2)


def test_losses_follow_the_run() -> None:
    guard = filled()
    for step in range(6, 200):
        assert not guard.spikes(step, 3.0 - step / 100)
    assert guard.spikes(200, 2.0)  # would have been fine at the start


def test_skips_in_a_row_stop_the_run() -> None:
    guard = filled()
    assert guard.spikes(6, 9.0)
    assert guard.spikes(7, 9.0)
    assert not guard.spikes(8, 2.9)
    assert guard.spikes(9, 9.0)
    assert guard.spikes(10, 9.0)
    with pytest.raises(LossSpikeError, match="step 12: 3 steps in a row had a loss above"):
        guard.spikes(11, 9.0)


def test_a_resumed_guard_is_the_same() -> None:
    guard = filled()
    guard.spikes(6, 50.0)
    other = SpikeGuard(6, 4.0, 3)
    other.restore(json.loads(json.dumps(guard.state())))
    for step, loss in enumerate([2.9, 50.0, 2.7, 3.1, 2.75, 60.0, 2.7], 7):
        assert guard.spikes(step, loss) == other.spikes(step, loss)
        assert guard.threshold() == other.threshold()
    assert other.skipped == guard.skipped == [6, 8, 12]
