"""The report on synthetic results whose true effects are known."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from made_up_results import (
    TOPICS,
    capture,
    classifier_result,
    evidence_result,
    patching_result,
    sets_and_contrast,
    stance_result,
    training_result,
    utility_result,
)

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError
from pnlac_fast.reporting import report, style, tables, wording, write_report
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.each_run import run_rows, run_sentence
from pnlac_fast.reporting.page import build
from pnlac_fast.reporting.rows import Estimate
from pnlac_fast.reporting.runs import compared


def seeded(results: list[xr.Dataset]) -> xr.Dataset:
    """Results of several seeds as one."""
    return xr.concat([r.assign_coords(seed=("run", [i] * r.sizes["run"])) for i, r in enumerate(results)], "run")


def read_csv(page: Path, name: str) -> list[dict[str, str]]:
    with (page.parent / "tables" / f"{name}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_all_files_are_written_and_figures_are_large_enough(full: tuple[Path, Path]) -> None:
    folder = full[1].parent
    names = {"shift", "neurons_by_layer", "score_by_layer", "overlap", "patching", "methods", "trajectories", "scorers"}
    names |= {"stability", "patching_curve", "utility", "agreement", "content_leak", "pareto", "doses", "method_shifts"}
    names |= {"sets_by_layer", "drift", "each_run", "attribution"}
    for width, place in ((style.WIDE, folder / "figures"), (style.NARROW, folder / "figures" / "narrow")):
        assert {p.stem for p in place.glob("*.png")} == names
        for path in place.glob("*.png"):
            png = path.read_bytes()
            assert png[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(png[16:20], "big") == round(width * style.DPI)
            assert int.from_bytes(png[20:24], "big") > 300
            assert len(png) > 10_000
    tables_expected = {
        "shift",
        "coupling",
        "general",
        "overlap",
        "neurons_by_layer",
        "patching",
        "methods",
        "trajectories",
        "scorers",
        "judges",
        "agreement",
        "content_leak",
        "stability",
        "patching_curve",
        "utility",
        "method_shifts",
        "each_run",
        "model_overlap",
        "drift",
        "attribution",
    }
    assert {p.stem for p in (folder / "tables").glob("*.csv")} == tables_expected


def test_page_loads_nothing_and_every_image_has_a_description(full: tuple[Path, Path]) -> None:
    html = full[1].read_text(encoding="utf-8")
    loads = re.findall(r'(?:src|srcset)="([^"]*)"', html)
    assert len(loads) == 40
    assert all(address.startswith("data:image/png;base64,") for address in loads)
    links = [a for a in re.findall(r'href="([^"]*)"', html) if not a.startswith("#")]
    assert links == ["https://arxiv.org/abs/2508.02360", "https://arxiv.org/abs/2402.11725"]
    assert html.count("http") == len(links)
    assert not re.search(r"<script|<link|@import|url\(", html)
    assert all(len(alt) > 40 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert html.count("<img ") == html.count("<figcaption>") == 20
    assert "<h1>A title</h1>" in html
    assert "What this store lacks" not in html


def test_shift_and_coupling_tables_equal_a_plain_computation(full: tuple[Path, Path]) -> None:
    stance = stance_result(TOPICS[:3], 6)
    margin, topics = stance["margin"].values, stance["topic"].values
    for row in read_csv(full[1], "shift"):
        run = TOPICS.index(row["tuned_topic"]) + 1
        expected = (margin[run] - margin[0])[topics == row["probe_topic"]].mean()
        assert float(row["shift"]) == pytest.approx(expected, rel=1e-12)
        assert float(row["shift_low"]) < expected < float(row["shift_high"])
        assert row["questions"] == "6"
    found = {row["tuned_topic"]: row for row in read_csv(full[1], "coupling")}
    couplings = []
    for i, tuned in enumerate(TOPICS[:3], 1):
        off = [(margin[i] - margin[0])[topics == t].mean() for t in TOPICS[:3] if t != tuned]
        couplings.append(np.sqrt(np.mean(np.square(off))))
        assert float(found[tuned]["coupling"]) == pytest.approx(couplings[-1], rel=1e-12)
        assert float(found[tuned]["off_topic"]) == pytest.approx(np.mean(off), rel=1e-12)
    assert float(found[""]["coupling"]) == pytest.approx(np.mean(couplings), rel=1e-12)


def test_layer_table_equals_a_plain_computation_from_the_stored_statistics(full: tuple[Path, Path]) -> None:
    contrast, sets = stores.open_contrast(full[0]), sets_and_contrast(TOPICS[:3], layers=3, width=40)[0]
    member = sets["member"].values
    for row in read_csv(full[1], "neurons_by_layer"):
        layer = int(row["layer"])
        general = member[sets["kind"].values == "general"][:, layer].mean()
        assert float(row["general"]) == pytest.approx(general)
        rms = contrast["rms"].values[:, :, 0, 0, layer].astype("f8")
        std = contrast["std_base"].values[:, 0, 0, layer].astype("f8")
        assert float(row["rms_median"]) == pytest.approx(np.median(rms, axis=-1).mean(), rel=1e-6)
        assert float(row["std_rms_top"]) == pytest.approx(np.quantile(rms / std, 0.95, axis=-1).mean(), rel=1e-6)


def test_recovered_fractions_are_those_put_in() -> None:
    rows = {(r.direction, r.neurons): r for r in tables.patch_rows(patching_result(each=40), 200, 0)}
    assert set(rows) == {
        (d, n) for d in ("tuned_into_base", "base_into_tuned") for n in ("general", "specific", "top", "random")
    }
    for direction in ("tuned_into_base", "base_into_tuned"):
        general, random = rows[direction, "general"], rows[direction, "random"]
        assert general.on_topic.value == pytest.approx(0.39, abs=0.01)
        assert general.off_topic.value == pytest.approx(0.54, abs=0.01)
        assert general.off_topic.low < 0.54 < general.off_topic.high
        assert random.draws == len(random.off_topic_draws) == 5
        assert np.mean(random.off_topic_draws) == pytest.approx(random.off_topic.value)


def test_a_sweep_over_sizes_is_not_averaged() -> None:
    result = patching_result(TOPICS[:3], 6, directions=1)
    small = result.sel(run=result["neurons"].values == "general")
    small = small.assign_coords(count=("run", np.full(3, 7)), share=("run", np.full(3, 7 / 1536)))
    rows = tables.patch_rows(xr.concat([result, small], "run"), 50, 0)
    assert [r.count for r in rows if r.neurons == "general"] == [7, 77]


def test_reductions_are_those_put_in_at_equal_shift_though_learning_speeds_differ() -> None:
    methods = {
        "plain": (1.0, 1.0, 30, 1.0, 0),
        "slow_5": (0.9, 1.0, 30, 0.05, 0),
        "specific_10": (1.0, 0.2, 80, 0.03, 2),
    }
    rows, paths = tables.method_rows(training_result(each=30, methods=methods, noise=0.0), 100, 0)
    found = {(r.method, r.comparison): r for r in rows}
    assert found["slow_5", "equal steps"].reduction.value == pytest.approx(0.1, abs=1e-6)
    assert found["slow_5", "equal shift"].reduction.value == pytest.approx(0.0, abs=1e-6)
    assert found["slow_5", "equal steps"].retention.value == pytest.approx(0.9, abs=1e-6)
    assert found["specific_10", "equal shift"].reduction.value == pytest.approx(0.8, abs=1e-6)
    # after 30 of its 80 steps the slower method is not yet where it ends
    assert found["specific_10", "equal steps"].reduction.value > 0.85
    assert len(found["specific_random_10", "equal shift"].reduction_draws) == 2
    assert found["specific_10", "equal shift 60 %"].reduction.value == pytest.approx(0.8, abs=1e-6)
    assert {p.step for p in paths if p.method == "specific_10"} == {0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80}


def test_a_method_is_told_at_the_shift_it_reached() -> None:
    methods = {
        "plain": (1.0, 1.0, 30, 1.0, 0),
        "specific_10": (0.7, 0.4, 80, 0.03, 0),  # ends at 70 % of plain's on-topic shift
        "anchor_5": (1.0, 0.4, 30, 0.05, 0),
    }
    rows, _ = tables.method_rows(training_result(TOPICS[:3], 6, methods), 50, 0)
    found = {(r.method, r.comparison): r for r in rows}
    assert (found["specific_10", "equal shift"].reached, found["specific_10", "equal shift 60 %"].reached) == (0, 3)
    few, both = wording.method_sentences(rows)
    assert "at 60\u00a0% of plain tuning\u2019s on-topic shift." in few
    assert "at 80\u00a0% of plain tuning\u2019s on-topic shift (at 60\u00a0%: 6" in both
    rows, _ = tables.method_rows(training_result(TOPICS[:3], 6, methods | {"freeze_5": (1.0, 1.3, 30, 0.05, 0)}), 50, 0)
    assert "on-topic shift (change at 60\u00a0%: +" in wording.method_sentences(rows)[-1]


def test_intervals_of_methods_cover_seeds_too() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "anchor_5": (1.0, 0.5, 30, 0.05, 0)}
    weaker = methods | {"anchor_5": (1.0, 0.9, 30, 0.05, 0)}
    runs = [training_result(TOPICS[:3], 30, m, noise=0.0) for m in (methods, weaker)]
    rows, _ = tables.method_rows(seeded(runs), 200, 0)
    found = {(r.method, r.comparison): r for r in rows}["anchor_5", "equal shift"]
    assert found.seeds == 2
    assert found.reduction.value == pytest.approx(0.3, abs=1e-6)
    assert (found.reduction.low, found.reduction.high) == pytest.approx((0.1, 0.5), abs=1e-6)
    each = run_rows(compared(seeded(runs), 50, 0)[0])
    assert {(r.seed, round(r.reduction.value, 6), round(r.reduction_60.value, 6)) for r in each} == {
        (0, 0.5, 0.5),
        (1, 0.1, 0.1),
    }
    assert len(each) == 6
    assert re.search(r"is 10\u00a0% \([A-Z][a-z ]+, seed 1\) to 50\u00a0%\.$", run_sentence(each))


def test_every_run_stands_beside_its_own_random_draws() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "specific_10": (1.0, 0.5, 30, 0.03, 2)}
    rows = run_rows(compared(training_result(TOPICS[:3], 6, methods), 50, 0)[0])
    assert [len(r.random_draws) for r in rows] == [2, 2, 2]
    assert all(r.random == pytest.approx(np.mean(r.random_draws)) for r in rows)
    better = sum(r.reduction.value > r.random for r in rows)
    assert f"above the mean of its random draws on {better} of 3." in run_sentence(rows)


def test_shifts_and_fractions_of_several_seeds_are_against_the_base_of_each() -> None:
    stance, patched = stance_result(TOPICS[:3], 20), patching_result(TOPICS[:3], 20)
    moved = stance.assign(margin=stance["margin"] + 5.0)  # another base stands elsewhere, its tuned models move as far
    cells, table = tables.shift_rows(seeded([stance, moved]), 50, 0)
    alone, expected = tables.shift_rows(stance, 50, 0)
    assert [c.shift.value for c in cells] == pytest.approx([c.shift.value for c in alone])
    assert [r.coupling.value for r in table] == pytest.approx([r.coupling.value for r in expected])
    assert {c.runs for c in cells} == {2}
    weaker = patched.assign(margin=patched["margin"] * 0.5)
    both, one = tables.patch_rows(seeded([patched, weaker]), 50, 0), tables.patch_rows(patched, 50, 0)
    assert [r.off_topic.value for r in both] == pytest.approx([r.off_topic.value for r in one])


def test_a_page_of_several_seeds_from_results_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.zarr"
    stores.create_results(path)
    for name, make in (("training", training_result), ("patching", patching_result), ("stance", stance_result)):
        stores.write_result(path, name, seeded([make(TOPICS[:3], 6), make(TOPICS[:3], 6)]))
    page = report(path, tmp_path / "report", boots=50)
    text = page.read_text(encoding="utf-8")
    assert "averaged over tuned topics and two seeds" in text
    assert "Where 2 seeds are in one figure, they are resampled too" in text
    assert not (page.parent / "model_card.md").exists()
    assert {row["seed"] for row in read_csv(page, "each_run")} == {"0", "1"}


def test_plain_is_averaged_over_the_topics_that_other_methods_were_tried_on() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "freeze_5": (1.0, 0.5, 30, 0.05, 0)}
    whole = training_result(each=30, methods=methods, noise=0.0)
    topic = whole["tuned_topic"].values[0]
    one = whole.isel(run=((whole["method"] == "plain") | (whole["tuned_topic"] == topic)).values)
    alone = whole.isel(run=(whole["tuned_topic"] == topic).values)
    assert one.sizes["run"] > alone.sizes["run"]
    assert tables.method_rows(one, 50, 0) == tables.method_rows(alone, 50, 0)


def test_a_method_that_never_reaches_the_shift_has_no_value_there() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "freeze_30": (0.5, 1.0, 30, 0.3, 0)}
    rows, _ = tables.method_rows(training_result(TOPICS[:3], 6, methods), 50, 0)
    found = {(r.method, r.comparison): r for r in rows}
    row = found["freeze_30", "equal shift"]
    assert np.isnan(row.reduction.value)
    assert (row.reached, row.runs) == (0, 3)
    assert "never reached the on-topic shift" in wording.method_sentences(rows)[0]


def test_draws_of_several_seeds_are_means_over_seeds_like_the_bar_beside_them() -> None:
    row = next(
        r for r in tables.patch_rows(seeded([patching_result(), patching_result(each=12)]), 50, 0) if r.draws > 1
    )
    one = next(r for r in tables.patch_rows(patching_result(), 50, 0) if r.draws > 1)
    assert row.off_topic_draws == pytest.approx(one.off_topic_draws)
    whole = patching_result()
    weak = whole.assign(margin=whole["margin"] / 10)  # a seed whose shift is small counts as much as the other
    half = whole.assign(margin=xr.where(whole["neurons"] == "random", 0.0, weak["margin"]).transpose("run", "question"))
    mixed = next(r for r in tables.patch_rows(seeded([whole, half]), 50, 0) if r.neurons == "random")
    assert np.mean(mixed.off_topic_draws) == pytest.approx(mixed.off_topic.value)


RESULTS = {  # what makes each, the section that shows it, the command that adds it, and its figures
    "stance": (stance_result, "shift", "pnlac-fast score", ["shift"]),
    "stance_classifier": (
        classifier_result, "scorers", "pnlac-fast score --scorer logprob --scorer classifier",
        ["scorers", "content_leak"],
    ),
    "evidence": (evidence_result, "stability", "pnlac-fast locate --evidence", ["stability"]),
    "patching": (patching_result, "patching", "pnlac-fast patch", ["patching"]),
    "training": (
        training_result, "methods", "pnlac-fast report --run",
        ["methods", "each_run", "trajectories", "pareto", "doses", "method_shifts"],
    ),
    "utility": (utility_result, "utility", "pnlac-fast utility --store", ["utility"]),
}  # fmt: skip


@pytest.mark.parametrize("present", RESULTS)
def test_what_a_store_lacks_is_left_out_and_its_command_named(present: str, tmp_path: Path) -> None:
    make, key, _, figures = RESULTS[present]
    stores.create_results(tmp_path / "r.zarr")
    stores.write_result(tmp_path / "r.zarr", present, make(TOPICS[:3]))
    page = report(tmp_path / "r.zarr", tmp_path / "out", boots=20)
    html = page.read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="([^"]*)"', html) == [key, "origin", "lacking"]
    assert {p.stem for p in (tmp_path / "out" / "figures").glob("*.png")} == set(figures)
    lacking = html[html.index('<h2 id="lacking"') :]
    whole = {section.key: section.lacking for section in build(Contents("", {}), 20, 0)}
    for name, (_, key, command, _) in RESULTS.items():
        what, told = whole[key][0]
        assert told == command
        assert (f"<td>{what}</td><td><code>{command}</code></td>" in lacking) == (name != present)
    assert "pnlac-fast cache, then pnlac-fast locate" in lacking


def test_statistics_without_neuron_sets_show_the_score_and_name_locate(tmp_path: Path) -> None:
    capture(tmp_path / "c.zarr", TOPICS[:2])
    page = report(tmp_path / "c.zarr", tmp_path / "out", boots=20)
    assert [p.stem for p in (tmp_path / "out" / "figures").glob("*.png")] == ["score_by_layer"]
    assert "<td>general and specific neurons by layer</td>" in page.read_text(encoding="utf-8")


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    stores.create_results(tmp_path / "empty.zarr")
    with pytest.raises(UserError, match="nothing to report yet: run pnlac-fast"):
        report(tmp_path / "empty.zarr", tmp_path / "out")


def test_hostile_names_are_text_on_the_page_and_in_the_figures(tmp_path: Path) -> None:
    bad = ("<script>alert(1)</script>", '" onload="x', "$\\frac{1}$ & co")
    contents = Contents(name="<b>x</b>.zarr", info={}, results={"stance": stance_result(bad, 4)})
    html = write_report(contents, tmp_path, title="<i>t</i>", boots=20).read_text(encoding="utf-8")
    for raw in ("<script>", "<i>", "<b>", '" onload="'):
        assert raw not in html
    assert "&lt;script&gt;" in html


def test_the_same_store_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    stores.create_results(tmp_path / "r.zarr")
    stores.write_result(tmp_path / "r.zarr", "stance", stance_result(TOPICS[:3], 6))
    stores.write_result(tmp_path / "r.zarr", "utility", utility_result(TOPICS[:3]))
    one, two = (report(tmp_path / "r.zarr", tmp_path / name, boots=100) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert (one.parent / "figures/shift.png").read_bytes() == (two.parent / "figures/shift.png").read_bytes()


def test_one_topic_alone_is_reported_without_coupling(tmp_path: Path) -> None:
    results = {"stance": stance_result(TOPICS[:1], 6), "patching": patching_result(TOPICS[:1], 6)}
    results["training"] = training_result(TOPICS[:1], 6)
    page = write_report(Contents(name="one.zarr", info={}, results=results), tmp_path, boots=20)
    assert {p.stem for p in (tmp_path / "tables").glob("*.csv")} == {"shift", "patching"}
    assert "Crime and gun" in page.read_text(encoding="utf-8")


def test_tuning_left_reads_like_tuning_right() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "freeze_5": (0.9, 0.7, 30, 0.05, 0)}
    right = training_result(TOPICS[:3], 6, methods)
    left = right.assign(margin=-right["margin"])
    for ones, others in zip(tables.method_rows(right, 50, 0), tables.method_rows(left, 50, 0), strict=True):
        for one, other in zip(ones, others, strict=True):
            assert one == other
    patched = patching_result(TOPICS[:3], 6)
    assert tables.patch_rows(patched, 50, 0) == tables.patch_rows(patched.assign(margin=-patched["margin"]), 50, 0)


@pytest.mark.parametrize(
    ("on", "off", "words_expected"),
    [
        (3.0, 1.0, "moved the two others by 0."),
        (3.0, 0.0, "was not shown to move the two others"),
        (3.0, -1.0, "the other way"),
        (0.0, 1.0, "was not shown to move that topic itself"),
    ],
)
def test_the_summary_claims_no_more_than_its_interval(on: float, off: float, words_expected: str) -> None:
    cells, rows = tables.shift_rows(stance_result(TOPICS[:3], 40, on, off), 300, 0)
    assert words_expected in wording.shift_sentences(cells, rows, "nats")[0]


def test_a_reduction_within_the_random_draws_is_not_called_better() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "specific_10": (1.0, 0.3, 30, 0.03, 3)}
    rows, _ = tables.method_rows(training_result(each=20, methods=methods), 200, 0)
    sentence = wording.method_sentences(rows)[0]
    assert "reduced coupling by" in sentence
    assert "not shown to beat them" in sentence


def test_numbers_are_written_with_true_minus_and_no_negative_zero() -> None:
    assert wording.number(-0.001) == "0.00"
    assert wording.number(-1.5, 1) == "\u22121.5"
    assert wording.percentage(Estimate(-0.01, -0.06, 0.03)) == "\u22121\u00a0% [\u22126,\u00a03]"
    assert style.percent(0.05) == "5\u00a0%"
    assert style.percent(1.02e-6) == "0.0001\u00a0%"
    assert style.pretty("crime_and_gun") == "Crime and gun"
    assert style.controlled("freeze_random_5") == "freeze_5"


def test_labels_are_spread_without_changing_their_order() -> None:
    placed = style.spread_labels([0.5, 0.5, 0.51, 0.1], 0.1, 0.0, 1.0)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert placed[3] == ordered[0]
    assert placed[0] <= placed[1] <= placed[2]
