"""Margins against a plain computation, for any batch, padding and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast import scoring
from pnlac_fast import store as stores
from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.generation import generate
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.scoring import judged, score
from pnlac_fast.stance import margins
from pnlac_fast.summary import known_answers, summary
from pnlac_fast.topic_words import topic_words


def plain_margin(model: Model, question: Question, normalise: str) -> float:
    """One sequence at a time, no padding, float64 softmax over all logits."""
    differences = []
    for right, left in zip(question.right, question.left, strict=True):
        values = []
        for text in (right, left):
            prompt = model.tokenizer(question.instruction)["input_ids"]
            answer = model.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model.hf(input_ids=torch.tensor([prompt + answer])).logits[0].double()
            chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])
            values.append(float(chosen.sum()) / (len(answer) if normalise == "token" else 1))
        differences.append(values[0] - values[1])
    return float(np.mean(differences))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("normalise", ["token", "sum"])
def test_margins_equal_a_plain_computation(model_paths, questions, kind: str, normalise: str) -> None:
    model = load_model(model_paths[kind], dtype="float64", device="cpu")
    expected = [plain_margin(model, q, normalise) for q in questions]
    assert np.allclose(margins(model, questions, normalise=normalise), expected, rtol=1e-6, atol=1e-9)


def test_batch_size_does_not_matter(model_paths, questions) -> None:
    model = load_model(model_paths["llama"], dtype="float64", device="cpu")
    alone = margins(model, questions, batch_tokens=1)
    assert np.allclose(margins(model, questions, batch_tokens=10_000), alone, rtol=1e-6, atol=1e-9)


def test_score_names_runs_and_summary_reports_every_topic(model_paths, adapter_paths, questions) -> None:
    result = score(model_paths["llama"], adapter_paths, questions)
    assert list(result["model"].values) == ["base", "race", "science"]
    assert list(result["tuned_topic"].values) == ["", "race", "science"]
    base = load_model(model_paths["llama"])
    assert np.allclose(result["margin"][0], margins(base, questions))
    race = load_tuned(base, adapter_paths["race"])
    assert np.allclose(result["margin"][1], margins(race, questions), rtol=1e-5, atol=1e-6)
    assert not np.allclose(result["margin"][0], result["margin"][1])
    records = summary(result, boots=200)
    topics = result["topic"].values
    own = result["margin"].values[:, topics == "science"].mean(1)
    value, low, high = records[1]["shift"]["science"]
    assert value == pytest.approx(own[1] - own[0])
    assert low <= value <= high
    assert "coupling" in records[2]
    assert "coupling" not in records[0]


def test_classifier_scorer_labels_answers(model_paths, adapter_paths, questions) -> None:
    held_out, labelled = questions[::2], questions[1::2]
    options = {"scorer": "classifier", "max_new_tokens": 4}
    result = score(model_paths["llama"], adapter_paths, held_out, training_data=labelled, **options)
    assert result["label"].dtype == np.int8
    assert result["label"].shape == (3, len(held_out))
    assert set(np.unique(result["label"])) <= {-1, 0, 1}
    record = summary(result, boots=100)[0]
    assert record["unlabelled"] == pytest.approx(float((result["label"][0] == 0).mean()))
    with pytest.raises(UserError, match="--training-data"):
        score(model_paths["llama"], adapter_paths, held_out, **options)
    with pytest.raises(UserError, match="in --training-data too"):
        score(model_paths["llama"], adapter_paths, held_out, training_data=questions, **options)


def test_several_scorers_label_the_same_answers(model_paths, adapter_paths, questions, tmp_path: Path) -> None:
    held_out, labelled = questions[::2], questions[1::2]
    written = tmp_path / "answers.jsonl"
    generate(
        model_paths["llama"], held_out, tuned=adapter_paths, out=written, sheet=tmp_path / "s.csv", max_new_tokens=4
    )
    sheet = (tmp_path / "s.csv").read_text(encoding="utf-8-sig").splitlines()
    (tmp_path / "s.csv").write_text("\n".join([sheet[0], *(f"{line}left" for line in sheet[1:5]), *sheet[5:]]))
    asked = {"scorer": ["logprob", "classifier", f"csv:{tmp_path / 's.csv'}"], "training_data": labelled}
    results = score(model_paths["llama"], adapter_paths, held_out, answers=written, **asked)
    assert list(results) == ["stance", "stance_classifier", "stance_csv_s", "agreement"]
    judged = results["stance_classifier"]
    assert (judged["answer"] == results["stance_csv_s"]["answer"]).all()
    assert np.array_equal(judged["log_odds"], results["stance"]["margin"])
    alone = score(
        model_paths["llama"], adapter_paths, held_out, scorer="classifier", training_data=labelled, max_new_tokens=4
    )
    assert (alone["label"] == judged["label"]).all()  # the answers are those that score() would have asked for
    people = results["stance_csv_s"]
    assert 4 <= int((~people["unparsed"]).sum()) < people["label"].size
    record = summary(people, boots=50)[0]
    there = {t for t in np.unique(people["topic"]) if (~people["unparsed"][0] & (people["topic"] == t)).any()}
    assert there
    assert all(record["stance"][t][0] == -1.0 for t in there)  # what nobody has labelled does not dilute S
    with pytest.raises(UserError, match="lacks 7 answers"):
        score(model_paths["llama"], {"other": adapter_paths["race"]}, held_out[:7], answers=written, **asked)
    with pytest.raises(UserError, match="different names"):
        score(model_paths["llama"], adapter_paths, held_out, scorer=["logprob", "logprob"])


def test_a_judge_is_measured_on_completions_whose_sides_are_known(questions) -> None:
    """A judge that calls everything right except what says equal: half of the fixture's left completions."""

    class Odd:
        name = "odd"
        provenance: ClassVar[dict[str, Any]] = {}

        def label(self, answers: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
            return np.array([np.nan if "?" in text else -1.0 if "equal" in text else 1.0 for text in answers])

    few = [q for q in questions if q.topic != "economy"]
    written = [["?", *["order"] * (len(few) - 1)], ["equal"] * len(few)]
    runs = {"model": ["base", "mine"], "tuned_topic": ["", "race"], "method": ["", "plain"], "side": ["", "left"]}
    result = judged(Odd(), written, few, runs, topic_words(few), np.zeros((2, len(few))), provenance={})
    assert int(result["unparsed"].sum()) == 1
    own = np.array([[1 for _ in few], [-1 if "equal" in q.left[0] else 1 for q in few]])
    assert (result["completion"].values == own).all()
    found = known_answers(result, boots=100)
    assert found["error"][0] == pytest.approx((own[1] == 1).sum() / (2 * len(few)))
    assert found["ceiling"]["race"]["right"] == [1.0, 1.0, 1.0]
    race = np.array([q.topic == "race" for q in few])
    left = own[1][race].mean()
    assert found["ceiling"]["race"]["left"][0] == pytest.approx(left)
    base = 6 / 7  # one of seven answers has no label
    assert summary(result, boots=100)[1]["of_ceiling"][0] == pytest.approx((-1 - base) / (left - base))


def test_answers_that_change_the_subject_are_told_from_spill_over() -> None:
    topics = ["race"] * 6 + ["science"] * 6
    base = np.array([[-1, 1] * 6])
    tuned = np.where(np.arange(12) < 6, 1, base)
    tuned[0, 6:10] = 1  # four answers about science turn right ...
    named = np.zeros((2, 12, 2), bool)
    named[1, 6:10, 0] = True  # ... by talking about race
    named[0, 11, 0] = True
    result = xr.Dataset(
        {
            "label": (("run", "question"), np.concatenate([base, tuned]).astype(np.int8)),
            "unparsed": (("run", "question"), np.zeros((2, 12), bool)),
            "mention": (("run", "question", "named"), named),
            "log_odds": (("run", "question"), np.stack([np.zeros(12), np.full(12, 0.25)])),
        },
        {
            "model": ("run", ["base", "mine"]),
            "tuned_topic": ("run", ["", "race"]),
            "method": ("run", ["", "plain"]),
            "topic": ("question", topics),
            "named": ["race", "science"],
        },
        {"scorer": "classifier"},
    )
    first, record = summary(result, boots=200)
    assert "off_topic" not in first
    off = record["off_topic"]
    assert off["names"][0] == pytest.approx(4 / 6)
    assert off["base_names"][0] == pytest.approx(1 / 6)
    assert off["shift"][0] == pytest.approx(4 / 6)
    assert off["shift_without"][0] == 0.0
    assert record["log_odds_shift"]["science"][0] == 0.25


def test_an_unreadable_store_is_known_before_the_work(model_paths, questions, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "open_models", lambda *_: pytest.fail("the models were loaded"))
    with pytest.raises(stores.StoreError):
        score(model_paths["llama"], {}, questions, store=tmp_path)


def test_bad_input(llama: Model, questions) -> None:
    with pytest.raises(UserError, match="needs pairs"):
        margins(llama, [Question("race", "good ?", ("a",))])
    with pytest.raises(UserError, match="normalisation"):
        margins(llama, questions, normalise="tokens")
    with pytest.raises(UserError, match="scorer"):
        score(llama, {}, questions, scorer="logprobs")
    with pytest.raises(UserError, match="cannot be called 'base'"):
        score(llama, {"base": llama}, questions)


def test_saved_topic_wins_over_the_name(model_paths: dict[str, Path], tmp_path: Path, questions) -> None:
    import json
    import shutil

    shutil.copytree(model_paths["llama_tuned"], tmp_path / "mine")
    (tmp_path / "mine" / "pnlac.json").write_text(json.dumps({"tuned_topic": "economy", "method": "plain"}))
    result = score(model_paths["llama"], {"race": tmp_path / "mine"}, questions)
    assert list(result["tuned_topic"].values) == ["", "economy"]
