"""The rows of the report's tables: plain values, each with its interval, written to CSV and drawn as they are."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

COST = ("seconds", "seconds_per_step", "process_bytes", "device_bytes")  # of a fine-tune, see pnlac_fast.cost


class Estimate(NamedTuple):
    """A value with its 95 % interval; NaN where it could not be computed."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """+1 or -1 where the whole interval lies on one side of zero, 0 where it holds zero or is unknown."""
        return int(self.low > 0) - int(self.high < 0)


MISSING = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class ShiftCell:
    """Shift of one probe topic after tuning on one topic [nats]."""

    tuned_topic: str
    probe_topic: str
    shift: Estimate
    questions: int
    runs: int


@dataclass(frozen=True)
class CouplingRow:
    """What tuning on one topic did to it and to the others; `tuned_topic` is "" in the row over all of them."""

    method: str
    tuned_topic: str
    on_topic: Estimate
    off_topic: Estimate
    coupling: Estimate
    ratio: Estimate


@dataclass(frozen=True)
class LayerRow:
    """Neurons and scores of one layer, averaged over tuned models (and probe topics); shares are of the layer."""

    layer: int
    general: float
    specific: float
    general_least: float
    general_most: float
    specific_least: float
    specific_most: float
    rms_median: float
    rms_top: float
    std_rms_median: float
    std_rms_top: float


@dataclass(frozen=True)
class OverlapCell:
    """Jaccard overlap of the top sets of two probe topics, averaged over tuned models, beside chance."""

    topic: str
    other_topic: str
    jaccard: float
    chance: float


@dataclass(frozen=True)
class ModelPair:
    """Jaccard overlap of the general sets of two tuned models; random sets: mean and 97.5 % quantile, by layer."""

    model: str
    other: str
    jaccard: float
    chance: float
    chance_high: float


@dataclass(frozen=True)
class GeneralRow:
    """How many neurons of one tuned model are general and how many chance alone would give, as shares of all."""

    model: str
    topics: int
    top: float
    general: float
    specific: float
    chance_general: float
    chance_specific: float


@dataclass(frozen=True)
class PatchRow:
    """Recovered fraction of the shift, with the least and the most over random draws where there are several."""

    direction: str
    kind: str
    neurons: str
    share: float
    count: int
    draws: int
    on_topic: Estimate
    off_topic: Estimate
    on_topic_draws: tuple[float, ...]
    off_topic_draws: tuple[float, ...]


@dataclass(frozen=True)
class MethodRow:
    """Coupling of one method in one comparison, over tuned topics, seeds and draws.

    Comparisons are "equal steps"; "equal shift" and "equal shift 60 %", where the on-topic shift is first 80 % and 60 %
    of plain tuning's; and "as trained": each run at its own end.
    """

    method: str
    comparison: str
    share: float
    runs: int
    reached: int
    draws: int
    seeds: int
    coupling: Estimate
    reduction: Estimate
    retention: Estimate
    coupling_draws: tuple[float, ...]
    reduction_draws: tuple[float, ...]


@dataclass(frozen=True)
class PathPoint:
    """Where a method stands at one point of its training, averaged over tuned topics [nats].

    On-topic shifts count in the direction tuned, so that right and left can stand in one average.
    """

    method: str
    draw: int
    step: int
    on_topic: float
    coupling: float


@dataclass(frozen=True)
class ScoreRow:
    """Stance S of one probe topic by one scorer; `after` is "base", "this topic" or "another topic"."""

    scorer: str
    topic: str
    after: str
    stance: Estimate
    unlabelled: float


def header_and_cells(rows: Sequence[Any]) -> tuple[list[str], list[list[Any]]]:
    """Flatten rows: an estimate becomes three columns, a tuple of draws becomes one joined by spaces."""
    header: list[str] = []
    for field in fields(rows[0]):
        header.append(field.name)
        if isinstance(getattr(rows[0], field.name), Estimate):
            header += [f"{field.name}_low", f"{field.name}_high"]
    table = []
    for row in rows:
        cells: list[Any] = []
        for field in fields(row):
            value = getattr(row, field.name)
            if isinstance(value, Estimate):
                cells += list(value)
            elif isinstance(value, tuple):
                cells.append(" ".join(repr(float(v)) for v in value))
            else:
                cells.append(value)
        table.append(cells)
    return header, table


def to_csv(rows: Sequence[Any]) -> str:
    """Rows of one kind as CSV text in full precision, NaN as an empty cell."""
    header, table = header_and_cells(rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for cells in table:
        writer.writerow(["" if isinstance(c, float) and math.isnan(c) else c for c in cells])
    return buffer.getvalue()
