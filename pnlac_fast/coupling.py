"""Shift, coupling, retention and reduction, with bootstrap intervals over questions. Only numpy.

Every function works on the last axes and keeps the ones before, so that a bootstrap is one more leading axis: draw 0
is the estimate itself, the others are resamples of the questions (see :func:`resamples`). Shifts are in nats or in S,
whichever the stances are in that they are differences of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MEASURES = ("margin", "S")


def resamples(topics: Sequence[str], boots: int, seed: int = 0) -> np.ndarray:
    """How often each question counts in each bootstrap draw, float64 [draw, question] with ``boots`` + 1 draws.

    Draw 0 counts every question once. The others are a bootstrap (Efron 1979, doi 10.1214/aos/1176344552) within
    topics: each keeps its number of questions. Applying the same draw to every model makes all comparisons paired.

    Parameters
    ----------
    topics
        Of each question.
    boots, seed
        How many draws besides draw 0, and their seed.

    Returns
    -------
    numpy.ndarray
        float64 [draw, question], how often each counts.
    """
    generator = np.random.default_rng(seed)
    names = np.asarray(topics, dtype=object)
    weights = np.ones((boots + 1, len(names)))
    for topic in dict.fromkeys(topics):
        members = (names == topic).nonzero()[0]
        n = len(members)
        weights[1:, members] = generator.multinomial(n, np.full(n, 1 / n), size=boots)
    return weights


def stances(
    margin: np.ndarray,
    topics: Sequence[str],
    order: Sequence[str],
    *,
    weights: np.ndarray | None = None,
    measure: str = "margin",
    counted: np.ndarray | None = None,
) -> np.ndarray:
    """Stance per topic: the mean margin (ours), or S as in arXiv 2402.11725.

    Parameters
    ----------
    margin
        [..., question]: log-odds of right against left in nats, or labels +1, -1, 0.
    topics, order
        Topic of each question, and the topics in the order of the result.
    weights
        [draw, question] from :func:`resamples`; adds a leading draw axis.
    measure
        "margin": mean margin, nats. "S": (R - L) / (R + L + N) in [-1, 1], by the sign of the margin; N counts
        questions without a side (margin 0).
    counted
        bool [..., question]: which values count, all by default.

    Returns
    -------
    numpy.ndarray
        [..., topic], or [draw, ..., topic] with weights, in nats, or S. NaN margins, and topics of which nothing
        counts, give NaN.

    Raises
    ------
    ValueError
        There is no such measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}")
    value = np.sign(margin) if measure == "S" else np.asarray(margin, float)
    names = np.asarray(topics, dtype=object)
    drawn = np.ones((1, len(names))) if weights is None else weights
    if counted is not None:
        value = np.where(counted, value, 0.0)
    columns = []
    for topic in order:
        own = names == topic
        total = value[..., own] @ drawn[:, own].T
        n = drawn[:, own].sum(1) if counted is None else counted[..., own] @ drawn[:, own].T
        columns.append(np.moveaxis(over(total, n), -1, 0))
    found = np.stack(columns, axis=-1)
    return found[0] if weights is None else found


def off_topic(shift: np.ndarray, tuned: int) -> np.ndarray:
    """Return the shifts [..., topic - 1] of the topics that were not tuned on, in nats or S as they are given.

    ``shift`` is [..., topic], ``tuned`` the index of the topic tuned on.
    """
    return np.delete(shift, tuned, axis=-1)


def coupling(shift: np.ndarray, tuned: int) -> np.ndarray:
    """Return C = sqrt(mean of the squared off-topic shifts), [...], of ``shift`` [..., topic], both in nats or S.

    ``tuned`` is the index of the topic tuned on. The measure is ours.
    """
    return np.sqrt(np.mean(off_topic(shift, tuned) ** 2, axis=-1))


def over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return the ratio ``part`` / ``whole``, [...], NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=np.asarray(whole) != 0)


def coupling_ratio(shift: np.ndarray, tuned: int) -> np.ndarray:
    """Return the ratio of the mean off-topic shift to the on-topic one, [...], signed (ours).

    ``shift`` is [..., topic], in nats or S, ``tuned`` the index of the topic tuned on.
    """
    return over(off_topic(shift, tuned).mean(-1), shift[..., tuned])


def reduction(method: np.ndarray, plain: np.ndarray, tuned: int) -> np.ndarray:
    """Return 1 - C(method) / C(plain), [...], the share of plain's coupling that a method saves: see :func:`coupling`.

    ``method`` and ``plain`` are shifts [..., topic], both in nats or S, ``tuned`` is the index of the topic tuned on.
    """
    return 1 - over(coupling(method, tuned), coupling(plain, tuned))


def retention(method: np.ndarray, plain: np.ndarray, tuned: int) -> np.ndarray:
    """Return the ratio of the on-topic shifts of ``method`` and ``plain``, [...] (ours).

    Both are shifts [..., topic], in nats or S, ``tuned`` is the index of the topic tuned on.
    """
    return over(method[..., tuned], plain[..., tuned])


