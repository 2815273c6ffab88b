"""Statistics of few runs: the interquartile mean, and how sure it is.

After "Deep reinforcement learning at the edge of the statistical precipice" (arXiv 2108.13264),
whose library rliable computes the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def interquartile_mean(scores: Array) -> Array:
    """Mean of what is left when a quarter of the values is cut off at either end.

    Args:
        scores: ``[..., N]``. A quarter of ``N`` is rounded down: of 1 to 3 values none is cut.

    Returns:
        ``[...]``.
    """
    count = scores.shape[-1]
    cut = count // 4
    return np.asarray(np.sort(scores, axis=-1)[..., cut : count - cut].mean(axis=-1))


def bootstrap_interval(
    scores: Array, *, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """The interquartile mean over runs and tasks, with its stratified bootstrap interval.

    Runs are drawn with replacement, for each task by itself; the interval lies between percentiles
    of the means of such samples. With a handful of runs it is rough, and never wider than they are.

    Args:
        scores: ``[runs, tasks]``.
        confidence: the share of samples inside the interval.
        samples: bootstrap samples.
        seed: of the samples.

    Returns:
        The mean, the interval's lower and its upper end, 0-d each.
    """
    runs, tasks = scores.shape
    drawn = np.random.default_rng(seed).integers(runs, size=(samples, runs, tasks))
    resampled = np.take_along_axis(scores[None], drawn, axis=1).reshape(samples, -1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(interquartile_mean(resampled), [tail, 1.0 - tail])
    return interquartile_mean(scores.reshape(-1)), low, high
