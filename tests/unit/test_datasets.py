"""Questions come out the same from every kind of file, and bad files are refused with a sentence."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint, load_questions, paired, save_questions
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


def rows() -> list[dict[str, str]]:
    return [{"topic": q.topic, "instruction": q.instruction, "right": q.right[0], "left": q.left[0]} for q in ROWS]


def test_rows_in_memory_are_questions_wherever_questions_are_wanted() -> None:
    assert load_questions(rows()) == as_questions(rows()) == ROWS
    assert as_questions(iter(ROWS)) == ROWS
    assert load_questions(ROWS, topics=["science"]) == ROWS[2:]
    renamed = [{"theme": row.pop("topic"), **row} for row in rows()]
    assert load_questions(renamed, columns={"topic": "theme"}) == ROWS
    with pytest.raises(UserError, match=r"A row of the data set has no text in 'topic'"):
        as_questions(renamed)
    with pytest.raises(UserError, match="holds no questions"):
        load_questions([])
    with pytest.raises(UserError, match="the data set holds int rows"):
        load_questions([1])


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    """In memory, streamed, saved to a folder, and in splits."""
    data = pytest.importorskip("datasets", reason="datasets is not installed")
    one = data.Dataset.from_list(rows())
    splits = data.DatasetDict({"train": one, "test": one.select([0])})
    one.save_to_disk(tmp_path / "one")
    splits.save_to_disk(tmp_path / "splits")
    for given in (one, one.to_iterable_dataset(), data.DatasetDict({"train": one}), tmp_path / "one"):
        assert as_questions(given) == ROWS
    assert load_questions(str(tmp_path / "splits" / "test")) == ROWS[:1]
    renamed = one.rename_columns({"instruction": "question"})
    assert load_questions(renamed, columns={"instruction": "question"}, limit=1) == (ROWS[0], ROWS[2])
    several = data.Dataset.from_list([{**row, "right": [row["right"], "more"]} for row in rows()])
    assert load_questions(several)[0].right == (*ROWS[0].right, "more")
    for held in (splits, tmp_path / "splits"):
        with pytest.raises(UserError, match="splits train, test"):
            as_questions(held)
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="save it again"):
        load_questions(tmp_path / "one")


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here; what load_dataset is asked for is what the address says."""
    data = pytest.importorskip("datasets", reason="datasets is not installed")
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", {"topic": "theme"})
    asked, real = [], data.load_dataset

    def load_dataset(path: str, **options: object) -> object:
        asked.append((path, options))
        assert path == "user/name"
        file = "test" if options["split"] == "test" else "train"
        files = {file: str(tmp_path / f"{file}.jsonl")}
        return real("json", data_files=files, split=options["split"], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    assert load_questions("hf://datasets/user/name@v2/train") == ROWS
    assert load_questions("hf://datasets/user/name/test", columns={"topic": "theme"}) == ROWS
    assert asked[0] == ("user/name", {"split": "train", "revision": "v2"})
    with pytest.raises(UserError, match=r"Unknown split"):
        load_questions("hf://datasets/user/name/dev")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given, **_: str(tmp_path / given[1]))
    assert load_questions("hf://datasets/user/name/train.jsonl") == ROWS
    with pytest.raises(UserError, match="is no address on the hub"):
        load_questions("hf://datasets/user")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'pnlac-fast\[datasets\]'"):
        load_questions("hf://datasets/user/name/train")
