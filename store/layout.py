"""What decides the numbers of a store: names, sizes, units and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.names import check_names
from pnlac_fast.store.shards import DTYPES, Dtype

RAW = ("none", "last", "pooled", "selected", "full")
SELECTORS = ("last", "completion", "prompt", "all")  # each raw row says how often each of these counts it
_LARGEST, _MOST_LAYERS = 1 << 40, 1 << 20  # what a damaged layout may claim
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
class Raw:
    """Which raw activations are kept, and how.

    Attributes
    ----------
    tokens : {"none", "last", "pooled", "selected", "full"}
        Of which tokens: none; the last of each prompt; means over the tokens that each token selector counts in a text;
        those tokens themselves; or all.
    dtype : {"float32", "float16", "bfloat16"}
        How they are stored.
    layers : tuple of int
        Of which layers, ascending; ignored where neurons are chosen.
    neurons : dict of str to list
        Where only chosen neurons are kept, how many at each site and the SHA-256 of their (layer, neuron) list.
    """

    tokens: str = "none"
    dtype: Dtype = "float32"
    layers: tuple[int, ...] = ()
    neurons: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if self.tokens not in RAW:
            raise StoreError(f"Raw activations {self.tokens!r} are not known; use one of {', '.join(RAW)}.")
        if self.dtype not in DTYPES:
            raise StoreError(f"Raw activations cannot be stored as {self.dtype!r}; use one of {', '.join(DTYPES)}.")


NO_RAW = Raw()


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
    raw : Raw
        Which raw activations are kept.
    settings : dict
        Any JSON values that decide the numbers: data hash, model revision, dtype, template and so on.
    parts : int
        Into how many equal slices of neurons each unit is cut, each written by a writer of its own (tensor parallel).
    """

    topics: tuple[str, ...]
    models: tuple[str, ...]
    sites: tuple[str, ...]
    tokens: tuple[str, ...]
    layers: int
    widths: dict[str, int]
    units: tuple[Unit, ...]
    raw: Raw
    settings: dict[str, Any]
    parts: int = 1

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
        if self.layers < 1 or set(self.widths) != set(self.sites) or min(self.widths.values()) < 1:
            raise ValueError("layers must be positive, and widths must give a positive width for each site")
        for unit in self.units:
            if unit.topic not in self.topics:
                raise ValueError(f"a unit has the topic {unit.topic!r}, which is not among the topics")
            if min(unit.first, unit.count, unit.rows) < 0 or (self.raw.tokens == "none" and unit.rows):
                raise ValueError(f"the unit ({unit}) has a negative size, or rows although none are kept")
        self._check_parts()

    def _check_parts(self) -> None:
        raw = self.raw
        if self.parts < 1 or any(width % self.parts for width in self.widths.values()):
            raise StoreError(f"{self.widths} neurons cannot be cut into {self.parts} equal parts; use another number.")
        if raw.neurons and (set(raw.neurons) != set(self.sites) or self.parts > 1):
            raise StoreError("Chosen neurons need a choice for every site, and cannot be kept under --tp.")
        if raw.tokens != "none" and not raw.neurons:
            layers = list(raw.layers)
            if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= self.layers:
                raise StoreError(f"Raw layers {layers} must be ascending and among 0 to {self.layers - 1}.")

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values; each unit is ``[topic, first, count, rows]``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("topics", "models", "sites", "tokens"):
            values[name] = list(values[name])
        values["raw"] = asdict(self.raw) | {"layers": list(self.raw.layers)}
        return values | {"units": [list(asdict(unit).values()) for unit in self.units]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """Return the layout that `to_json` wrote; unknown fields of a newer minor version are ignored."""
        known = {field.name: values[field.name] for field in fields(cls)}
        raw = {field.name: values["raw"][field.name] for field in fields(Raw)}
        _check_types(known, raw)
        return cls(**known | {"raw": Raw(**raw), "units": tuple(Unit(*unit) for unit in values["units"])})

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


def _check_types(layout: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError where JSON values are not of the types of a layout, or too large to be true."""
    names = [layout[name] for name in ("topics", "models", "sites", "tokens")]
    numbers = [layout["layers"], layout["parts"], *layout["widths"].values(), *raw["layers"]]
    for unit in layout["units"]:
        topic, *sizes = unit
        names.append([topic])
        numbers += sizes
        if len(sizes) != 3:
            raise ValueError(f"{unit!r} is no unit")
    for site, (count, digest) in raw["neurons"].items():
        names.append([site, digest])
        numbers.append(count)
    if not all(type(value) is list and all(type(name) is str for name in value) for value in names):
        raise TypeError("a name is not text")
    if not all(type(number) is int and 0 <= number <= _LARGEST for number in numbers):
        raise ValueError(f"a size is no whole number from 0 to {_LARGEST}")
    if layout["layers"] > _MOST_LAYERS or type(layout["settings"]) is not dict:
        raise ValueError("the number of layers is too large to be true, or the settings are no object")


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
