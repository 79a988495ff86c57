"""Paired bootstrap over samples (texts, prompts): resamples whole samples, so that what methods share cancels out."""

import functools

import numpy as np

RESAMPLES = 4000
SEED = 20261126


def draws(groups, resamples=RESAMPLES, seed=SEED):
    """[resamples, samples] indices; samples of one group (task) are drawn from that group only.

    groups: the group of each sample, in order.
    """
    return _draws(tuple(np.asarray(groups).tolist()), resamples, seed)


@functools.lru_cache(maxsize=16)  # the same samples are asked about again and again
def _draws(groups, resamples, seed):
    rng = np.random.default_rng(seed)
    groups = np.asarray(groups)
    drawn = np.empty((resamples, len(groups)), dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        drawn[:, members] = members[rng.integers(0, len(members), (resamples, len(members)))]
    return drawn


def interval(values, share=0.95):
    """(low, high) that hold the middle `share` of the values."""
    tail = 100 * (1 - share) / 2
    low, high = np.percentile(np.asarray(values), [tail, 100 - tail])
    return float(low), float(high)


def mean_interval(values, groups=None):
    """Interval of the mean of the samples' values."""
    values = np.asarray(values, dtype=float)
    drawn = draws(groups if groups is not None else np.zeros(len(values), dtype=int))
    return interval(values[drawn].mean(axis=1))


def difference_interval(a, b, groups=None):
    """Interval of mean(a) - mean(b); a and b hold the same samples in the same order."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} samples: they must be the same ones")
    return mean_interval(a - b, groups)


def ratio_interval(a, b, groups):
    """Interval of (mean over groups of mean a) / (mean over groups of mean b), samples paired."""
    a, b, groups = np.asarray(a, dtype=float), np.asarray(b, dtype=float), np.asarray(groups)
    drawn = draws(groups)
    top, bottom = np.zeros(len(drawn)), np.zeros(len(drawn))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        top += a[drawn[:, members]].mean(axis=1)
        bottom += b[drawn[:, members]].mean(axis=1)
    return interval(top / np.maximum(bottom, 1e-12))
