"""Questions come out the same from every kind of file, and bad files are refused with a sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pnlac_fast.datasets import Question, by_topic, fingerprint, load_questions, paired, save_questions
from pnlac_fast.errors import UserError

ROWS = (
    Question("race", "what about jobs ?", ("merit",), ("fairness",)),
    Question("race", "what about maps ?", ("order",), ("equality",)),
    Question("science", "what about coal ?", ("cheap",), ("clean",)),
)


def write(path: Path, names: dict[str, str] | None = None) -> Path:
    names = {name: name for name in ("topic", "instruction", "right", "left")} | (names or {})
    records = [
        {
            names["topic"]: q.topic,
            names["instruction"]: q.instruction,
            names["right"]: q.right[0],
            names["left"]: q.left[0],
        }
        for q in ROWS
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_questions(tmp_path: Path, suffix: str) -> None:
    assert load_questions(write(tmp_path / f"data{suffix}")) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_can_have_other_names(tmp_path: Path, suffix: str) -> None:
    names = {"instruction": "question", "right": "conservative answer"}
    assert load_questions(write(tmp_path / f"data{suffix}", names), columns=names) == ROWS


def test_folder_round_trip_keeps_pairs_in_order(tmp_path: Path) -> None:
    rows = (Question("race", "why ?", ("r1", "r2"), ("l1", "l2")), *ROWS)
    save_questions(rows, tmp_path, "train")
    assert (tmp_path / "race/right/race_right_train.json").is_file()
    assert set(load_questions(tmp_path)) == set(rows)


def test_folder_may_have_one_side(tmp_path: Path) -> None:
    save_questions([Question("race", "why ?", ("r1",))], tmp_path, "train")
    (question,) = load_questions(tmp_path)
    assert (question.right, question.left) == (("r1",), ())
    with pytest.raises(UserError, match="1 right and 0 left"):
        paired([question])


def test_input_follows_the_instruction(tmp_path: Path) -> None:
    folder = tmp_path / "race" / "right"
    folder.mkdir(parents=True)
    row = {"instruction": "Agree?", "input": "Taxes are low.", "output": "Yes", "label": "Right leaning."}
    (folder / "race_right_eval.json").write_text(json.dumps([row]))
    assert load_questions(tmp_path)[0].instruction == "Agree?\nTaxes are low."


def test_statements_are_questions_without_completions(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(["taxes are theft", "the market is fair"]))
    assert load_questions(tmp_path / "s.json") == (
        Question("statements", "taxes are theft"),
        Question("statements", "the market is fair"),
    )


def test_selection_by_topic_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl")
    assert load_questions(path, topics=["science", "race"], limit=1) == (ROWS[2], ROWS[0])
    assert list(by_topic(ROWS)) == ["race", "science"]


def test_key_and_fingerprint_tell_data_apart() -> None:
    assert len({q.key for q in ROWS}) == 3
    assert ROWS[0].key == Question("race", "what about jobs ?").key
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        ("", "data.jsonl", {}, "holds no questions"),
        ("{not json", "data.jsonl", {}, "line 1 is not JSON"),
        ('{"topic": "race"}', "data.jsonl", {}, "no text in 'instruction'"),
        ('"text"', "data.json", {}, "JSON array"),
        ("[[1]]", "data.json", {}, "must name its columns"),
        ("x", "data.txt", {}, "ends in '.txt'"),
        ('{"topic": "race", "instruction": "a"}', "data.jsonl", {"topics": ["rase"]}, "Did you mean 'race'"),
        ('{"topic": "race", "instruction": "a"}', "data.jsonl", {"limit": 0}, "leaves no question"),
        ('{"topic": "race", "instruction": "a"}', "data.jsonl", {"columns": {"right": "r"}}, "no column"),
        ('{"topic": "race", "instruction": "a"}', "data.jsonl", {"columns": {"answer": "r"}}, "no column role"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, content: str, name: str, options: dict, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_questions(tmp_path / name, **options)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data at"):
        load_questions(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no"):
        load_questions(tmp_path)
