"""Questions with right and left completions: one form, whatever file they come from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnlac_fast import hub
from pnlac_fast.errors import UserError, unknown

SIDES = ("right", "left")
COLUMNS = ("topic", "instruction", "right", "left")
STATEMENTS = "statements"
SUFFIXES = (".jsonl", ".csv", ".parquet", ".json")


@dataclass(frozen=True)
class Question:
    """One question of a topic, with its completions; the i-th right one is the pair of the i-th left one.

    Attributes
    ----------
    topic, instruction
        What it is about, and what is asked.
    right, left
        Completions; empty where a side is not known.
    """

    topic: str
    instruction: str
    right: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """16 hex digits that name the question in stores and tables."""
        return hashlib.sha256(f"{self.topic}\0{self.instruction}".encode()).hexdigest()[:16]

    def completions(self, side: str) -> tuple[str, ...]:
        """The completions of one side, ``"right"`` or ``"left"``."""
        return self.right if side == "right" else self.left


def load_questions(
    data: str | Path | Iterable[Any],
    *,
    topics: Sequence[str] | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Question, ...]:
    """Read questions from a folder in IdeoINST's layout, a JSONL, CSV, Parquet or JSON file, or a data set.

    Parameters
    ----------
    data
        A folder ``{topic}/{right|left}/*.json`` (arrays of ``instruction``, ``input``, ``output``, ``label``); or a
        file with a row per question and the columns ``topic``, ``instruction``, ``right``, ``left``; or a JSON array
        of plain statements, which become the questions of the topic "statements". Or a data set of Hugging Face's
        ``datasets`` with these columns: a folder that its ``save_to_disk`` wrote, ``hf://datasets/USER/NAME/SPLIT``
        for one of the hub (``.../FILE.jsonl`` for a file of it), a ``Dataset``, or any rows that are mappings.
    topics
        Keep these topics only, in this order. Default: all, sorted by name for a folder, else in order of appearance.
    limit
        At most so many questions of each topic, the first ones.
    columns
        Which column holds what, such as ``{"instruction": "question"}``, for files whose columns have other names.

    Returns
    -------
    tuple of Question
        Grouped by topic. Rows of one topic and instruction are one question with several completion pairs.

    Raises
    ------
    UserError
        The path, a topic or a column does not exist, a file cannot be read as what its name says, or nothing is left;
        the package ``datasets`` is needed and missing.
    """
    if unmapped := set(columns or {}) - set(COLUMNS):
        raise unknown("column role", sorted(unmapped)[0], COLUMNS)
    rows, where = _rows(data, columns or {})
    merged: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for topic, instruction, right, left in rows:
        pair = merged.setdefault((topic, instruction), ([], []))
        pair[0].extend(right)
        pair[1].extend(left)
    by_topic: dict[str, list[Question]] = {}
    for (topic, instruction), (right, left) in merged.items():
        by_topic.setdefault(topic, []).append(Question(topic, instruction, tuple(right), tuple(left)))
    for topic in topics or ():
        if topic not in by_topic:
            raise unknown("topic", topic, by_topic)
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no question: give 1 or more.")
    questions = tuple(q for topic in (topics or by_topic) for q in by_topic[topic][:limit])
    if not questions:
        raise UserError(f"{where} holds no questions: expected rows with {', '.join(COLUMNS)}.")
    return questions


def as_questions(data: str | Path | Iterable[Any]) -> tuple[Question, ...]:
    """Questions as they are, or what :func:`load_questions` reads with default settings."""
    if isinstance(data, (str, Path, Mapping)):
        return load_questions(data)
    found = tuple(data)
    return found if all(isinstance(one, Question) for one in found) else load_questions(found)


def save_questions(questions: Iterable[Question], directory: str | Path, split: str) -> None:
    """Write questions in IdeoINST's layout: ``{topic}/{side}/{topic}_{side}_{split}.json``.

    A question with several pairs becomes several rows with the same instruction.

    Parameters
    ----------
    questions
        With completions of either or both sides; one without any is not written.
    directory
        Made where it does not exist; files of the same topics, sides and split are replaced.
    split
        Last part of the files' names, such as "train".
    """
    files: dict[tuple[str, str], list[dict[str, str]]] = {}
    for question in questions:
        for side in SIDES:
            for text in question.completions(side):
                row = {"instruction": question.instruction, "input": "", "output": text, "label": f"{side} leaning"}
                files.setdefault((question.topic, side), []).append(row)
    for (topic, side), rows in files.items():
        folder = Path(directory) / topic / side
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{topic}_{side}_{split}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def following(topics: Iterable[str], tuned: str, count: int) -> list[str]:
    """The ``count`` topics that follow a tuned one, the last followed by the first.

    Held out for every tuned topic in turn, each topic is held out as often as any other.

    Raises
    ------
    UserError
        The tuned topic is not among them, or none would be left beside it.
    """
    order = list(topics)
    if tuned not in order or not 0 < count < len(order) - 1:
        raise UserError(
            f"Of {len(order)} topics, {count} besides '{tuned}' cannot be held out and others be left: hold out fewer, "
            f"or give questions of more topics."
        )
    first = order.index(tuned) + 1
    return [order[place % len(order)] for place in range(first, first + count)]


def fingerprint(questions: Iterable[Question]) -> str:
    """sha256 of the questions and their completions, in order; names the data in provenance."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.topic, question.instruction, question.right, question.left]).encode())
    return digest.hexdigest()


def by_topic(questions: Iterable[Question]) -> dict[str, tuple[Question, ...]]:
    """Questions grouped by topic, in order of first appearance."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.topic, []).append(question)
    return {topic: tuple(group) for topic, group in groups.items()}


def paired(questions: Sequence[Question]) -> tuple[Question, ...]:
    """Check that every question has as many right as left completions, and at least one of each.

    Raises
    ------
    UserError
        Naming the first question without pairs.
    """
    for question in questions:
        if not question.right or len(question.right) != len(question.left):
            raise UserError(
                f"The question '{question.instruction[:60]}' ({question.topic}) has {len(question.right)} right and "
                f"{len(question.left)} left completions: scoring needs pairs. Give data with both sides."
            )
    return tuple(questions)


Row = tuple[str, str, Sequence[str], Sequence[str]]


def _rows(data: Any, columns: Mapping[str, str]) -> tuple[list[Row], str]:
    """Rows of whatever holds questions, and how to call it."""
    if isinstance(data, str) and data.startswith(hub.SCHEME):
        address = hub.parse(data)
        if address.path.endswith(SUFFIXES):
            return _file_rows(hub.local(data, ""), columns), f"'{data}'"
        data = hub.data_set(data)
    if not isinstance(data, (str, Path)):
        return _given_rows(data, columns), "The data set"
    path = Path(data)
    if not path.exists():
        raise UserError(
            f"There is no data at '{data}': check --data; a data set of the hub is hf://datasets/USER/NAME."
        )
    if not path.is_dir():
        return _file_rows(path, columns), f"'{path}'"
    if any((path / name).is_file() for name in hub.SAVED):
        return _given_rows(hub.saved_data_set(path), columns), f"'{path}'"
    return _folder_rows(path), f"'{path}'"


def _given_rows(data: Any, columns: Mapping[str, str]) -> list[Row]:
    """Rows of a data set in memory: questions or mappings, or the only split of several."""
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise UserError(f"The data set has the splits {', '.join(data)}: give one of them, as SET/SPLIT.")
        (data,) = data.values()
    return [
        (one.topic, one.instruction, one.right, one.left)
        if isinstance(one, Question)
        else _row(one, columns, "the data set")
        for one in data
    ]


def _folder_rows(folder: Path) -> list[Row]:
    """Rows of an IdeoINST folder; one side may be missing."""
    rows: list[Row] = []
    for topic in sorted(p for p in folder.iterdir() if p.is_dir()):
        for side in SIDES:
            for file in sorted((topic / side).glob("*.json")):
                for record in _json_array(file):
                    instruction, output = (_text(record, name, f"'{file}'") for name in ("instruction", "output"))
                    if extra := str(record.get("input") or "").strip():
                        instruction = f"{instruction}\n{extra}"
                    rows.append(
                        (topic.name, instruction, *((output,) if side == s else () for s in SIDES))  # type: ignore[arg-type]
                    )
    if not rows:
        raise UserError(f"'{folder}' has no {{topic}}/{{right|left}}/*.json files: check --data.")
    return rows


def _file_rows(file: Path, columns: Mapping[str, str]) -> list[Row]:
    """Rows of a JSONL, CSV, Parquet or JSON file."""
    suffix = file.suffix.lower()
    records: list[Any]
    if suffix == ".jsonl":
        records = [_json(line, f"{file}, line {i}") for i, line in enumerate(_read(file).splitlines(), 1) if line]
    elif suffix == ".csv":
        records = list(csv.DictReader(io.StringIO(_read(file), newline="")))
    elif suffix == ".parquet":
        import pyarrow.parquet

        try:
            records = pyarrow.parquet.read_table(file).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"'{file}' is not a Parquet file that can be read: write it again.") from error
    elif suffix == ".json":
        records = _json_array(file)
        if all(isinstance(record, str) for record in records):
            return [(STATEMENTS, text, (), ()) for text in records]
    else:
        raise UserError(f"Data file '{file}' ends in '{suffix}': give a folder, .jsonl, .csv, .parquet or .json.")
    return [_row(record, columns, f"'{file}'") for record in records]


def _row(record: Any, columns: Mapping[str, str], where: str) -> Row:
    if not isinstance(record, Mapping):
        raise UserError(f"{where} holds {type(record).__name__} rows: each row must name its columns.")
    topic, instruction = (_text(record, columns.get(name, name), where) for name in ("topic", "instruction"))
    right, left = (_texts(record.get(columns.get(side, side))) for side in SIDES)
    for side in SIDES:
        if side in columns and columns[side] not in record:
            raise unknown(f"column in {where}", columns[side], record)
    return topic, instruction, right, left


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        found = ", ".join(map(str, record))
        raise UserError(f"A row of {where} has no text in '{name}' (its columns: {found}): map columns with --column.")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """One completion, several, or none."""
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text ({error.reason} at byte {error.start}): convert it.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}): mend or remove it.") from error


def _json_array(file: Path) -> list[Any]:
    records = _json(_read(file), f"'{file}'")
    if not isinstance(records, list):
        raise UserError(f"'{file}' must hold a JSON array of rows.")
    return records
