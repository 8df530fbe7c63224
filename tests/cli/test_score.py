"""Stance as it is typed: `score`, `utility` and `generate` are the library's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typed import done, table

from pnlac_fast import store as stores
from pnlac_fast.datasets import load_questions
from pnlac_fast.loading import load_model
from pnlac_fast.scoring import score
from pnlac_fast.stance import margins
from pnlac_fast.summary import summary


def test_score_equals_the_library_call(cli, world: Path, base, tuned) -> None:
    result = done(cli("score", *base, *tuned, "--store", world / "run.zarr", "--normalise", "sum", "--json")).json
    paths = {name: world / "tuned" / name for name in ("race", "science")}
    expected = summary(score(world / "base", paths, world / "data", normalise="sum"))
    assert result["models"] == json.loads(json.dumps(expected))
    stored = stores.open_result(world / "run.zarr", "stance")
    assert np.array_equal(
        stored["margin"][0], margins(load_model(world / "base"), load_questions(world / "data"), normalise="sum")
    )
    shares = done(cli("score", *base, *tuned, "--measure", "S", "--json")).json["models"][0]["stance"]
    assert all(-1 <= value <= 1 and round(value * 7) == pytest.approx(value * 7) for value, _, _ in shares.values())
    first, second = done(cli("score", *base, *tuned)).out.split("\n\n")
    assert table(first)[0].split() == ["model", "tuned", "topic", "stance", "shift"]
    assert len(table(second)) == 1 + 3


def test_score_by_the_classifier(cli, world: Path, base, tuned, questions, tmp_path: Path) -> None:
    rows = [
        {"topic": q.topic, "instruction": f"other {q.instruction}", "right": q.right, "left": q.left} for q in questions
    ]
    other = tmp_path / "labelled.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in rows))
    asked = ["score", *base, *tuned, "--scorer", "classifier", "--training-data", other, "--max-new-tokens", 3]
    done(cli(*asked, "--temperature", 0.7, "--seed", 3, "--store", world / "run.zarr"))
    stored = stores.open_result(world / "run.zarr", "stance_classifier")
    assert stored["label"].shape == (3, 21)
    assert stored["side"].values.tolist() == ["", "right", "right"]
    assert stored["completion"].shape == (2, 21)
    assert set(np.unique(stored["label"])) <= {-1, 0, 1}
    models = done(cli(*asked, "--json")).json["models"]
    assert [m["model"] for m in models] == ["base", "race", "science"]


def test_score_by_several(cli, world: Path, base, tuned, tmp_path: Path, monkeypatch) -> None:
    answers, sheet = tmp_path / "answers.jsonl", tmp_path / "sheet.csv"
    asked = ["generate", *base, *tuned, "--max-new-tokens", 3, "--out", answers]
    done(cli(*asked, "--sheet", sheet, "--sheet-rows", 6))
    lines = sheet.read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == 7
    sheet.write_text(
        "\n".join([lines[0], *(f"{line}{side}" for line, side in zip(lines[1:], ["left", "right"] * 3, strict=True))])
    )
    asked = ["score", *base, *tuned, "--answers", answers]
    both = ["--scorer", "logprob", "--scorer", f"csv:{sheet}", "--store", world / "run.zarr"]
    found = done(cli(*asked, *both, "--json")).json
    assert list(found["scorers"]) == ["logprob", "csv:sheet"]
    assert found["scorers"]["csv:sheet"]["labels"] == {"right": 3, "left": 3, "neither": 0}
    assert [r["model"] for r in found["models"]] == ["base", "race", "science"] * 2
    assert [(r["scorer"], r["other"]) for r in found["agreement"]] == [("logprob", "csv:sheet")]
    assert {"stance", "stance_csv_sheet", "agreement"} <= set(stores.list_results(world / "run.zarr"))
    text = done(cli(*asked, *both)).out
    stances, models, judges, agreed = map(table, text.split("\n\n"))
    assert (len(stances), len(models), len(judges), len(agreed)) == (1 + 18, 1 + 6, 1 + 1, 1 + 1)
    assert "topics_with_words" in judges[0]
    monkeypatch.setenv("PNLAC_CACHE", str(tmp_path))
    paid = ["--scorer", "openai:m", "--judge-tokens", 10, "--judge-price", 1, 2, "--dry-run", "--json"]
    cost = done(cli(*asked, *paid)).json["openai:m"]
    assert cost["answers"] == (3 + 2) * 21  # each question's own completions too
    assert cost["output_tokens_at_most"] == 10 * cost["requests"]
    assert cost["cost_at_most"] == pytest.approx((cost["input_tokens"] + 2 * cost["output_tokens_at_most"]) / 1e6)


def test_utility_of_text_and_answers(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    (tmp_path / "neutral.txt").write_text("the state and the people .\nschools .")
    done(cli("generate", *base, *tuned, "--limit", 2, "--max-new-tokens", 3, "--out", tmp_path / "a.jsonl"))
    asked = ["utility", *base[:2], *tuned, "--text", tmp_path / "neutral.txt", "--answers", tmp_path / "a.jsonl"]
    rows = done(cli(*asked, "--store", world / "run.zarr", "--json")).json["models"]
    assert [row["model"] for row in rows] == ["base", "race", "science"]
    assert set(rows[0]) == {"model", "perplexity", "over_base", "words", "empty", "refusals"}
    assert stores.open_result(world / "run.zarr", "utility")["refusal"].shape == (3, 6)
    assert len(table(done(cli(*asked)).out)) == 1 + 3


def test_generate_writes_the_answers_it_prints(cli, base, tuned, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    asked = ["generate", *base, *tuned, "--limit", 2, "--max-new-tokens", 3]
    records = done(cli(*asked, "--out", out, "--json")).json
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert len(records) == 3 * 3 * 2
    assert {r["model"] for r in records} == {"base", "race", "science"}
    hot = [done(cli(*asked, "--temperature", 5, "--seed", seed, "--json")).json for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert table(done(cli(*asked)).out)[0].split() == ["model", "topic", "instruction", "answer"]
