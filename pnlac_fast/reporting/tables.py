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
from pnlac_fast.reporting.runs import Compared, compared, per_run


def texts(dataset: xr.Dataset, name: str, default: str = "") -> list[str]:
    """A coordinate as strings; `default` for every run where the Dataset has no such coordinate."""
    if name not in dataset.coords:
        return [default] * dataset.sizes["run"]
    return [str(v) for v in dataset[name].values]


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
    draw = per_run(patching, "draw", -1)
    count, share = per_run(patching, "count", 0), per_run(patching, "share", np.nan)
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
    """Every method beside plain tuning of its topic, see :func:`pnlac_fast.reporting.runs.compared`; its path.

    Intervals resample questions, and where there are several seeds also these (:func:`coupling.over_seeds`).
    """
    found, paths = compared(training, boots, seed)
    share = per_run(training, "share", np.nan)
    names = np.array(texts(training, "method"), dtype=object)
    groups: dict[str, dict[str, list[Compared]]] = {}
    for one in found:
        groups.setdefault(one.method, {}).setdefault(one.comparison, []).append(one)
    rows = [
        _method_row(method, comparison, runs, float(share[names == method].mean()), seed)
        for method, by_comparison in groups.items()
        for comparison, runs in by_comparison.items()
    ]
    return rows, paths


def _method_row(method: str, comparison: str, found: list[Compared], share: float, seed: int) -> MethodRow:
    reached = [one for one in found if one.reached]
    draws = sorted({one.draw for one in reached})
    several = style.is_control(method) and len(draws) > 1
    coupled = [float(np.mean([one.coupling[0] for one in reached if one.draw == n])) for n in draws]
    reduced = [float(np.mean([one.reduction[0] for one in reached if one.draw == n])) for n in draws]
    return MethodRow(
        method=method,
        comparison=comparison,
        share=share,
        runs=len(found),
        reached=len(reached),
        draws=len({one.draw for one in found}),
        seeds=len({one.seed for one in found}),
        coupling=_over_runs(reached, "coupling", seed),
        reduction=_over_runs(reached, "reduction", seed),
        retention=_over_runs(found, "retention", seed),
        coupling_draws=tuple(coupled) if several else (),
        reduction_draws=tuple(reduced) if several else (),
    )


def _over_runs(runs: Sequence[Compared], figure: str, seed: int) -> Estimate:
    """The mean over tuned topics and random draws, then over seeds."""
    if not runs:
        return MISSING
    seeds = dict.fromkeys(one.seed for one in runs)
    by_seed = [_mean([getattr(one, figure) for one in runs if one.seed == s]) for s in seeds]
    return _estimate(coupling.over_seeds(np.stack(by_seed, 1), seed=seed) if len(by_seed) > 1 else by_seed[0])


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
