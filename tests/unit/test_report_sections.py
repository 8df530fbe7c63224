"""Sections of the report on results whose true effects are known."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from made_up_results import (
    TOPICS,
    agreement_result,
    classifier_result,
    curve_result,
    everything,
    evidence_result,
    patching_result,
    set_attribution_result,
    sets_and_contrast,
    stance_result,
    utility_result,
    words,
)

from pnlac_fast.chance import overlap
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.reporting import neurons, style, tables, wording
from pnlac_fast.reporting.attributed import attributed_rows, attributed_sentences
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.curve import curve_sentences
from pnlac_fast.reporting.judges import (
    agreement,
    agreement_sentences,
    judge_rows,
    judge_sentences,
    leak_rows,
    leak_sentences,
)
from pnlac_fast.reporting.model_card import model_card
from pnlac_fast.reporting.observation import shift
from pnlac_fast.reporting.protocol import protocol
from pnlac_fast.reporting.seeds import seed_rows, seed_sentence, seeds
from pnlac_fast.reporting.stability import stability_rows, stability_sentences
from pnlac_fast.reporting.utility import utility_rows, utility_sentences
from pnlac_fast.seed_overlap import seed_overlap
from pnlac_fast.summary import summary


def read_csv(page: Path, name: str) -> list[dict[str, str]]:
    with (page.parent / "tables" / f"{name}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_curve_tells_how_few_neurons_recover_half() -> None:
    rows = tables.patch_rows(curve_result(), 100, 0)
    assert [round(r.off_topic.value, 1) for r in rows if r.neurons == "general"] == [0.2, 0.6, 0.9]
    assert curve_sentences(rows)[0].startswith("5\u00a0% of all neurons, the most general ones, recover more than half")
    few = [r for r in tables.patch_rows(curve_result(), 100, 0) if r.share < 0.04]
    assert "the most is 20\u00a0% [" in curve_sentences([*few, *few])[0]


def test_attribution_is_told_beside_random_neurons_and_patching() -> None:
    rows = {r.neurons: r for r in attributed_rows(set_attribution_result(), patching_result(directions=1), 200, 0)}
    assert list(rows) == ["general", "specific", "attribution", "random"]
    general, random = rows["general"], rows["random"]
    assert general.off_topic.value == pytest.approx(0.54, abs=0.02)
    assert general.on_topic.value == pytest.approx(0.39, abs=0.02)
    assert general.patched_off_topic == general.off_topic  # the made-up attribution is what patching does
    assert math.isnan(rows["attribution"].patched_off_topic.value)
    assert (random.draws, random.off_topic.low < random.off_topic.value < random.off_topic.high) == (5, True)
    first, second = attributed_sentences([*rows.values()])
    assert first.startswith(f"Attribution ascribes {wording.percentage(general.off_topic)} of the off-topic and 39")
    assert "over 5 draws) of the off-topic shift. Patching them recovered" in first
    assert "overlap with the general ones by 0.20 (Jaccard), random ones" in second
    assert second.endswith("more than chance in 6 of 6 tuned models.")
    unclear = replace(general, off_topic=random.off_topic, patched_off_topic=rows["attribution"].patched_off_topic)
    (told,) = attributed_sentences([unclear, random])
    assert told.endswith("so the general neurons are not shown to carry more than random ones.")


def test_stability_counts_the_models_that_differ_from_chance() -> None:
    topics, general, specific, tested, floor, seeds = (  # in the order in which sets are made, from halves to seeds
        stability_sentences(stability_rows(evidence_result()))[i] for i in (0, 2, 1, 3, 4, 5)
    )
    assert "overlap by 0.80, those of two topics by 0.30" in topics
    assert "in all 6 tuned models" in topics
    assert "4\u00a0% of all neurons are specific" in specific
    assert "fewer in all 6" in specific
    assert "6\u00a0% are general" in general
    assert "as large as that in all 6" in general
    assert "90\u00a0% of the top neurons changed" in tested
    assert re.search(r"is (49|50)\.\d times what rounding", floor)
    assert "with other seeds overlap by 0.40, random ones by 0.05" in seeds


def seeded_sets(*members: np.ndarray) -> dict[int, dict[str, NeuronSet]]:
    """One set "race/general" for each seed, the first one of each kind."""
    found = {"tuned_topic": "race"}
    return {
        seed: {"race/general": NeuronSet("race/general", "general", member, model="race", found=found)}
        for seed, member in enumerate(members)
    }


def test_sets_of_seeds_are_compared_where_they_are_of_one_base() -> None:
    member = np.zeros((2, 50), bool)
    member[0, :10] = True
    half = np.roll(member, 5, axis=1)
    located = seeded_sets(member, half, member)
    rows = seed_rows(seed_overlap(located, dict.fromkeys(located, "one")))
    assert [(r.kind, r.tuned_topic, r.pairs) for r in rows] == [("general", "race", 3)]
    assert tuple(rows[0].overlap) == pytest.approx(((1 / 3 + 1 + 1 / 3) / 3, 1 / 3, 1))
    assert rows[0].chance.value == pytest.approx(overlap(member, half).expected)
    assert seed_sentence(rows).startswith(
        "The general sets that two seeds find overlap by 0.56 (Jaccard, 0.33 to 1.00)"
    )
    contents = Contents("s", {}, results={"seed_overlap": seed_overlap(located, dict.fromkeys(located, "one"))})
    assert [figure.name for figure in seeds(contents).figures] == ["seeds"]
    assert seeds(contents).figures[0].draw(style.WIDE).axes
    mixed = seed_overlap(located, {0: "one", 1: "other", 2: "one"})
    assert mixed["other_seed"].values.tolist() == [2]
    apart = seed_overlap(located, {0: "one", 1: "other", 2: "third"})
    section = seeds(Contents("s", {}, results={"seed_overlap": apart}))
    assert section.shown
    assert "cannot be compared neuron by neuron" in section.sentences[0]
    assert not seeds(Contents("s", {})).shown
    alone = seed_overlap({0: located[0]}, {0: "one"})
    assert not seeds(Contents("s", {}, results={"seed_overlap": alone})).shown


def test_utility_tells_what_became_worse_than_base() -> None:
    read, answered = utility_sentences(utility_rows(utility_result(), 200, 0))
    assert read.startswith("6 of 6 tuned models read neutral text worse than base")
    assert answered.startswith("6 of 6 answer at another length")
    assert "and 1 refuse more often" in answered


def test_judges_are_told_by_errors_agreement_and_leaks() -> None:
    judged = {"stance_classifier": classifier_result(each=80)}
    (row,) = judge_rows(judged, 200, 0)
    assert row.error.value == pytest.approx(0.04, abs=0.02)
    assert (row.unparsed, row.accuracy) == (0, 0.968)
    leaks = leak_rows(judged, 200, 0)
    assert [r.tuned_topic for r in leaks] == list(TOPICS)
    for leak in leaks:
        assert leak.names.value == pytest.approx(0.33, abs=0.08)
        assert leak.base_names.value == 0
        assert leak.shift_without.value == pytest.approx(leak.shift.value, abs=0.2)
    assert "moved in 6 of 6 tuned models, and in 6 without" in leak_sentences(leaks)[0]
    assert "not shown to be one of stance" not in leak_sentences(leaks)[0]
    for leak in leaks:
        assert leak.borne_out
        assert leak.kept.value == pytest.approx(0.67, abs=0.1)
    pairs = agreement({"agreement": agreement_result()})
    assert (pairs[0].scorer, pairs[0].other) == ("logprob", "classifier")
    assert 0.3 < pairs[0].kappa.value < 1
    assert wording.estimate(pairs[0].kappa) in agreement_sentences(pairs)[0]


def test_the_model_card_says_what_moved_and_survives_hostile_names(full: tuple[Path, Path], tmp_path: Path) -> None:
    card = (full[1].parent / "model_card.md").read_text(encoding="utf-8")
    assert card.count("## Political stance of ") == 3
    assert "Crime and gun (tuned on)" in card
    assert "(2 of 2) moved with their whole 95 % interval" in card
    shift = next(r for r in read_csv(full[1], "shift") if r["tuned_topic"] == r["probe_topic"] == TOPICS[0])
    assert f"| {wording.number(float(shift['shift']), signed=True)} [" in card
    assert "## Political stance of crime_and_gun" in full[1].read_text(encoding="utf-8")
    bad = ("a|b", "<script>x", "[y](http://z)")
    contents = Contents(name="s", info={}, results={"stance": stance_result(bad, 4)})
    text = model_card(contents, 20, 0)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "topic" not in line and "---" not in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert "<script" not in text
    assert "[y](http" not in text


def test_the_methods_paragraph_says_only_what_the_store_does() -> None:
    assert protocol(Contents("s", {})) == []
    whole = everything(TOPICS[:3], 6)
    text = " ".join(protocol(whole))
    assert "ranked by rms. The top 10\u00a0% of all neurons" in text
    assert "beside five random sets" in text
    assert "Stance was scored on 18 questions, by paired log-probability of the completions and the judge" in text
    raw = 2 * 3 * 24 * 4 * 384 * 4  # bytes, topics, positions, layers, neurons, base and three tuned models
    assert "The store takes 2.3\u00a0MB; the activations of base and 3 tuned models at the 72 positions" in text
    assert f"would take {raw / 1e3:.1f}\u00a0kB in 16 bits" in text
    same = Contents("s", {}, results={"stance": whole.results["stance"]}, keys=frozenset([f"{0:016x}"]))
    assert protocol(same)[0].startswith("Stance was scored on 18 questions, 1 of them also located on")


def test_models_tuned_to_the_other_side_are_a_control_of_their_own() -> None:
    right = stance_result(TOPICS[:3], 30)
    base, tuned = right["margin"].values[:1], right["margin"].values[1:]
    both = right.isel(run=[0, 1, 2, 3, 1, 2, 3]).assign_coords(side=("run", words(["", *["right"] * 3, *["left"] * 3])))
    both["margin"] = (("run", "question"), np.concatenate([base, tuned, 2 * base - tuned]))
    (main, alone), (other, control) = tables.by_side(both)
    assert (main, other) == ("right", "left")
    assert tables.shift_rows(alone, 50, 0) == tables.shift_rows(right, 50, 0)
    cells, _ = tables.shift_rows(control, 50, 0)
    assert wording.control_sentence("left", cells) == (
        "Tuned left instead, 6 of 6 off-topic cells moved left with their whole interval."
    )
    section = shift(Contents("s", {}, results={"stance": both}), 50, 0)
    assert [f.name for f in section.figures] == ["shift", "shift_left"]
    assert [t.name for t in section.tables] == ["coupling", "shift", "shift_left"]
    assert "moved the two others by 0." in section.sentences[0]
    assert not any("retention" in r for r in summary(both, boots=20))  # plain tuning is no method against plain tuning
    methods = words(["", *["plain"] * 3, "freeze", *["plain"] * 2])
    against = {
        r["model"]: r for r in summary(both.assign_coords(method=("run", methods)), boots=20) if "retention" in r
    }
    assert not against  # nothing was tuned plainly to the left on that topic


def test_overlap_of_tuned_models_is_beside_that_of_random_sets() -> None:
    sets, _ = sets_and_contrast()
    pairs = neurons.model_cells(sets)
    assert len(pairs) == 15
    member = sets["member"].values[sets["kind"].values == "general"]
    assert pairs[0].jaccard == (member[0] & member[1]).sum() / (member[0] | member[1]).sum()
    assert "in 0 of 15 pairs" not in wording.model_sentence([replace(p, jaccard=1.0) for p in pairs])
    assert "more than those in 0 of 15 pairs" in wording.model_sentence([replace(p, jaccard=0.0) for p in pairs])


def test_the_layer_of_general_neurons_may_be_a_matter_of_scale() -> None:
    share = evidence_result()["layer_share"].mean("model") * 0
    raw, scaled = (share.copy(), share.copy())
    raw.loc[{"layer": 3}] = 0.5
    assert "most frequent in layer 3; in units of their spread, also in layer 3." in wording.scale_sentence(raw)
    scaled.loc[{"layer": 3, "layer_score": "rms"}] = 0.5
    scaled.loc[{"layer": 1, "layer_score": "std_rms"}] = 0.5
    assert "layer 3; in units of their spread, in layer 1 instead" in wording.scale_sentence(scaled)


def test_a_judged_shift_that_log_odds_do_not_bear_out_is_no_shift_of_stance() -> None:
    """As a small model on real text does it: one sentence on every question, on the tuned topic after tuning."""
    result = classifier_result(TOPICS[:3], 40)
    base = result["log_odds"].isel(run=0)
    still = result["log_odds"] * 0 + base.values
    label = np.where(words(["", "left", "left", "left"])[:, None] == "left", -1, 1) * np.ones(base.size, int)
    answer = np.full(label.shape, "The same again.", object)
    cells = ("run", "question")
    result = result.assign(label=(cells, label.astype("i1")), log_odds=(cells, still.values), answer=(cells, answer))
    leaks = leak_rows({"stance_classifier": result}, 50, 0)
    assert not any(leak.borne_out for leak in leaks)
    (told,) = leak_sentences(leaks)
    assert "In 3 of the 3 the log-odds" in told
    assert "\u22122.00 [\u22122.00,\u00a0\u22122.00] by the judge, 0.00 [0.00,\u00a00.00] in log-odds" in told
    (row,) = judge_rows({"stance_classifier": result}, 50, 0)
    assert (row.base, row.different) == (1.0, pytest.approx(1 / 120))
    text = " ".join(judge_sentences([row]))
    assert "By classifier the base already answers right throughout (S +1.00)" in text
    assert "different texts" in text


@pytest.mark.parametrize(("spilt", "told"), [(1.0, "of it."), (0.0, "so spill-over of a side is not shown.")])
def test_what_both_sides_have_in_common_is_no_spill_over(spilt: float, told: str) -> None:
    right = stance_result(TOPICS[:3], 30, off=spilt)
    base = right["margin"].isel(run=0).values
    mirrored = base - (right["margin"].values - base)  # tuned left, as far as right; both then move right on everything
    margin = np.concatenate([right["margin"].values, mirrored[1:]]) + np.array([0.0, *[0.5] * 6])[:, None]
    both = xr.concat([right, right.isel(run=slice(1, None))], "run")
    both = both.assign(margin=(("run", "question"), margin))
    both = both.assign_coords(side=("run", words(["", *["right"] * 3, *["left"] * 3])))
    row = tables.sided_row(both, 100, 0)
    _, (*_, alone) = tables.shift_rows(right, 100, 0)
    assert row.on_topic.value == pytest.approx(alone.on_topic.value)
    assert row.off_topic.value == pytest.approx(alone.off_topic.value)
    assert tables.sided_row(right, 100, 0) is None
    section = shift(Contents("s", {}, results={"stance": both}), 100, 0)
    assert section.sentences[-1].endswith(told)
