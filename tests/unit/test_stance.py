"""Margins against a plain computation, for any batch, padding and adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.stance import margins, score, summary


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


def test_bad_input(llama: Model, questions) -> None:
    with pytest.raises(UserError, match="needs pairs"):
        margins(llama, [Question("race", "good ?", ("a",))])
    with pytest.raises(UserError, match="normalisation"):
        margins(llama, questions, normalise="tokens")
    with pytest.raises(UserError, match="scorer"):
        score(llama, {}, questions, scorer="logprobs")
    with pytest.raises(UserError, match="cannot be called 'base'"):
        score(llama, {"base": llama}, questions)


def test_judge_measures_itself_on_held_out_instructions() -> None:
    from pnlac_fast.judges import train

    sides = {"right": "border order tradition", "left": "justice equality inclusion"}
    data = [Question("race", f"q{i} ?", (f"{sides['right']} x{i}",), (f"{sides['left']} x{i}",)) for i in range(12)]
    judge = train(data)
    assert judge.accuracy == 1.0
    assert judge.label(["tradition and order", "equality now", "zebra", ""]).tolist() == [1, -1, 0, 0]
    shuffled = [Question("race", f"q{i} ?", (f"w{i}",), (f"v{i}",)) for i in range(12)]
    assert train(shuffled).accuracy < 0.2  # words never seen again: unlabelled, which counts as wrong
    with pytest.raises(UserError, match="5 instructions"):
        train(data[:3])
    with pytest.raises(UserError, match="right and left completions"):
        train([Question("race", f"q{i} ?", ("yes",)) for i in range(6)])


def test_saved_topic_wins_over_the_name(model_paths: dict[str, Path], tmp_path: Path, questions) -> None:
    import json
    import shutil

    shutil.copytree(model_paths["llama_tuned"], tmp_path / "mine")
    (tmp_path / "mine" / "pnlac.json").write_text(json.dumps({"tuned_topic": "economy", "method": "plain"}))
    result = score(model_paths["llama"], {"race": tmp_path / "mine"}, questions)
    assert list(result["tuned_topic"].values) == ["", "economy"]