def at_shift(trajectory: np.ndarray, tuned: int, target: np.ndarray) -> np.ndarray:
    """Shifts where the on-topic shift first reaches ``target``, interpolated between the points of a run (ours).

    Parameters
    ----------
    trajectory
        [..., point, topic]: shifts along training, in nats or S, starting with zeros at step 0; NaN behind the last
        point of a run.
    tuned
        Index of the topic tuned on.
    target
        [...]: on-topic shift to reach, in nats or S as the trajectory, with the sign of the tuning.

    Returns
    -------
    numpy.ndarray
        [..., topic], in the unit of the trajectory; NaN where the run never reaches the target.
    """
    target = np.broadcast_to(np.asarray(target, float), trajectory.shape[:-2])
    on = trajectory[..., tuned] * np.sign(target)[..., None]
    goal = np.abs(target)[..., None]
    reached = on >= goal
    after = np.maximum(reached.argmax(-1), 1)[..., None]
    low, high = (np.take_along_axis(on, after - i, -1) for i in (1, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.clip((goal - low) / (high - low), 0, 1)
    before, behind = (np.take_along_axis(trajectory, (after - i)[..., None], -2)[..., 0, :] for i in (1, 0))
    return np.where(reached.any(-1)[..., None], before + weight * (behind - before), np.nan)


def over_seeds(draws: np.ndarray, axis: int = 1, seed: int = 0) -> np.ndarray:
    """The mean over seeds, whose draws resample the seeds too: draw b takes as many seeds, with replacement.

    Questions (from :func:`resamples`, already in ``draws``) and seeds are crossed: every seed answers the same
    questions, so one draw counts a question equally often in all of them. Both are resampled independently, the
    pigeonhole bootstrap (Owen 2007, doi 10.1214/07-AOAS122), which errs on the wide side. The mean over three seeds
    can take ten values in a draw: with so few, an interval is a rough one.

    Calls with the same number of draws and seeds and the same ``seed`` draw the same seeds. Figures of two methods are
    paired in this way: their difference is ``over_seeds(a) - over_seeds(b)``, or ``over_seeds(a - b)``, the same.

    Parameters
    ----------
    draws
        [draw, ...] with the seeds along ``axis``: any figure, in any unit; draw 0 is the estimate. NaN where a seed
        lacks the figure.

    Returns
    -------
    numpy.ndarray
        [draw, ...] without ``axis``, in the unit of ``draws``. NaN in draws that took a seed which lacks the figure.
    """
    moved = np.moveaxis(draws, axis, 1)
    n = moved.shape[1]
    counts = np.ones((len(moved), n))
    counts[1:] = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=len(moved) - 1)
    counts = counts.reshape(*counts.shape, *[1] * (moved.ndim - 2))
    return np.where(counts > 0, counts * moved, 0.0).sum(1) / n


def difference(method: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Paired difference of two methods' draws of one figure, and the two-sided share of draws on the other side of 0.

    Parameters
    ----------
    method, other
        [draw, ...]: the figure of each, in one unit, from the same resamples.

    Returns
    -------
    numpy.ndarray
        [4, ...]: estimate, lower and upper bound of the 95 % interval (see :func:`interval`), in the unit of the
        figure, and a bootstrap p-value: twice the smaller share of draws at or beyond zero, at most 1 and at least
        2 / draws.
    """
    draws = method - other
    beyond = np.minimum((draws[1:] <= 0).mean(0), (draws[1:] >= 0).mean(0))
    estimate = interval(draws)
    p = np.clip(2 * beyond, 2 / max(len(draws) - 1, 1), 1.0)
    return np.concatenate([estimate, np.where(np.isnan(estimate[0]), np.nan, p)[None]])


def defined(draws: np.ndarray) -> np.ndarray:
    """Return whether a figure exists by its estimate and in at least half of the resamples (ours).

    Parameters
    ----------
    draws
        [draw, ...], in any unit, whose draw 0 is the estimate; NaN where there is no figure.

    Returns
    -------
    numpy.ndarray
        bool [...]: there is the estimate, and the figure in a share of 0.5 of the resamples or more.
    """
    known = np.isfinite(draws)
    return np.asarray(known[0] & (known[1:].mean(0) >= 0.5))


def interval(draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return estimate, lower and upper bound, [3, ...], of ``draws`` [draw, ...] whose draw 0 is the estimate.

    They are in the unit of ``draws``. Percentile bootstrap (Efron and Tibshirani 1993, doi 10.1201/9780429246593);
    ``level`` is the share of the resamples between the bounds. Resamples in which the figure does not exist (a run that
    never reached the shift) are left out; where it exists in under half of them, or not at draw 0, all three are NaN.
    """
    samples, enough = draws[1:], defined(draws)
    tail = 100 * (1 - level) / 2
    filled = np.where(enough, samples, 0.0)
    low, high = np.nanpercentile(filled, [tail, 100 - tail], axis=0)
    return np.where(enough, np.stack([draws[0], low, high]), np.nan)
