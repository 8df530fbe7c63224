"""Sections on what was done: patched activations, and fine-tuning with neurons held back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pnlac_fast.reporting import effects, style, tables, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.curve import curve
from pnlac_fast.reporting.doses import doses
from pnlac_fast.reporting.each_run import each_run
from pnlac_fast.reporting.method_shifts import method_shifts, shown_shifts
from pnlac_fast.reporting.pareto import pareto
from pnlac_fast.reporting.rows import MethodRow, PatchRow, PathPoint
from pnlac_fast.reporting.runs import EQUAL_SHIFT, compared
from pnlac_fast.reporting.sections import Section, Shown, Table, absent, unit_of

CURVE_COMMAND = "pnlac-fast patch --shares 1%,3%,10% --store"


def patching(contents: Contents, boots: int, seed: int) -> Section:
    """Recovered fraction of the shift by set of neurons."""
    key, title = "patching", "What copying their activations does"
    rows = tables.patch_rows(contents.results["patching"], boots, seed) if "patching" in contents.results else []
    if not rows:
        return absent(key, title, "pnlac-fast patch")
    sentences = wording.patch_sentences(rows)
    kind = rows[0].kind
    main = [r for r in rows if r.kind == kind]
    figure = Shown(
        "patching",
        (sentences[0] if sentences else "Recovered fraction of the shift by set of neurons.")
        + " 100 % is the shift of the tuned model; whiskers are 95 % intervals, ticks single random draws.",
        "Bars of the recovered fraction. "
        + "; ".join(
            f"{r.neurons} ({effects.DIRECTIONS.get(r.direction, r.direction)}): "
            f"on-topic {wording.percentage(r.on_topic)}, off-topic {wording.percentage(r.off_topic)}"
            for r in main
        )
        + ".",
        lambda width: effects.draw_patching(main, width),
    )
    figures, shown, lacking = [figure], [_patch_table(rows)], []
    points = contents.results.get("patching_curve")
    if points is not None and (along := tables.patch_rows(points, boots, seed)):
        told, line, every = curve(along)
        sentences, figures, shown = [*sentences, *told], [*figures, line], [*shown, every]
    else:
        lacking.append(("recovered fraction against the number of neurons", CURVE_COMMAND))
    return Section(key, title, sentences, figures, shown, lacking)


def _patch_table(rows: Sequence[PatchRow]) -> Table:
    header = ["Neurons", "Direction", "Patch", "Share of all", "On-topic", "Off-topic", "Draws"]
    cells = []
    for r in rows:
        where = effects.DIRECTIONS.get(r.direction, r.direction)
        parts = ((r.on_topic, r.on_topic_draws), (r.off_topic, r.off_topic_draws))
        values = [wording.draws_range(drawn) if drawn else wording.percentage(value) for value, drawn in parts]
        cells.append([style.set_label(r.neurons), where, r.kind, style.percent(r.share), *values, str(r.draws)])
    caption = (
        "Recovered fraction of the fine-tuning shift, pooled over tuned topics. Of random neurons, mean, least and "
        "most of their draws."
    )
    return Table("patching", caption, header, cells, rows, words=3)


def methods(contents: Contents, boots: int, seed: int) -> Section:
    """Coupling of every method at equal steps and at equal on-topic shift, and its path."""
    key, title = "methods", "What keeps the other topics still"
    training = contents.results.get("training")
    if training is None:
        return absent(key, title, "pnlac-fast report --run")
    found, paths = compared(training, boots, seed)
    rows = tables.over_methods(found, seed)
    if not rows:  # nothing to compare with
        return absent(key, title, "pnlac-fast report --run PLAIN")
    unit, seeds = unit_of(training), len({one.seed for one in found})
    sentences = wording.method_sentences(rows)
    goal = " and ".join(style.percent(share) for share in sorted(EQUAL_SHIFT.values()))
    best = _best(rows)
    sentences = [best, *sentences] if len(sentences) > 1 else sentences
    bars = Shown(
        "methods",
        f"{best} After equally many steps, and where each run first reaches {goal} of plain tuning\u2019s "
        "final on-topic shift. Percentages: change of coupling against plain tuning, averaged over tuned topics"
        f"{' and ' + wording.count(seeds) + ' seeds' if seeds > 1 else ''}.",
        "Coupling of each method. " + "; ".join(_method_text(r) for r in rows if not style.is_control(r.method)) + ".",
        lambda width: effects.draw_methods(rows, width, unit),
    )
    line = Shown(
        "trajectories",
        "Coupling against on-topic shift while training proceeds, mean over tuned topics. At a given on-topic shift, "
        "lower is better: a method that only learns more slowly runs along the line of plain tuning.",
        "One line a method from the origin, coupling against on-topic shift. "
        + "; ".join(_path_text(m, paths) for m in dict.fromkeys(p.method for p in paths) if not style.is_control(m))
        + ".",
        lambda width: effects.draw_paths(paths, width, unit),
    )
    trail_header = ["Method", "Draw", "Step", "On-topic shift", "Coupling"]
    trail = [
        [
            p.method,
            str(p.draw) if p.draw >= 0 else "",
            str(p.step),
            wording.number(p.on_topic),
            wording.number(p.coupling),
        ]
        for p in paths
    ]
    extra = Table("trajectories", "Every point of the trajectories", trail_header, trail, paths, folded=True)
    figures, shown = [bars, line], [_method_table(rows, unit), extra]
    if (ends := pareto(rows, paths)) is not None:
        sentences = [*sentences, ends[0]]
        figures.append(ends[1])
    if (every_run := each_run(found)) is not None:
        sentences += every_run[0]
        figures.insert(1, every_run[1])
        shown.append(every_run[2])
    lacking = []
    if (sizes := doses(rows)) is not None:
        sentences += sizes[0]
        figures.append(sizes[1])
    else:
        lacking.append(("dose response: one method with several shares of neurons", "pnlac-fast sweep"))
    if cells := method_shifts(training, boots, seed):
        maps, every = shown_shifts(cells, unit)
        figures.append(maps)
        shown.append(every)
    return Section(key, title, sentences, figures, shown, lacking)


def _best(rows: Sequence[MethodRow]) -> str:
    goal = style.percent(EQUAL_SHIFT["equal shift"])
    tried = [
        r
        for r in rows
        if r.comparison == "equal shift"
        and r.method != "plain"
        and not style.is_control(r.method)
        and r.reduction.sign > 0
    ]
    if not tried:
        return f"No method was shown to reduce coupling at {goal} of plain tuning\u2019s on-topic shift."
    top = max(tried, key=lambda r: r.reduction.value)
    label = style.method_label(top.method)
    cut = wording.percentage(top.reduction)
    return (
        f"The largest reduction at {goal} of plain tuning\u2019s on-topic shift, {cut}, is that of \u201c{label}\u201d."
    )


def _method_text(row: MethodRow) -> str:
    return f"{style.method_label(row.method)}, {row.comparison}: {wording.number(row.coupling.value)}"


def _path_text(method: str, paths: Sequence[PathPoint]) -> str:
    last = [p for p in paths if p.method == method][-1]
    return f"{style.method_label(method)} ends at {wording.number(last.on_topic)}, {wording.number(last.coupling)}"


def _method_table(rows: Sequence[MethodRow], unit: str) -> Table:
    at = [f"at {style.percent(share)} of plain\u2019s shift" for share in EQUAL_SHIFT.values()]
    header = ["Method", "Share of all", "Reduction, equal steps", *(f"Reduction, {goal}" for goal in at)]
    header += [f"Coupling, {at[0]} [{unit}]", "Retention", "Runs"]
    cells = []
    for method in dict.fromkeys(r.method for r in rows):
        steps, shift, *others = (
            next(r for r in rows if r.method == method and r.comparison == c) for c in ("equal steps", *EQUAL_SHIFT)
        )
        label = style.method_label(method)
        reached = f"{shift.reached} of {shift.runs}" if shift.reached < shift.runs else str(shift.runs)
        cut = ["" if method == "plain" else wording.percentage(r.reduction) for r in (steps, shift, *others)]
        share = style.percent(shift.share) if math.isfinite(shift.share) and shift.share > 0 else ""
        values = [wording.estimate(shift.coupling), wording.percentage(shift.retention), reached]
        cells.append([wording.sentence_case(label), share, *cut, *values])
    goal = style.percent(EQUAL_SHIFT["equal shift"])
    caption = (
        "Reduction is 1 \u2212 C(method) / C(plain); retention the final on-topic shift over that of plain tuning. "
        f"Runs counts tuned topics, seeds and random draws; \u201c4 of 6\u201d means that four reached {goal} of it."
    )
    return Table("methods", caption, header, cells, rows)
