"""Shift, coupling, retention and reduction, with bootstrap intervals over questions. Only numpy.

Every function works on the last axes and keeps the ones before, so that a bootstrap is one more leading axis: draw 0
is the estimate itself, the others are resamples of the questions (see :func:`resamples`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MEASURES = ("margin", "S")


def resamples(topics: Sequence[str], boots: int, seed: int = 0) -> np.ndarray:
    """How often each question counts in each bootstrap draw, float64 [draw, question] with ``boots`` + 1 draws.

    Draw 0 counts every question once. In the others each topic keeps its number of questions. Applying the same draw
    to every model makes all comparisons paired.
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
) -> np.ndarray:
    """Stance per topic.

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

    Returns
    -------
    numpy.ndarray
        [..., topic], or [draw, ..., topic] with weights. NaN margins give NaN.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}")
    value = np.sign(margin) if measure == "S" else np.asarray(margin, float)
    names = np.asarray(topics, dtype=object)
    columns = []
    for topic in order:
        own = names == topic
        if weights is None:
            columns.append(value[..., own].mean(-1))
        else:
            counted = weights[:, own] / weights[:, own].sum(1, keepdims=True)
            columns.append(np.moveaxis(value[..., own] @ counted.T, -1, 0))
    return np.stack(columns, axis=-1)


def off_topic(shift: np.ndarray, tuned: int) -> np.ndarray:
    """Shifts of the topics that were not tuned on, [..., topic - 1]."""
    return np.delete(shift, tuned, axis=-1)


def coupling(shift: np.ndarray, tuned: int) -> np.ndarray:
    """C = sqrt(mean of the squared off-topic shifts), over the last axis of ``shift`` [..., topic]."""
    return np.sqrt(np.mean(off_topic(shift, tuned) ** 2, axis=-1))


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient, NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=np.asarray(whole) != 0)


def coupling_ratio(shift: np.ndarray, tuned: int) -> np.ndarray:
    """Mean off-topic shift, signed, over the on-topic shift."""
    return _over(off_topic(shift, tuned).mean(-1), shift[..., tuned])


def reduction(method: np.ndarray, plain: np.ndarray, tuned: int) -> np.ndarray:
    """1 - C(method) / C(plain), from the shifts [..., topic] of both."""
    return 1 - _over(coupling(method, tuned), coupling(plain, tuned))


def retention(method: np.ndarray, plain: np.ndarray, tuned: int) -> np.ndarray:
    """On-topic shift of a method over that of plain tuning."""
    return _over(method[..., tuned], plain[..., tuned])


def at_shift(trajectory: np.ndarray, tuned: int, target: np.ndarray) -> np.ndarray:
    """Shifts where the on-topic shift first reaches ``target``, interpolated between the points of a run.

    Parameters
    ----------
    trajectory
        [..., point, topic]: shifts along training, starting with zeros at step 0; NaN behind the last point of a run.
    tuned
        Index of the topic tuned on.
    target
        [...]: on-topic shift to reach, with the sign of the tuning.

    Returns
    -------
    numpy.ndarray
        [..., topic]; NaN where the run never reaches the target.
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


def interval(draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Estimate, lower and upper bound, [3, ...], of ``draws`` [draw, ...] whose draw 0 is the estimate.

    Percentile bootstrap. Resamples in which the figure does not exist (a run that never reached the shift) are left
    out; where it exists in under half of them, or not at draw 0, all three are NaN.
    """
    samples = draws[1:]
    defined = np.isfinite(samples)
    enough = np.isfinite(draws[0]) & (defined.mean(0) >= 0.5)
    tail = 100 * (1 - level) / 2
    filled = np.where(enough, samples, 0.0)
    low, high = np.nanpercentile(filled, [tail, 100 - tail], axis=0)
    return np.where(enough, np.stack([draws[0], low, high]), np.nan)
