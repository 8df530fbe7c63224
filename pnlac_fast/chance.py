"""What chance gives: the overlap of two sets of neurons drawn at random."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from pnlac_fast.neurons import jaccard


class Overlap(NamedTuple):
    """Jaccard index (1912, doi 10.1111/j.1469-8137.1912.tb05611.x) of two sets, beside that of random ones.

    Attributes
    ----------
    jaccard
        Size of the intersection over that of the union.
    expected, high
        Mean and 97.5 % quantile of the index for independent random sets of the same sizes.
    p
        Probability that such sets share at least as many neurons.
    """

    jaccard: float
    expected: float
    high: float
    p: float


def overlap(a: np.ndarray, b: np.ndarray, *, by_layer: bool = True) -> Overlap:
    """Overlap of two sets, bool [layer, neuron], against the hypergeometric distribution.

    Parameters
    ----------
    by_layer
        Random sets have the counts of ``a`` and ``b`` in every layer, so that a common taste for some layers is no
        overlap; else only the same sizes.

    Notes
    -----
    Of N neurons, sets of m and k share a hypergeometric number (mean m k / N), so that in one layer ``p`` is that of
    Fisher's exact test, one-sided (1922, doi 10.2307/2340521); layers add up, so their distributions are convolved.
    """
    if not by_layer:
        a, b = a.reshape(1, -1), b.reshape(1, -1)
    m, k = a.sum(1), b.sum(1)
    sizes = zip(m.tolist(), k.tolist(), strict=True)
    mass = reduce(np.convolve, [_hypergeometric(a.shape[1], x, y) for x, y in sizes])
    shared = np.arange(len(mass))
    union = m.sum() + k.sum() - shared
    index = np.divide(shared, union, out=np.ones(len(mass)), where=union > 0)  # two empty sets agree
    at_least = mass[::-1].cumsum()[::-1]
    high = index[np.searchsorted(mass.cumsum(), 0.975).clip(max=len(mass) - 1)]
    found = int((a & b).sum())
    return Overlap(jaccard(a, b), float(mass @ index), float(high), float(min(1.0, at_least[found])))


def _hypergeometric(total: int, m: int, k: int) -> np.ndarray:
    """Probability of sharing 0, 1, ... min(m, k) of ``total`` neurons; scipy.stats takes a hundred times as long."""
    i = np.arange(min(m, k) + 1)
    ways = _log_choose(m, i) + _log_choose(total - m, k - i) - _log_choose(total, np.array(k))
    return np.exp(ways)


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)  # minus infinity where there is no way
