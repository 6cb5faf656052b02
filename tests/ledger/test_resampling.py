"""Intervals by resampling, of what few steps have a part in."""

import numpy as np
import pytest

from adam_ghost.ledger.resampling import middle, resample


@pytest.mark.parametrize("met", [2, 3])
def test_a_mean_that_is_far_from_zero_has_an_interval_that_is(met):
    """In many resamplings of 20 steps there is none of those that met the sample: its mean is not zero there, it has none."""
    block, x = np.arange(met) * 4, 3 + 0.1 * np.arange(met)
    drawn = resample(block, np.zeros(met, np.int64), x, np.ones(met), 20, 1, 400)
    assert np.isnan(drawn).any()
    low, high = middle(drawn)
    assert x.min() <= low[0] < x.mean() < high[0] <= x.max()


def test_a_sum_counts_as_nothing_where_it_was_not_drawn():
    drawn = resample(np.array([3]), np.array([0]), np.array([2.0]), None, 20, 1, 400)
    assert (drawn == 0).any() and not np.isnan(drawn).any()


def test_nothing_drawn():
    low, high = middle(np.empty((0, 2)))
    assert low.shape == high.shape == (2,)
