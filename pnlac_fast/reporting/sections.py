"""What a section of the page consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

Cells = list[list[str]]


@dataclass(frozen=True)
class Shown:
    """A figure on the page: file name, caption, alternative text, and how to draw it at a width in inches."""

    name: str
    caption: str
    alt: str
    draw: Callable[[float], Figure]


@dataclass(frozen=True)
class Table:
    """A table on the page: the text cells to show, and the rows that go to CSV in full precision."""

    name: str
    caption: str
    header: list[str]
    cells: Cells
    rows: Sequence[Any]
    words: int = 1  # leading columns of text; the others are numbers
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One section; `lacking` says what it would show of a fuller store, and the command that adds it."""

    key: str
    title: str
    sentences: list[str] = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    lacking: list[tuple[str, str]] = field(default_factory=list)

    @property
    def captions(self) -> str:
        """What the captions of the figures say already."""
        return "\n".join(figure.caption for figure in self.figures)

    @property
    def shown(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.sentences or self.figures or self.tables)


def absent(key: str, title: str, command: str) -> Section:
    """A section whose data are not in the store, and the command that adds them."""
    return Section(key, title, lacking=[(title, command)])


def unit_of(dataset: Any) -> str:
    """Unit of a margin: nats, or nats per token where log-probabilities were divided by their length."""
    return "nats" if dataset.attrs.get("normalise", "token") == "sum" else "nats per token"
