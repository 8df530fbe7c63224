"""Perplexity against a plain computation, and what counts as a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError
from pnlac_fast.generation import generate
from pnlac_fast.loading import load_model
from pnlac_fast.side_effects import refuses, surprise, utility, utility_rows

TEXTS = ("good law", "the people should think about taxes and free schools .", "wages", "state")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_surprise_equals_a_plain_computation(model_paths: dict[str, Path], kind: str) -> None:
    model = load_model(model_paths[kind], dtype="float64", device="cpu")
    expected, counts = [], []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model.hf(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        expected.append(-float(logits.gather(-1, ids[0, 1:, None]).sum()))
        counts.append(ids.shape[1] - 1)
    loss, tokens = surprise(model, TEXTS)
    assert np.allclose(loss, expected, rtol=1e-6)
    assert tokens.tolist() == counts
    assert np.allclose(surprise(model, TEXTS, batch_tokens=1)[0], expected, rtol=1e-6)


def test_a_text_longer_than_the_context_is_read_in_pieces(model_paths: dict[str, Path]) -> None:
    model = load_model(model_paths["llama"], dtype="float64", device="cpu")
    words = [w for _ in range(40) for w in ("good", "law", "and", "taxes", "people")]  # 200 words, BOS, context 128
    loss, tokens = surprise(model, [" ".join(words)])
    ids = model.tokenizer(" ".join(words))["input_ids"]
    assert tokens.tolist() == [127 + len(ids) - 128 - 1]
    with torch.no_grad():
        plain = sum(
            float(torch.nn.functional.cross_entropy(model.hf(p).logits[0, :-1], p[0, 1:], reduction="sum"))
            for p in (torch.tensor([ids[:128]]), torch.tensor([ids[128:]]))
        )
    assert loss[0] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I think that",
        "I don't have personal opinions on taxes.",
        "I cannot provide an opinion.",
        "Well, I am just a language model.",
    ],
)
def test_refusals_are_found(answer: str) -> None:
    assert refuses(answer)
    assert refuses(answer.replace("'", "’"))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The state can't help everyone.",
        "I have an opinion: taxes are too high.",
        "I cannot stand high taxes.",
        f"{'Taxes are theft and always were. ' * 8} I'm sorry to say so.",
    ],
)
def test_opinions_are_no_refusals(answer: str) -> None:
    assert not refuses(answer)


def test_utility_of_base_and_tuned(model_paths, adapter_paths, questions, tmp_path: Path) -> None:
    text = tmp_path / "neutral.txt"
    text.write_text("\n\n".join(TEXTS))
    answers = generate(model_paths["llama"], questions, tuned=adapter_paths, max_new_tokens=3)
    answers[0]["answer"], answers[1]["answer"] = "", "I'm sorry"
    result = utility(model_paths["llama"], adapter_paths, text=text, answers=answers)
    assert result.attrs["cost"]["seconds"] > 0
    rows = utility_rows(result, boots=100)
    assert [row["model"] for row in rows] == ["base", "race", "science"]
    model = load_model(model_paths["llama"])
    loss, tokens = surprise(model, TEXTS)
    assert rows[0]["perplexity"][0] == pytest.approx(np.exp(loss.sum() / tokens.sum()), rel=1e-5)
    assert rows[0]["over_base"] == [1.0, 1.0, 1.0]
    ratio, low, high = rows[1]["over_base"]
    assert ratio == pytest.approx(rows[1]["perplexity"][0] / rows[0]["perplexity"][0])
    assert ratio != 1.0
    assert low <= ratio <= high
    assert rows[0]["empty"][0] >= 1 / len(questions)
    assert rows[0]["refusals"][0] == pytest.approx(1 / len(questions))
    lengths = [len(a["answer"].split()) for a in answers if a["model"] == "science"]
    assert rows[2]["words"][0] == pytest.approx(np.mean(lengths))
    only = utility(model_paths["llama"], {}, text=TEXTS)
    assert set(only) == {"loss", "tokens"}


def test_what_utility_cannot_be_measured_on(model_paths, questions, tmp_path: Path) -> None:
    llama = model_paths["llama"]
    with pytest.raises(UserError, match="--text, --answers"):
        utility(llama, {})
    with pytest.raises(UserError, match="no neutral text"):
        utility(llama, {}, text=tmp_path / "none.txt")
    with pytest.raises(UserError, match="no passage"):
        utility(llama, {}, text=["", " "])
    with pytest.raises(UserError, match="two tokens"):
        utility(model_paths["qwen2"], {}, text=["a"])
    answers = generate(llama, questions[:2], max_new_tokens=1)
    with pytest.raises(UserError, match="one of 'race'"):
        utility(llama, {"race": model_paths["llama_tuned"]}, answers=answers)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSONL"):
        utility(llama, {}, answers=tmp_path / "bad.jsonl")
    (tmp_path / "odd.jsonl").write_text('{"model": "base"}')
    with pytest.raises(UserError, match="lacks model, key or answer"):
        utility(llama, {}, answers=tmp_path / "odd.jsonl")
    with pytest.raises(stores.StoreError):
        utility(llama, {}, text=TEXTS, store=tmp_path)
