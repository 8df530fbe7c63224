"""From the store's Datasets to the rows of the report; all statistics come from :mod:`pnlac_fast.coupling`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from pnlac_fast import coupling
from pnlac_fast.errors import UserError
from pnlac_fast.reporting import style
from pnlac_fast.reporting.rows import (
    MISSING,
    CouplingRow,
    Estimate,
    MethodRow,
    PatchRow,
    PathPoint,
    ScoreRow,
    ShiftCell,
)

EQUAL_SHIFT = 0.8  # of plain tuning's final on-topic shift, where methods are compared


def texts(dataset: xr.Dataset, name: str, default: str = "") -> list[str]:
    """A coordinate as strings; `default` for every run where the Dataset has no such coordinate."""
    if name not in dataset.coords:
        return [default] * dataset.sizes["run"]
    return [str(v) for v in dataset[name].values]


def _numbers(dataset: xr.Dataset, name: str, default: float) -> np.ndarray:
    return np.array(dataset[name].values if name in dataset.coords else np.full(dataset.sizes["run"], default))


def _estimate(draws: np.ndarray) -> Estimate:
    return Estimate(*(float(v) for v in coupling.interval(draws)))


def _mean(samples: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(samples, axis=0)


def _stances(dataset: xr.Dataset, boots: int, seed: int, measure: str = "margin") -> tuple[np.ndarray, list[str]]:
    """Stance [draw, run, topic] and the order of the topics."""
    topics = texts(dataset, "topic")
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    return coupling.stances(_values(dataset), topics, order, weights=weights, measure=measure), order


def _values(dataset: xr.Dataset) -> np.ndarray:
    """Margins or labels [run, question]."""
    return dataset["margin" if "margin" in dataset else "label"].transpose("run", "question").values


def _base_run(dataset: xr.Dataset) -> int:
    names = texts(dataset, "model")
    if "base" not in names:
        raise UserError("A stance result lacks the base model, so there is no shift: run pnlac-fast score again.")
    return names.index("base")


def shift_rows(stance: xr.Dataset, boots: int, seed: int) -> tuple[list[ShiftCell], list[CouplingRow]]:
    """Shift of every probe topic per tuned topic (plain tuning where there is any), and coupling of every model."""
    draws, order = _stances(stance, boots, seed)
    base = _base_run(stance)
    shift = draws - draws[:, [base]]
    methods = [m or "plain" for m in texts(stance, "method")]
    rows = [t or n for t, n in zip(texts(stance, "tuned_topic"), texts(stance, "model"), strict=True)]
    counts = {t: int((stance["topic"].values == t).sum()) for t in order}
    runs = [i for i in range(len(rows)) if i != base]
    shown = "plain" if any(methods[i] == "plain" for i in runs) else methods[runs[0]] if runs else ""
    cells = []
    for tuned in sorted(dict.fromkeys(rows[i] for i in runs if methods[i] == shown), key=_position(order)):
        mine = [i for i in runs if rows[i] == tuned and methods[i] == shown]
        for at, probe in enumerate(order):
            cells.append(ShiftCell(tuned, probe, _estimate(shift[:, mine, at].mean(1)), counts[probe], len(mine)))
    table = []
    for method in dict.fromkeys(methods[i] for i in runs):
        groups = {t: [i for i in runs if rows[i] == t and methods[i] == method] for t in order}
        parts = [_coupling_draws(shift, groups[t], order.index(t)) for t in order if groups[t] and len(order) > 1]
        names = [t for t in order if groups[t]]
        for name, part in zip(names, parts, strict=False):
            table.append(CouplingRow(method, name, *map(_estimate, part)))
        if len(parts) > 1:
            table.append(CouplingRow(method, "", *(_estimate(_mean(p)) for p in zip(*parts, strict=True))))
    return cells, table


def by_side(dataset: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    """The base model with the models tuned to each side, most models first, so that no average mixes opposite shifts.

    Models whose side is not known stand with the first.
    """
    sides, base = texts(dataset, "side"), _base_run(dataset)
    found = sorted({s for i, s in enumerate(sides) if s and i != base}, key=lambda s: (-sides.count(s), s != "right"))
    if len(found) < 2:
        return [("".join(found), dataset)]
    parts = []
    for side in found:
        taken = (side, "") if side == found[0] else (side,)
        parts.append((side, dataset.isel(run=[i for i, s in enumerate(sides) if i == base or s in taken])))
    return parts


def _coupling_draws(shift: np.ndarray, runs: list[int], at: int) -> tuple[np.ndarray, ...]:
    own = [shift[:, i] for i in runs]
    return (
        _mean([s[:, at] for s in own]),
        _mean([coupling.off_topic(s, at).mean(-1) for s in own]),
        _mean([coupling.coupling(s, at) for s in own]),
        _mean([coupling.coupling_ratio(s, at) for s in own]),
    )


def _position(order: list[str]) -> Callable[[str], int]:
    return lambda name: order.index(name) if name in order else len(order)


def patch_rows(patching: xr.Dataset, boots: int, seed: int) -> list[PatchRow]:
    """Recovered fraction per direction, kind of patch and set of neurons, over all tuned topics."""
    draws, order = _stances(patching, boots, seed)
    tuned, neurons = texts(patching, "tuned_topic"), texts(patching, "neurons")
    keys = list(zip(texts(patching, "direction", "tuned_into_base"), texts(patching, "kind", "tuned"), strict=True))
    models = [m or t for m, t in zip(texts(patching, "model"), tuned, strict=True)]
    draw = _numbers(patching, "draw", -1)
    count, share = _numbers(patching, "count", 0), _numbers(patching, "share", np.nan)
    ends: dict[tuple[str, str, str], int] = {}
    for i, name in enumerate(neurons):
        if name in ("none", "tuned"):
            ends[keys[i][0], models[i], name] = i
    # A sweep over sizes has several runs of one name: the n-th size of every tuned model belongs together.
    groups: dict[tuple[str, str, str, int], list[int]] = {}
    seen: dict[tuple[str, str, str, str, int], int] = {}
    for i in np.argsort(count, kind="stable"):
        if neurons[i] in ("none", "tuned") or tuned[i] not in order:
            continue
        same = (*keys[i], neurons[i], models[i], int(draw[i]))
        level = seen[same] = seen.get(same, -1) + 1
        groups.setdefault((*keys[i], neurons[i], level), []).append(int(i))
    rows = []
    for (direction, kind, name, _), runs in groups.items():
        pairs = [(i, ends[direction, models[i], "none"], ends[direction, models[i], "tuned"]) for i in runs]
        numbers = sorted({int(draw[i]) for i in runs})
        whole = _recovered(draws, pairs, tuned, order)
        each = [_recovered(draws[:1], [p for p in pairs if draw[p[0]] == n], tuned, order) for n in numbers]
        rows.append(
            PatchRow(
                direction=direction,
                kind=kind,
                neurons=name,
                share=float(share[runs].mean()),
                count=round(float(count[runs].mean())),
                draws=len(numbers),
                on_topic=_estimate(whole[0]),
                off_topic=_estimate(whole[1]),
                on_topic_draws=tuple(float(e[0][0]) for e in each) if len(numbers) > 1 else (),
                off_topic_draws=tuple(float(e[1][0]) for e in each) if len(numbers) > 1 else (),
            )
        )
    rank = {"general": 0, "specific": 1, "top": 2}
    rows.sort(key=lambda r: (r.direction != "tuned_into_base", r.kind != "tuned", r.kind, rank.get(r.neurons, 3)))
    return rows


def _recovered(
    draws: np.ndarray, pairs: list[tuple[int, int, int]], tuned: list[str], order: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Fractions [draw] on and off topic: moved over to be moved, each summed over the tuned topics."""
    moved = np.zeros((2, 2, len(draws)))
    for run, none, source in pairs:
        at = order.index(tuned[run])
        whole = draws[:, source] - draws[:, none]
        side = np.sign(whole[0, at])  # models tuned right and left may stand in one store
        for part, shift in enumerate((draws[:, run] - draws[:, none], whole)):
            moved[part, 0] += side * shift[:, at]
            moved[part, 1] += side * coupling.off_topic(shift, at).mean(-1) if len(order) > 1 else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return moved[0, 0] / moved[1, 0], moved[0, 1] / moved[1, 1]


