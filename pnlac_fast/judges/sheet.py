"""People as judges: answers go out as a sheet without model names, and come back with labels in it."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pnlac_fast.errors import UserError
from pnlac_fast.judges.replies import SIDES

COLUMNS = ("id", "question", "answer", "label")
FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet would run


def write_sheet(
    records: Sequence[Mapping[str, str]], path: str | Path, *, rows: int | None = None, seed: int = 0
) -> int:
    """Write answers as a CSV sheet for people to label right, left or neither in its last column.

    The sheet says nothing of the models. Its order is random, and an answer that several models gave to one question
    is there once.

    Parameters
    ----------
    records
        As from :func:`pnlac_fast.generate`.
    rows
        At most so many, drawn evenly from all models and topics. Default: all.
    seed
        Of the draw and the order.

    Returns
    -------
    int
        How many answers the sheet holds.
    """
    if rows is not None and rows < 1:
        raise UserError(f"A sheet of {rows} rows is none: give 1 or more.")
    generator = random.Random(seed)
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for record in records:
        groups.setdefault((record["model"], record["topic"]), []).append((record["instruction"], record["answer"]))
    for group in groups.values():
        generator.shuffle(group)
    longest = max(map(len, groups.values()), default=0)
    in_turn = [group[i] for i in range(longest) for group in groups.values() if i < len(group)]
    chosen = list(dict.fromkeys(in_turn))[:rows]
    generator.shuffle(chosen)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for question, answer in chosen:
        writer.writerow([_id(question, answer), _cell(question), _cell(answer), ""])
    Path(path).write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    return len(chosen)


@dataclass(frozen=True)
class Sheet:
    """Labels that people gave; answers that are not in the sheet, or not labelled in it, have none.

    Attributes
    ----------
    labels
        +1 right, -1 left, 0 neither, by the answer's id.
    """

    name: str
    labels: dict[str, float] = field(repr=False)
    rows: int
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> Sheet:
        """Read a sheet of :func:`write_sheet` with labels in it; commas, semicolons or tabs between the cells.

        Raises
        ------
        UserError
            The file is no such sheet, a label is none of right, left and neither, a row's text is not the one that its
            id was made for, an id has two different labels, or there is no label at all.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"There is no sheet '{path}': write one with pnlac-fast generate --sheet.")
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"'{path}' is not UTF-8 text: save the sheet as CSV in UTF-8.") from error
        head = text.partition("\n")[0]
        delimiter = max(",;\t", key=head.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise UserError(f"The sheet '{path}' has no column '{missing[0]}': keep the columns {', '.join(COLUMNS)}.")
        labels: dict[str, float] = {}
        rows = 0
        for rows, row in enumerate(reader, 1):
            word = (row["label"] or "").strip().lower()
            if not word:
                continue
            where = f"Row {rows} of '{path}'"
            if word not in SIDES:
                raise UserError(f"{where} has the label '{row['label']}': write right, left or neither.")
            if row["id"] != _id(row["question"] or "", row["answer"] or ""):
                raise UserError(f"{where} does not hold the text that its id belongs to: restore question and answer.")
            if labels.setdefault(row["id"], SIDES[word]) != SIDES[word]:
                raise UserError(f"{where} labels an answer otherwise than a row before: keep one of them.")
        if not labels:
            raise UserError(f"The sheet '{path}' has no label yet: fill its last column.")
        return cls(f"csv:{path.stem}", labels, rows, hashlib.sha256(text.encode()).hexdigest())

    @property
    def provenance(self) -> dict[str, Any]:
        """Hash of the sheet, and how many of its answers have which label."""
        words = {value: word for word, value in SIDES.items()}
        counts = Counter(words[value] for value in self.labels.values())
        return {"sha256": self.sha256, "rows": self.rows, "labels": {word: counts[word] for word in SIDES}}

    def label(self, answers: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """float64 [answer]: +1 right, -1 left, 0 neither, NaN where nobody has labelled it.

        Raises
        ------
        UserError
            The sheet has labels for none of these answers.
        """
        ids = [_id(question, answer) for question, answer in zip(instructions, answers, strict=True)]
        found = np.array([self.labels.get(i, math.nan) for i in ids])
        if np.isnan(found).all():
            raise UserError(
                f"The sheet '{self.name.removeprefix('csv:')}' has labels for none of these answers: give the answers "
                f"that it was made from with --answers."
            )
        return found


def _id(question: str, answer: str) -> str:
    """16 hex digits of question and answer, whatever a spreadsheet did to their white space."""
    texts = (" ".join(_bare(text).split()) for text in (question, answer))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _bare(text: str) -> str:
    return text[1:] if text[:1] == "'" and text[1:].startswith(FORMULA) else text
