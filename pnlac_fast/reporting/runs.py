"""Every fine-tune beside the plain one of its topic and seed: what the comparison of methods is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnlac_fast import coupling
from pnlac_fast.errors import UserError
from pnlac_fast.reporting.rows import PathPoint

# Shares of plain tuning's final on-topic shift at which methods are compared; the first is the one that is told first.
EQUAL_SHIFT = {"equal shift": 0.8, "equal shift 60 %": 0.6}


@dataclass(frozen=True, eq=False)
class Compared:
    """One run in one comparison, each figure [draw] with the estimate first; NaN where the run never got there."""

    method: str
    comparison: str
    tuned_topic: str
    seed: int
    draw: int
    share: float
    coupling: np.ndarray
    reduction: np.ndarray
    retention: np.ndarray

    @property
    def reached(self) -> bool:
        """Whether there is a reduction: a run may end before the shift to compare at, and plain may couple nothing.

        One that gets there by its estimate, but not in most resamples of its questions, is not shown to have.
        """
        return bool(coupling.defined(self.reduction))


def compared(training: xr.Dataset, boots: int, seed: int) -> tuple[list[Compared], list[PathPoint]]:
    """Every run at equal steps, at equal on-topic shifts and at its end; and the path of every method.

    Topics whose prompts a KL to base or a null space has seen do not count in its coupling, nor in that of the plain
    run beside it.

    Raises
    ------
    UserError
        The trajectories do not start at step 0.
    """
    steps = training["step"].transpose("run", "point").values
    if (steps[:, 0] != 0).any():
        raise UserError("A training result has no point at step 0, so there is no shift to report: tune again.")
    topics = [str(t) for t in training["topic"].values]
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    margin = training["margin"].transpose("run", "point", "question").values
    methods, tuned = ([str(v) for v in training[name].values] for name in ("method", "tuned_topic"))
    draw, seeds, share = (per_run(training, *n) for n in (("draw", -1), ("seed", 0), ("share", np.nan)))
    seen = [str(t) for t in training["seen_topics"].values] if "seen_topics" in training.coords else [""] * len(methods)
    # Plain runs on topics that no other method was tried on would shift the average that the others are held against.
    tried = {tuned[i] for i in range(len(methods)) if methods[i] != "plain"} or set(tuned)
    runs = [i for i in range(len(methods)) if tuned[i] in tried & set(order) and len(order) > 1]

    def shifts(run: int) -> np.ndarray:
        stance = coupling.stances(margin[run], topics, order, weights=weights)
        return stance - stance[:, :1]

    plain = {(tuned[i], int(seeds[i])): (i, shifts(i)) for i in runs if methods[i] == "plain"}
    by_topic = {topic: pair for (topic, _), pair in reversed(plain.items())}
    found: list[Compared] = []
    points: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for run in runs:
        judged = [i for i, t in enumerate(order) if t == tuned[run] or t not in seen[run].split("+")]
        judged = judged if len(judged) > 1 else list(range(len(order)))  # see pnlac_fast.comparison.as_run
        at = [order[i] for i in judged].index(tuned[run])
        own = shifts(run)[..., judged]
        side = np.sign(_final(own[:1], steps[run])[0, at]) or 1.0
        for point in (steps[run] >= 0).nonzero()[0]:
            here = own[0, point]
            place = points.setdefault((methods[run], int(draw[run]), int(steps[run, point])), [])
            place.append((float(side * here[at]), float(coupling.coupling(here, at))))
        reference = plain.get((tuned[run], int(seeds[run])), by_topic.get(tuned[run]))
        if reference is None:
            continue
        other, ordinary = reference[0], reference[1][..., judged]
        last = min(steps[run].max(), steps[other].max())
        final, whole = _final(own, steps[run]), _final(ordinary, steps[other])
        pairs = {"equal steps": (_at_step(own, steps[run], last), _at_step(ordinary, steps[other], last))}
        for name, goal in EQUAL_SHIFT.items():
            target = goal * whole[:, at]
            pairs[name] = (coupling.at_shift(own, at, target), coupling.at_shift(ordinary, at, target))
        pairs["as trained"] = (final, whole)
        kept = coupling.retention(final, whole, at)
        found += [
            Compared(
                method=methods[run],
                comparison=comparison,
                tuned_topic=tuned[run],
                seed=int(seeds[run]),
                draw=int(draw[run]),
                share=float(share[run]),
                coupling=coupling.coupling(mine, at),
                reduction=coupling.reduction(mine, theirs, at),
                retention=kept,
            )
            for comparison, (mine, theirs) in pairs.items()
        ]
    paths = [PathPoint(m, d, s, *(float(v) for v in np.mean(p, axis=0))) for (m, d, s), p in points.items()]
    return found, paths


def over_runs(samples: Sequence[np.ndarray], seeds: Sequence[int], seed: int) -> np.ndarray:
    """Mean of the figures of several runs, each [draw, ...]: within a seed first, then over the seeds.

    In a resample of the questions a run may lack the figure, NaN; the mean is then that of the others. Where there are
    several seeds, they are resampled as well, see :func:`pnlac_fast.coupling.over_seeds`.
    """
    by_seed = []
    for s in dict.fromkeys(seeds):
        own = np.stack([one for one, of in zip(samples, seeds, strict=True) if of == s])
        known = np.isfinite(own)
        by_seed.append(coupling.over(np.where(known, own, 0.0).sum(0), known.sum(0)))
    return coupling.over_seeds(np.stack(by_seed, 1), seed=seed) if len(by_seed) > 1 else by_seed[0]


def per_run(dataset: xr.Dataset, name: str, default: float) -> np.ndarray:
    """A coordinate of the runs, or ``default`` for each where the Dataset has none."""
    return np.array(dataset[name].values if name in dataset.coords else np.full(dataset.sizes["run"], default))


def _at_step(shift: np.ndarray, steps: np.ndarray, step: int) -> np.ndarray:
    """Shifts [draw, topic] at a step, interpolated between the points of a run."""
    valid = (steps >= 0).nonzero()[0]
    place = int(np.searchsorted(steps[valid], step))
    after = valid[place]
    if steps[after] == step:
        return shift[:, after]
    before = valid[place - 1]
    weight = (step - steps[before]) / (steps[after] - steps[before])
    return shift[:, before] + weight * (shift[:, after] - shift[:, before])


def _final(shift: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return _at_step(shift, steps, steps.max())
