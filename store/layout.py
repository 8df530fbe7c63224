"""What decides the numbers of a store: names, sizes, units and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.names import check_names

RAW = ("none", "last", "full")
BASE = "base"  # the directory of the base model's raw activations, so no tuned model may take the name


@dataclass(frozen=True)
class Unit:
    """A block of consecutive questions of one topic: the smallest piece of work that is done once or not at all.

    Attributes
    ----------
    topic : str
        The topic of every question in the block.
    first, count : int
        The questions ``first .. first + count - 1`` among the questions of that topic.
    rows : int
        Raw rows (tokens) that the unit writes; 0 where no raw activations are kept.
    """

    topic: str
    first: int
    count: int
    rows: int = 0

    def __str__(self) -> str:
        return f"topic {self.topic!r}, questions {self.first} to {self.first + self.count - 1}"


@dataclass(frozen=True)
class Layout:
    """Everything that decides the numbers of a store; a store is only ever resumed with an equal layout.

    Attributes
    ----------
    topics, models, sites, tokens : tuple of str
        Names along the dimensions of /contrast: topics, tuned models, sites and token selectors.
    layers : int
        Number of layers.
    widths : dict of str to int
        Number of neurons of each site.
    units : tuple of Unit
        All units, in the order in which their partial sums are added.
    raw : {"none", "last", "full"}
        Which raw activations are kept.
    settings : dict
        Any JSON values that decide the numbers: data hash, model revision, dtype, template and so on.
    """

    topics: tuple[str, ...]
    models: tuple[str, ...]
    sites: tuple[str, ...]
    tokens: tuple[str, ...]
    layers: int
    widths: dict[str, int]
    units: tuple[Unit, ...]
    raw: Literal["none", "last", "full"]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for name, kind in (("topics", "topic"), ("models", "model"), ("sites", "site"), ("tokens", "token selector")):
            object.__setattr__(self, name, check_names(kind, getattr(self, name)))
        object.__setattr__(self, "units", tuple(self.units))
        object.__setattr__(self, "widths", {site: int(width) for site, width in self.widths.items()})
        try:  # through JSON and back, so that a layout equals the same layout read from disk
            text = json.dumps(self.settings, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must be plain JSON values: {error}") from error
        object.__setattr__(self, "settings", json.loads(text))
        self._check()

    def _check(self) -> None:
        for kind, names in (("topics", self.topics), ("sites", self.sites), ("token selectors", self.tokens)):
            if not names:
                raise StoreError(f"There are no {kind} to store; check the data and the options.")
        if not self.units:
            raise StoreError("There are no questions to store; check the data set and the topics asked for.")
        if BASE in self.models:
            raise StoreError(f"A tuned model is named {BASE!r}, the base model's own name; give it another name.")
        if self.raw not in RAW:
            raise StoreError(f"Raw activations {self.raw!r} are not known; use one of {', '.join(RAW)}.")
        if self.layers < 1 or set(self.widths) != set(self.sites) or min(self.widths.values()) < 1:
            raise ValueError("layers must be positive, and widths must give a positive width for each site")
        for unit in self.units:
            if unit.topic not in self.topics:
                raise ValueError(f"a unit has the topic {unit.topic!r}, which is not among the topics")
            if min(unit.first, unit.count, unit.rows) < 0 or (self.raw == "none" and unit.rows):
                raise ValueError(f"the unit ({unit}) has a negative size, or rows although none are kept")

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values; each unit is ``[topic, first, count, rows]``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("topics", "models", "sites", "tokens"):
            values[name] = list(values[name])
        return values | {"units": [list(asdict(unit).values()) for unit in self.units]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """Return the layout that `to_json` wrote; unknown fields of a newer minor version are ignored."""
        known = {field.name: values[field.name] for field in fields(cls)}
        return cls(**known | {"units": tuple(Unit(*unit) for unit in values["units"])})

    def fingerprint(self) -> str:
        """Return the SHA-256 of the layout's canonical JSON, in hexadecimal digits."""
        return fingerprint(self.to_json())

    def differences(self, other: Layout) -> list[tuple[str, str, str]]:
        """Return (name, value here, value in `other`) for each thing in which the two layouts differ."""
        here, there = _flat(self), _flat(other)
        return [
            (name, here.get(name, "not set"), there.get(name, "not set"))
            for name in [*here, *(name for name in there if name not in here)]
            if here.get(name) != there.get(name)
        ]


def fingerprint(values: Any) -> str:
    """Return the SHA-256 of canonical JSON (sorted keys, no spaces, UTF-8), in hexadecimal digits."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(layout: Layout) -> dict[str, str]:
    values = layout.to_json()
    units, settings = values.pop("units"), values.pop("settings")
    flat = {name: _short(value) for name, value in values.items()}
    questions, rows = sum(unit.count for unit in layout.units), sum(unit.rows for unit in layout.units)
    described = f"{len(units)} units of {questions} questions and {rows} rows"
    flat["units"] = f"{described} (sha256 {fingerprint(units)[:12]})"
    return flat | {f"settings.{name}": _short(value) for name, value in settings.items()}


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 24]}... ({fingerprint(value)[:12]})"