def method_rows(training: xr.Dataset, boots: int, seed: int) -> tuple[list[MethodRow], list[PathPoint]]:
    """Every method beside plain tuning of its topic: at equal steps, at equal on-topic shift, at its end; its path.

    Topics whose prompts a KL to base has seen do not count in its coupling, nor in that of the plain run beside it.
    """
    steps = training["step"].transpose("run", "point").values
    if (steps[:, 0] != 0).any():
        raise UserError("A training result has no point at step 0, so there is no shift to report: tune again.")
    topics = texts(training, "topic")
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    margin = training["margin"].transpose("run", "point", "question").values
    methods, tuned = texts(training, "method"), texts(training, "tuned_topic")
    draw, share = _numbers(training, "draw", -1), _numbers(training, "share", np.nan)
    names = np.array(methods, dtype=object)
    # Plain runs on topics that no other method was tried on would shift the average that the others are held against.
    tried = {tuned[i] for i in range(len(methods)) if methods[i] != "plain"} or set(tuned)
    runs = [i for i in range(len(methods)) if tuned[i] in tried & set(order) and len(order) > 1]

    def shifts(run: int) -> np.ndarray:
        stance = coupling.stances(margin[run], topics, order, weights=weights)
        return stance - stance[:, :1]

    seeds = _numbers(training, "seed", 0)
    plain = {(tuned[i], int(seeds[i])): (i, shifts(i)) for i in runs if methods[i] == "plain"}
    by_topic = {topic: pair for (topic, _), pair in reversed(plain.items())}
    found: dict[str, dict[str, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]]] = {}
    points: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    seen = texts(training, "kl_topics")
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
        target = EQUAL_SHIFT * _final(ordinary, steps[other])[:, at]
        for comparison, mine, theirs in (
            ("equal steps", _at_step(own, steps[run], last), _at_step(ordinary, steps[other], last)),
            ("equal shift", coupling.at_shift(own, at, target), coupling.at_shift(ordinary, at, target)),
            ("as trained", _final(own, steps[run]), _final(ordinary, steps[other])),
        ):
            kept = coupling.retention(_final(own, steps[run]), _final(ordinary, steps[other]), at)
            sample = (coupling.coupling(mine, at), coupling.reduction(mine, theirs, at), kept)
            found.setdefault(methods[run], {}).setdefault(comparison, []).append((int(draw[run]), *sample))
    rows = [
        _method_row(method, comparison, found[method][comparison], float(share[names == method].mean()))
        for method in found
        for comparison in found[method]
    ]
    paths = [PathPoint(m, d, s, *(float(v) for v in np.mean(p, axis=0))) for (m, d, s), p in points.items()]
    return rows, paths


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


