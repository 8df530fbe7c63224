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
from pnlac_fast.reporting.runs import Compared, compared, over_runs, per_run


def texts(dataset: xr.Dataset, name: str, default: str = "") -> list[str]:
    """A coordinate as strings; `default` for every run where the Dataset has no such coordinate."""
    if name not in dataset.coords:
        return [default] * dataset.sizes["run"]
    return [str(v) for v in dataset[name].values]


def _estimate(draws: np.ndarray) -> Estimate:
    return Estimate(*(float(v) for v in coupling.interval(draws)))


def _stances(dataset: xr.Dataset, boots: int, seed: int, measure: str = "margin") -> tuple[np.ndarray, list[str]]:
    """Stance [draw, run, topic] and the order of the topics."""
    topics = texts(dataset, "topic")
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    return coupling.stances(_values(dataset), topics, order, weights=weights, measure=measure), order


def _values(dataset: xr.Dataset) -> np.ndarray:
    """Margins or labels [run, question]."""
    return dataset["margin" if "margin" in dataset else "label"].transpose("run", "question").values


def _bases(dataset: xr.Dataset) -> list[int]:
    """For each run that of its base model: where several bases, by seed, are in one result, the base of its seed."""
    names, seeds = texts(dataset, "model"), per_run(dataset, "seed", 0)
    bases = {int(seeds[i]): i for i, name in reversed([*enumerate(names)]) if name == "base"}
    if not bases or not set(map(int, seeds)) <= set(bases):
        raise UserError("A stance result lacks the base model, so there is no shift: run pnlac-fast score again.")
    return [bases[int(s)] for s in seeds]


def shift_rows(stance: xr.Dataset, boots: int, seed: int) -> tuple[list[ShiftCell], list[CouplingRow]]:
    """Shift of every probe topic per tuned topic (plain tuning where there is any), and coupling of every model."""
    draws, order = _stances(stance, boots, seed)
    bases, seeds = _bases(stance), [int(s) for s in per_run(stance, "seed", 0)]
    shift = draws - draws[:, bases]
    methods = [m or "plain" for m in texts(stance, "method")]
    rows = [t or n for t, n in zip(texts(stance, "tuned_topic"), texts(stance, "model"), strict=True)]
    counts = {t: int((stance["topic"].values == t).sum()) for t in order}
    runs = [i for i in range(len(rows)) if i not in bases]
    shown = "plain" if any(methods[i] == "plain" for i in runs) else methods[runs[0]] if runs else ""
    cells = []
    for tuned in sorted(dict.fromkeys(rows[i] for i in runs if methods[i] == shown), key=_position(order)):
        mine = [i for i in runs if rows[i] == tuned and methods[i] == shown]
        for at, probe in enumerate(order):
            mean = over_runs([shift[:, i, at] for i in mine], [seeds[i] for i in mine], seed)
            cells.append(ShiftCell(tuned, probe, _estimate(mean), counts[probe], len(mine)))
    table = []
    for method in dict.fromkeys(methods[i] for i in runs):
        groups = {t: [i for i in runs if rows[i] == t and methods[i] == method] for t in order}
        parts = {}
        for t, own in groups.items():
            if own and len(order) > 1:
                found = _coupling_draws(shift, own, order.index(t))
                parts[t] = [over_runs(figure, [seeds[i] for i in own], seed) for figure in found]
        table += [CouplingRow(method, t, *map(_estimate, part)) for t, part in parts.items()]
        if len(parts) > 1:
            means = (np.mean(figure, axis=0) for figure in zip(*parts.values(), strict=True))
            table.append(CouplingRow(method, "", *map(_estimate, means)))
    return cells, table


def sided_row(stance: xr.Dataset, boots: int, seed: int) -> CouplingRow | None:
    """The part of the shifts that has a side: half of right-tuned minus left-tuned, over the topics tuned to both.

    What tuning does whatever the side, to length or wording, cancels. None where no topic was plainly tuned to both.
    """
    draws, order = _stances(stance, boots, seed)
    shift, seeds = draws - draws[:, _bases(stance)], [int(s) for s in per_run(stance, "seed", 0)]
    runs = zip(*(texts(stance, n) for n in ("tuned_topic", "side", "method")), seeds, strict=True)
    found = {(t, s, side): i for i, (t, side, m, s) in enumerate(runs) if t in order and m in ("", "plain")}
    both = [(t, s) for t, s, side in found if side == "right" and (t, s, "left") in found]
    if not both or len(order) < 2:
        return None
    half = [((shift[:, found[t, s, "right"]] - shift[:, found[t, s, "left"]]) / 2, order.index(t)) for t, s in both]
    figures = zip(*((f[0] for f in _coupling_draws(own[:, None], [0], at)) for own, at in half), strict=True)
    of = [s for _, s in both]
    return CouplingRow("plain", "", *(_estimate(over_runs(figure, of, seed)) for figure in figures))


