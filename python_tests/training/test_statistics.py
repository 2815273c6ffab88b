"""Interquartile means and their intervals, against rliable's and against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from diffcore.training.statistics import bootstrap_interval, interquartile_mean

# rliable 1.2.0, metrics.aggregate_iqm and library.get_interval_estimates with 50,000 samples:
# mean, lower and upper end.
RLIABLE = [
    ([[1.0], [2.0], [3.0], [4.0], [10.0]], (3.0, 1.33333333, 8.0)),
    (
        [
            [0.345584192064786, 0.8216181435011584, 0.33043707618338714],
            [-1.303157231604361, 0.9053558666731177, 0.4463745723640113],
            [-0.5369532353602852, 0.5811181041963531, 0.36457239618607573],
            [0.294132496655526, 0.02842224131579679, 0.5467129866124469],
            [-0.7364540870016669, -0.16290994799305278, -0.48211931267997826],
            [0.5988462126346276, 0.03972210748165899, -0.2924567509650886],
            [-0.7819084623568421, -0.2571922406188707, 0.008142180518343508],
            [-0.2756029052993704, 1.2940638143982073, 1.0067243153057943],
        ],
        (0.14236626, -0.1184528, 0.40260129),
    ),
]


@pytest.mark.parametrize(("scores", "expected"), RLIABLE)
def test_rliable_says_the_same(scores: list[list[float]], expected: tuple[float, ...]) -> None:
    mean, low, high = bootstrap_interval(np.array(scores), samples=50_000)
    assert mean == pytest.approx(expected[0], abs=1e-7)
    # Two bootstraps of 50,000 samples: at the 2.5% tail they differ by about 1% of the width.
    tolerance = 0.02 * (expected[2] - expected[1])
    assert (low, high) == pytest.approx(expected[1:], abs=tolerance)


def test_interquartile_mean_cuts_a_quarter_at_either_end() -> None:
    assert interquartile_mean(np.array([9.0, 1.0, 2.0])) == 4.0
    assert interquartile_mean(np.array([100.0, 1.0, 3.0, -100.0])) == 2.0
    assert interquartile_mean(np.arange(7.0)) == 3.0  # 7 // 4 is 1
    rows = np.array([[4.0, 0.0, 0.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(interquartile_mean(rows), [2.0, 1.0])
    assert np.isnan(interquartile_mean(np.array([1.0, np.nan])))


def test_intervals_that_can_be_counted() -> None:
    # Of the 27 equally likely samples of three runs one is the lowest run three times: 3.7%, more
    # than the 2.5% below the interval.
    assert bootstrap_interval(np.array([[1.0], [2.0], [6.0]])) == (3.0, 1.0, 6.0)
    # At 50% confidence the interval's ends are among the means in the middle.
    _, low, high = bootstrap_interval(np.array([[0.0], [3.0], [6.0]]), confidence=0.5)
    assert (low, high) == (2.0, 4.0)
    assert bootstrap_interval(np.array([[5.0]])) == (5.0, 5.0, 5.0)


def test_strata_are_drawn_each_by_itself() -> None:
    # Two tasks, in each of which all runs are alike: nothing to be unsure of.
    assert bootstrap_interval(np.array([[0.0, 10.0]] * 5)) == (5.0, 5.0, 5.0)
    scores = np.random.default_rng(0).normal(size=(4, 2))
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