def _method_row(
    method: str, comparison: str, found: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]], share: float
) -> MethodRow:
    reached = [f for f in found if np.isfinite(f[2][0])]
    numbers = sorted({f[0] for f in reached})
    several = style.is_control(method) and len(numbers) > 1
    coupled = [float(np.mean([f[1][0] for f in reached if f[0] == n])) for n in numbers]
    reduced = [float(np.mean([f[2][0] for f in reached if f[0] == n])) for n in numbers]
    return MethodRow(
        method=method,
        comparison=comparison,
        share=share,
        runs=len(found),
        reached=len(reached),
        draws=len({f[0] for f in found}),
        coupling=_estimate(_mean([f[1] for f in reached])) if reached else MISSING,
        reduction=_estimate(_mean([f[2] for f in reached])) if reached else MISSING,
        retention=_estimate(_mean([f[3] for f in found])),
        coupling_draws=tuple(coupled) if several else (),
        reduction_draws=tuple(reduced) if several else (),
    )


def scorer_name(scorer: str) -> str:
    """A scorer as a reader would call it."""
    return "log-probability" if scorer == "logprob" else scorer


def score_rows(results: Mapping[str, xr.Dataset], boots: int, seed: int) -> list[ScoreRow]:
    """Stance S = (R - L) / (R + L + N) per probe topic and scorer: base, tuned on it, tuned on another topic."""
    rows = []
    for name, whole in results.items():
        if name != "stance" and not name.startswith("stance_"):
            continue
        scorer = scorer_name(str(whole.attrs.get("scorer", "logprob" if name == "stance" else name[7:])))
        dataset = by_side(whole)[0][1]
        draws, order = _stances(dataset, boots, seed, measure="S")
        values = _values(dataset)
        base, tuned, methods = _base_run(dataset), texts(dataset, "tuned_topic"), texts(dataset, "method")
        topics = np.array(texts(dataset, "topic"), dtype=object)
        plain = [i for i in range(len(tuned)) if i != base and tuned[i] and methods[i] in ("", "plain")]
        for at, topic in enumerate(order):
            for after, runs in (
                ("base", [base]),
                ("this topic", [i for i in plain if tuned[i] == topic]),
                ("another topic", [i for i in plain if tuned[i] != topic]),
            ):
                if runs:
                    missing = float((values[np.ix_(runs, topics == topic)] == 0).mean())
                    rows.append(ScoreRow(scorer, topic, after, _estimate(draws[:, runs, at].mean(1)), missing))
    return rows