def by_side(dataset: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    """The base model with the models tuned to each side, most models first, so that no average mixes opposite shifts.

    Models whose side is not known stand with the first.
    """
    sides, bases = texts(dataset, "side"), _bases(dataset)
    found = sorted(
        {s for i, s in enumerate(sides) if s and i not in bases}, key=lambda s: (-sides.count(s), s != "right")
    )
    if len(found) < 2:
        return [("".join(found), dataset)]
    parts = []
    for side in found:
        taken = (side, "") if side == found[0] else (side,)
        parts.append((side, dataset.isel(run=[i for i, s in enumerate(sides) if i in bases or s in taken])))
    return parts


def _coupling_draws(shift: np.ndarray, runs: list[int], at: int) -> tuple[list[np.ndarray], ...]:
    """On-topic shift, off-topic shift, coupling and ratio [draw] of every run on one tuned topic."""
    own = [shift[:, i] for i in runs]
    return (
        [s[:, at] for s in own],
        [coupling.off_topic(s, at).mean(-1) for s in own],
        [coupling.coupling(s, at) for s in own],
        [coupling.coupling_ratio(s, at) for s in own],
    )


def _position(order: list[str]) -> Callable[[str], int]:
    return lambda name: order.index(name) if name in order else len(order)


def patch_rows(patching: xr.Dataset, boots: int, seed: int) -> list[PatchRow]:
    """Recovered fraction per direction, kind of patch and set of neurons, pooled over tuned topics, mean over seeds."""
    draws, order = _stances(patching, boots, seed)
    tuned, neurons = texts(patching, "tuned_topic"), texts(patching, "neurons")
    keys = list(zip(texts(patching, "direction", "tuned_into_base"), texts(patching, "kind", "tuned"), strict=True))
    seeds = [int(s) for s in per_run(patching, "seed", 0)]
    models = [(m or t, s) for m, t, s in zip(texts(patching, "model"), tuned, seeds, strict=True)]
    draw = per_run(patching, "draw", -1)
    count, share = per_run(patching, "count", 0), per_run(patching, "share", np.nan)
    ends: dict[tuple[str, tuple[str, int], str], int] = {}
    for i, name in enumerate(neurons):
        if name in ("none", "tuned"):
            ends[keys[i][0], models[i], name] = i
    # A sweep over sizes has several runs of one name: the n-th size of every tuned model belongs together.
    groups: dict[tuple[str, str, str, int], list[int]] = {}
    seen: dict[tuple[str, str, str, tuple[str, int], int], int] = {}
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
        of = list(dict.fromkeys(seeds[i] for i in runs))
        parts = [_recovered(draws, [p for p in pairs if seeds[p[0]] == s], tuned, order) for s in of]
        whole = [over_runs([part[n] for part in parts], of, seed) for n in (0, 1)]
        each = np.array(
            [
                [
                    _recovered(draws[:1], [p for p in pairs if (draw[p[0]], seeds[p[0]]) == (n, s)], tuned, order)
                    for s in of
                ]
                for n in numbers
            ]
        ).mean((1, 3))  # [draw, part]
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
                on_topic_draws=tuple(map(float, each[:, 0])) if len(numbers) > 1 else (),
                off_topic_draws=tuple(map(float, each[:, 1])) if len(numbers) > 1 else (),
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
    """Every method beside plain tuning of its topic, see :func:`over_methods`; and its path."""
    found, paths = compared(training, boots, seed)
    return over_methods(found, seed), paths


def over_methods(found: Sequence[Compared], seed: int) -> list[MethodRow]:
    """A row for each method and comparison, from :func:`pnlac_fast.reporting.runs.compared`.

    Intervals resample questions, and where there are several seeds also these (:func:`coupling.over_seeds`).
    """
    groups: dict[str, dict[str, list[Compared]]] = {}
    for one in found:
        groups.setdefault(one.method, {}).setdefault(one.comparison, []).append(one)
    return [
        _method_row(method, comparison, runs, seed)
        for method, by_comparison in groups.items()
        for comparison, runs in by_comparison.items()
    ]


def _method_row(method: str, comparison: str, found: list[Compared], seed: int) -> MethodRow:
    reached = [one for one in found if one.reached]
    draws = sorted({one.draw for one in reached})
    several = style.is_control(method) and len(draws) > 1
    coupled = [float(np.mean([one.coupling[0] for one in reached if one.draw == n])) for n in draws]
    reduced = [float(np.mean([one.reduction[0] for one in reached if one.draw == n])) for n in draws]
    return MethodRow(
        method=method,
        comparison=comparison,
        share=float(np.mean([one.share for one in found])),
        runs=len(found),
        reached=len(reached),
        draws=len({one.draw for one in found}),
        seeds=len({one.seed for one in found}),
        coupling=_over(reached, "coupling", seed),
        reduction=_over(reached, "reduction", seed),
        retention=_over(found, "retention", seed),
        coupling_draws=tuple(coupled) if several else (),
        reduction_draws=tuple(reduced) if several else (),
    )


def _over(runs: Sequence[Compared], figure: str, seed: int) -> Estimate:
    """The mean over tuned topics, random draws and seeds."""
    if not runs:
        return MISSING
    return _estimate(over_runs([getattr(one, figure) for one in runs], [one.seed for one in runs], seed))


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
        bases, tuned, methods = _bases(dataset), texts(dataset, "tuned_topic"), texts(dataset, "method")
        topics = np.array(texts(dataset, "topic"), dtype=object)
        seeds = [int(s) for s in per_run(dataset, "seed", 0)]
        plain = [i for i in range(len(tuned)) if i not in bases and tuned[i] and methods[i] in ("", "plain")]
        for at, topic in enumerate(order):
            for after, runs in (
                ("base", sorted(set(bases))),
                ("this topic", [i for i in plain if tuned[i] == topic]),
                ("another topic", [i for i in plain if tuned[i] != topic]),
            ):
                if runs:
                    own = over_runs([draws[:, i, at] for i in runs], [seeds[i] for i in runs], seed)
                    missing = float((values[np.ix_(runs, topics == topic)] == 0).mean())
                    rows.append(ScoreRow(scorer, topic, after, _estimate(own), missing))
    return rows
