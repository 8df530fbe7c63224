"""Sections on what was observed: the shift, where the neurons are, how far topics and tuned models agree on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pnlac_fast.reporting import heatmaps, neurons, style, tables, wording
from pnlac_fast.reporting import layers as layer_figures
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.rows import CouplingRow, ModelPair, ShiftCell
from pnlac_fast.reporting.sections import Section, Shown, Table, absent, unit_of


def shift(contents: Contents, boots: int, seed: int) -> Section:
    """Shift of every probe topic by tuned topic, and coupling."""
    key, title = "shift", "How far tuning on one topic moves the others"
    stance = contents.results.get("stance")
    if stance is None or stance.sizes["run"] < 2:
        return absent(key, title, "pnlac-fast score")
    unit = unit_of(stance)
    sided = tables.sided_row(stance, boots, seed)
    (_, stance), *opposite = tables.by_side(stance)
    cells, table = tables.shift_rows(stance, boots, seed)
    sentences = wording.shift_sentences(cells, table, unit)
    finding = sentences[0] if sentences else "Shift of every probe topic."
    figure = Shown(
        "shift",
        f"{finding} Mean over questions of the change in log P(right) \u2212 log P(left); brackets (where there "
        "is room, and in the table) are 95 % intervals; outlined cells are the topic tuned on.",
        "Heat map of the shift of each probe topic after tuning on each topic. " + _cell_text(cells, unit),
        lambda width: heatmaps.draw_shift(cells, width, unit),
    )
    shown = [_coupling_table(table, unit)] if table else []
    figures, shown = [figure], [*shown, _shift_table(cells, unit)]
    for side, control in opposite:
        other, rows = tables.shift_rows(control, boots, seed)
        told, against, every = _control(side, other, rows, unit)
        sentences, figures, shown = [*sentences, told], [*figures, against], [*shown, every]
    if sided is not None:
        sentences.append(wording.sided_sentence(sided, unit))
    return Section(key, title, sentences, figures, shown)


def _control(side: str, cells: Sequence[ShiftCell], rows: Sequence[CouplingRow], unit: str) -> tuple[str, Shown, Table]:
    """What models tuned to the opposite side did: their sentence, heat map and table."""
    moved = wording.control_sentence(side, cells)
    figure = Shown(
        f"shift_{side}",
        f"{moved} The same questions, models tuned {side}.",
        f"Heat map of the shift after tuning {side}. " + _cell_text(cells, unit),
        lambda width: heatmaps.draw_shift(cells, width, unit),
    )
    return moved, figure, replace(_shift_table(cells, unit), name=f"shift_{side}", caption=f"Every cell, tuned {side}")


def _cell_text(cells: Sequence[ShiftCell], unit: str) -> str:
    on = [c.shift.value for c in cells if c.tuned_topic == c.probe_topic]
    off = [c.shift.value for c in cells if c.tuned_topic != c.probe_topic]
    parts = [(f"on-topic {_span(on)}", on), (f"off-topic {_span(off)}", off)]
    return ", ".join(text for text, values in parts if values) + f" {unit}."


def _span(values: Sequence[float]) -> str:
    return f"{wording.number(min(values), signed=True)} to {wording.number(max(values), signed=True)}" if values else ""


def _coupling_table(table: Sequence[CouplingRow], unit: str) -> Table:
    several = len({r.method for r in table}) > 1
    header = ["Tuned on", f"On-topic shift [{unit}]", "Mean off-topic shift", "Coupling", "Off-topic / on-topic"]
    cells = []
    for r in table:
        name = style.pretty(r.tuned_topic) if r.tuned_topic else "All, mean"
        cells.append(([wording.sentence_case(style.method_label(r.method))] if several else []) + [name])
        cells[-1] += [wording.estimate(e) for e in (r.on_topic, r.off_topic, r.coupling, r.ratio)]
    return Table(
        "coupling",
        "Coupling is the root mean square of the off-topic shifts; the last column is their signed mean over the "
        "on-topic shift. 95 % intervals in brackets.",
        (["Method"] if several else []) + header,
        cells,
        table,
        words=2 if several else 1,
    )


def _shift_table(cells: Sequence[ShiftCell], unit: str) -> Table:
    shown = [
        [
            style.pretty(c.tuned_topic),
            style.pretty(c.probe_topic),
            wording.estimate(c.shift, signed=True),
            str(c.questions),
        ]
        for c in cells
    ]
    header = ["Tuned on", "Probe topic", f"Shift [{unit}]", "Questions"]
    return Table("shift", "Every cell of the heat map", header, shown, cells, words=2, folded=True)


def layers(contents: Contents) -> Section:
    """General and specific neurons by layer, and the score by layer."""
    key, title = "layers", "Where the neurons are"
    if contents.sets is None and contents.contrast is None:
        return absent(key, title, "pnlac-fast cache, then pnlac-fast locate")
    rows = neurons.layer_rows(contents.sets, contents.contrast)
    figures, lacking, sentences, shown_tables = [], [], [], []
    if contents.sets is not None:
        general = neurons.general_rows(contents.sets)
        strict = neurons.how_found(contents.sets).get("specific", "strict") == "strict"
        sentences = wording.neuron_sentences(general)
        peak = max(rows, key=lambda r: r.general)
        averaged = f", averaged over {wording.count(len(general))} tuned models (whiskers: least and most)"
        figures.append(
            Shown(
                "neurons_by_layer",
                f"General neurons are most frequent in layer {peak.layer} ({style.percent(peak.general)} of it). "
                f"Share of each layer{averaged if len(general) > 1 else ''}; dashes: independent top sets.",
                "Bars by layer. General: "
                + "; ".join(f"layer {r.layer} {style.percent(r.general)}" for r in rows[:12])
                + ". Specific: "
                + "; ".join(f"layer {r.layer} {style.percent(r.specific)}" for r in rows[:12])
                + ".",
                lambda width: layer_figures.draw_neurons(rows, general, strict, width),
            )
        )
    else:
        lacking.append(("general and specific neurons by layer", "pnlac-fast locate"))
    if contents.contrast is not None:
        raw, relative = (max(rows, key=lambda r: getattr(r, f"{n}_median")).layer for n in ("rms", "std_rms"))
        agree = f"also in layer {relative}" if raw == relative else f"in layer {relative} instead"
        figures.append(
            Shown(
                "score_by_layer",
                f"The raw change is largest in layer {raw}; relative to each neuron\u2019s spread, {agree}. "
                "Median and 95th percentile over the neurons of a layer, averaged over tuned models and probe topics.",
                "Two panels by layer: root mean square change of the activation, raw and divided by the base model's "
                f"standard deviation. Largest medians in layers {raw} and {relative}.",
                lambda width: layer_figures.draw_scores(rows, width),
            )
        )
    else:
        lacking.append(("the score by layer", "pnlac-fast cache"))
    evidence = contents.results.get("evidence")
    if evidence is not None:
        share = evidence["layer_share"].mean("model")
        told = wording.scale_sentence(share)
        figures.append(
            Shown(
                "sets_by_layer",
                f"{told} Share of each layer in the top sets, and in all of them, when neurons are ranked by their raw "
                "change and by their change in units of their own spread; dashes: the same share in every layer.",
                f"Share of each layer by ranking. {told}",
                lambda width: layer_figures.draw_rankings(share, width),
            )
        )
        sentences = [*sentences, told]
    else:
        lacking.append(("neurons by layer, ranked raw and scale-normalised", "pnlac-fast locate --evidence"))
    header = ["Layer", "General", "Specific", "rms, median", "95th pct.", "rms / std, median", "95th pct."]
    cells = [
        [str(r.layer), style.percent(r.general), style.percent(r.specific)]
        + [wording.number(v, 3) for v in (r.rms_median, r.rms_top, r.std_rms_median, r.std_rms_top)]
        for r in rows
    ]
    shown_tables.append(Table("neurons_by_layer", "Every layer", header, cells, rows, folded=True))
    return Section(key, title, sentences, figures, shown_tables, lacking)


def overlap(contents: Contents) -> Section:
    """Overlap of the topics' top sets and the general share, beside chance."""
    key, title = "overlap", "How far the topics agree on the neurons"
    cells = neurons.overlap_cells(contents.sets) if contents.sets is not None else []
    if contents.sets is None or len(cells) < 4:
        return absent(key, title, "pnlac-fast locate")
    general = neurons.general_rows(contents.sets)
    between = [c.jaccard for c in cells if c.topic != c.other_topic]
    chance = cells[0].chance
    finding = (
        f"The top sets of two topics overlap by {np.mean(between):.2f} on average (Jaccard, {min(between):.2f} to "
        f"{max(between):.2f}); independent sets of this size would overlap by {chance:.3f}."
    )
    figure = Shown(
        "overlap",
        f"{finding} Averaged over tuned models.",
        f"Matrix of Jaccard overlaps between topics, {min(between):.2f} to {max(between):.2f}, chance {chance:.3f}.",
        lambda width: heatmaps.draw_overlap(cells, general, width),
    )
    pairs = neurons.model_cells(contents.sets)
    sentences, shown_tables = [finding], []
    if pairs:
        sentences.append(wording.model_sentence(pairs))
        shown_tables.append(_model_table(pairs))
    header = ["Tuned model", "Top set", "General", "by chance", "Specific", "by chance"]
    shown = [
        [style.pretty(r.model)]
        + [style.percent(v) for v in (r.top, r.general, r.chance_general, r.specific, r.chance_specific)]
        for r in general
    ]
    caption = (
        "Shares of all neurons. Chance: independent top sets of the same size, k to the power of the number of topics."
    )
    extra = Table(
        "overlap",
        "Every pair of topics",
        ["Topic", "Other topic", "Jaccard", "Chance"],
        [[style.pretty(c.topic), style.pretty(c.other_topic), f"{c.jaccard:.3f}", f"{c.chance:.3f}"] for c in cells],
        cells,
        words=2,
        folded=True,
    )
    tables_ = [Table("general", caption, header, shown, general), extra, *shown_tables]
    return Section(key, title, sentences, [figure], tables_)


def _model_table(pairs: Sequence[ModelPair]) -> Table:
    header = ["Tuned model", "Other model", "Jaccard", "Random", "97.5 % of random"]
    cells = [
        [style.pretty(p.model), style.pretty(p.other), *(f"{v:.3f}" for v in (p.jaccard, p.chance, p.chance_high))]
        for p in pairs
    ]
    caption = "General sets of every pair of tuned models, beside random sets with the same counts in every layer"
    return Table("model_overlap", caption, header, cells, pairs, words=2, folded=True)
