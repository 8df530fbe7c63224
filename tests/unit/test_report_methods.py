"""Sections of the report that hold methods against each other, on results whose true effects are known."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from made_up_results import (
    METHODS,
    TOPICS,
    classifier_result,
    sets_and_contrast,
    stance_result,
    training_result,
)
from matplotlib.text import Text

from pnlac_fast.reporting import style, tables
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.costs import cost_sentences, costs, tuning_costs
from pnlac_fast.reporting.doses import dose_groups, dose_sentence
from pnlac_fast.reporting.drift import drift, drift_rows, drift_sentences
from pnlac_fast.reporting.each_run import run_rows, run_sentence
from pnlac_fast.reporting.method_shifts import MethodShift, draw_method_shifts, method_shifts
from pnlac_fast.reporting.pareto import front, left, pareto
from pnlac_fast.reporting.rows import Estimate
from pnlac_fast.reporting.runs import EQUAL_SHIFT, Compared


def test_the_front_has_what_nothing_else_beats_in_both() -> None:
    methods = {
        "plain": (1.0, 1.0, 30, 1.0, 0),
        "freeze_5": (0.9, 1.1, 30, 0.05, 0),  # moves less and couples more
        "specific_10": (0.95, 0.2, 80, 0.03, 2),
        "anchor_5": (0.8, 0.1, 30, 0.05, 0),
    }
    rows, paths = tables.method_rows(training_result(each=30, methods=methods, noise=0.0), 100, 0)
    ends = [r for r in rows if r.comparison == "as trained"]
    assert [r.method for r in front(ends)] == ["plain", "specific_10", "anchor_5"]
    specific = next(r for r in ends if r.method == "specific_10")
    assert left(specific).value == pytest.approx(0.95 * 0.2, abs=1e-6)
    assert specific.retention.value == pytest.approx(0.95, abs=1e-6)
    sentence, _ = pareto(rows, paths)
    assert "train only specific (top 10\u00a0%) keeps 95\u00a0% [95,\u00a095] of the on-topic shift" in sentence
    assert "random neurons" not in sentence.lower()
    assert pareto([r for r in rows if r.method == "plain"], paths) is None


def test_random_neurons_that_beat_the_front_are_told() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "specific_10": (0.9, 0.6, 30, 0.03, 2)}
    training = training_result(each=30, methods=methods, noise=0.0)
    lucky = (training["method"] == "specific_random_10").values
    margin = np.where(lucky[:, None, None], training["margin"] * 1.05, training["margin"])
    sentence, _ = pareto(*tables.method_rows(training.assign(margin=(training["margin"].dims, margin)), 50, 0))
    assert sentence.endswith(
        "But random neurons in place of the chosen ones (train only specific (top 10\u00a0%)) beat one of them in both."
    )


def test_a_dose_is_told_by_intervals_that_do_not_meet() -> None:
    methods = {
        "plain": (1.0, 1.0, 30, 1.0, 0),
        "freeze_1": (1.0, 1.0, 30, 0.01, 0),
        "freeze_30": (1.0, 0.5, 30, 0.3, 0),
        "specific_5": (1.0, 0.3, 30, 0.02, 0),
        "specific_10": (1.0, 0.3, 30, 0.04, 0),
        "anchor_5": (1.0, 0.3, 30, 0.05, 0),
    }
    groups = dose_groups(tables.method_rows(training_result(each=30, methods=methods, noise=0.1), 100, 0)[0])
    assert {name: [r.method for r in own] for name, own in groups.items()} == {
        "freeze": ["freeze_1", "freeze_30"],
        "specific": ["specific_5", "specific_10"],
    }
    assert "instead of 1\u00a0% did more: a reduction of " in dose_sentence("freeze", groups["freeze"])
    assert "was not shown to do more or less" in dose_sentence("specific", groups["specific"])


def test_method_shifts_are_those_of_the_last_step_and_differ_from_plain() -> None:
    training = training_result(TOPICS[:3], 6, {n: METHODS[n] for n in ("plain", "specific_10")})
    cells = {(c.method, c.tuned_topic, c.probe_topic): c for c in method_shifts(training, 50, 0)}
    assert len(cells) == 3 * 3 * 3
    margin, topic = training["margin"].values, training["topic"].values
    run = next(i for i, m in enumerate(training["method"].values) if m == "specific_10")
    plain = list(training["method"].values).index("plain")
    assert training["tuned_topic"].values[run] == training["tuned_topic"].values[plain] == TOPICS[0]
    last = (margin[[run, plain], -1] - margin[[run, plain], 0])[:, topic == TOPICS[1]].mean(1)
    cell = cells["specific_10", TOPICS[0], TOPICS[1]]
    assert cell.shift.value == pytest.approx(last[0])
    assert cell.difference.value == pytest.approx(last[0] - last[1])
    assert cells["plain", TOPICS[0], TOPICS[1]].difference.value == 0


def held_still(share: float) -> Contents:
    """A store of a plain model, and of one whose general neurons moved by a share of what they did there."""
    sets, contrast = sets_and_contrast(TOPICS[:2])
    general = sets["member"].values[0]
    rms = contrast["rms"].copy()
    rms[1] = rms[0] * np.where(general, share, 1)
    tuned = {
        TOPICS[0]: {"method": "plain", "tuned_topic": "race"},
        TOPICS[1]: {"method": "anchor", "tuned_topic": "race"},
    }
    return Contents("s", {"provenance": {"tuned": tuned}}, contrast.assign(rms=rms), sets)


@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_titles_of_method_shifts_keep_to_their_own_column(width: float) -> None:
    names = ["plain", "specific_unseen+nullspace+kl_seen", "caft_seen"]  # the longest of a study
    one = Estimate(1.0, 0.5, 1.5)
    cells = [MethodShift(m, tuned, probe, one, one) for m in names for tuned in TOPICS for probe in TOPICS]
    with style.drawing_style():
        figure = draw_method_shifts(cells, names, width, "nats")
        figure.draw_without_rendering()
        written = [t for t in figure.findobj(Text) if re.search("(?i)plain|seen", t.get_text())]
        titles = [t.get_window_extent() for t in written]
    assert len(titles) == 5
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
    assert all(title.x1 <= figure.bbox.x1 for title in titles)


def test_drift_is_the_change_of_held_neurons_over_that_in_plain_tuning() -> None:
    (row,) = drift_rows(held_still(0.25))
    assert (row.model, row.plain, row.method) == (TOPICS[1], TOPICS[0], "anchor")
    assert tuple(row.drift) == pytest.approx((0.25, 0.25, 0.25), rel=1e-5)
    stayed, other = drift_sentences([row])
    assert "hardly moved in \u201cEconomy and inequality\u201d: the median one changed 25\u00a0% as much" in stayed
    assert f"no more than random ones do ({row.overlap:.2f})." in other
    alike = drift_sentences([replace(row, model=f"m{i}", overlap=0.4 + i / 10, chance=0.1) for i in range(5)])
    assert alike[1] == (
        "The general neurons are partly the same in five models: they overlap by 0.40 to 0.80, random ones by 0.10."
    )
    assert "still moved in \u201cEconomy" in drift_sentences(drift_rows(held_still(0.9)))[0]
    away = drift_sentences([row, replace(row, model="kl", drift=Estimate(0.4, 0.3, 0.6), overlap=0.0)])
    assert "still moved in \u201cKl\u201d: the median one changed 40\u00a0%" in away[1]
    assert away[2].endswith(
        "and \u201cKl\u201d: they overlap with those of plain tuning no more than random ones do (0.00"
        f" to {row.overlap:.2f})."
    )
    assert "in \u201cEconomy and inequality\u201d:" in away[0]
    alike = drift_sentences([replace(row, model=f"m{i}", overlap=0.4 + i / 10, chance=0.1) for i in range(5)])
    assert alike[1] == (
        "The general neurons are partly the same in five models: they overlap by 0.40 to 0.80, random ones by 0.10."
    )
    section = drift(held_still(0.25))
    assert [figure.name for figure in section.figures] == ["drift"]
    assert len(section.figures[0].draw(style.NARROW).axes) == 2


def test_drift_is_not_ruled_by_neurons_that_hardly_vary() -> None:
    contents = held_still(0.25)
    held = np.argwhere(contents.sets["member"].values[0])
    std, rms = contents.contrast["std_base"].copy(), contents.contrast["rms"].copy()
    for layer, neuron in held[: len(held) // 8]:  # they move much more than in plain tuning, in tiny units
        std[..., layer, neuron] = 1e-6
        rms[1, ..., layer, neuron] = 10 * rms[0, ..., layer, neuron]
    (row,) = drift_rows(replace(contents, contrast=contents.contrast.assign(rms=rms, std_base=std)))
    assert tuple(row.drift) == pytest.approx((0.25, 0.25, 0.25), rel=1e-5)


def test_costs_are_medians_over_runs_and_a_step_is_held_against_that_of_plain() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "specific_10": (1.0, 0.3, 80, 0.04, 2)}
    training = training_result(TOPICS[:3], 4, methods)
    plain = (training["method"] == "plain").values
    device = np.where(plain, 3e9, np.nan)  # a run that was recorded on a CPU
    timed = {"seconds": 7.0 + plain, "seconds_per_step": np.where(plain, 0.2, 0.1), "device_bytes": device}
    timed["process_bytes"] = np.full(len(plain), 2e9)
    training = training.assign_coords({name: ("run", values) for name, values in timed.items()})
    assert tuning_costs(training_result(TOPICS[:3], 4, methods)) == []
    rows = {r.method: r for r in tuning_costs(training)}
    assert (rows["plain"].runs, rows["plain"].seconds, rows["plain"].device_bytes) == (3, 8.0, 3e9)
    specific = rows["specific_10"]
    assert (specific.steps, specific.over_plain, specific.seconds, specific.process_bytes) == (80, 0.5, 7.0, 2e9)
    assert rows["specific_random_10"].runs == 6
    assert math.isnan(specific.device_bytes)
    assert "0.50 for train only specific (top 10\u00a0%)." in cost_sentences([*rows.values()])[0]
    cost = {"seconds": 2.5, "process_bytes": 10**9}
    results = {"training": training, "stance": stance_result(TOPICS[:3], 4).assign_attrs(cost=cost)}
    results["stance_classifier"] = classifier_result(TOPICS[:3], 4).assign_attrs(cost=cost)
    contents = Contents("s", {"bytes": 4_200_000}, results=results)
    section = costs(contents)
    assert [t.name for t in section.tables] == ["cost_tuning", "cost_work"]
    assert section.tables[1].cells == [
        ["Scoring", "2.5", "1.0\u00a0GB", "\u2013", "\u2013"],
        ["The store", *["\u2013"] * 3, "4.2\u00a0MB"],
    ]
    assert not costs(Contents("s", {"bytes": 1})).shown


def test_a_shift_that_most_resamples_do_not_reach_is_not_reached() -> None:
    """By its estimate a run may just get there; the table of methods and that of runs then say the same of it."""
    runs = [
        Compared("anchor_5", comparison, topic, 0, -1, 0.05, coupling=figures, reduction=figures, retention=np.ones(5))
        for topic, figures in (
            ("race", np.array([0.8, 0.7, 0.9, np.nan, np.nan])),
            ("science", np.array([0.1, 0.2, np.nan, np.nan, np.nan])),
        )
        for comparison in EQUAL_SHIFT
    ]
    assert [one.reached for one in runs] == [True, True, False, False]
    (row, _), rows = tables.over_methods(runs, 0), run_rows(runs)
    assert (row.reached, row.runs, row.reduction.value) == (1, 2, 0.8)
    assert math.isnan(rows[1].reduction.value)
    assert "80\u00a0% to 80\u00a0%, on 1 of 2 runs that reached it" in run_sentence(rows).replace(" (Race)", "")
