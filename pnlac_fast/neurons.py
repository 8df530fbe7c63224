"""Sets of neurons: values that know where they belong, their files, and random ones to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.hub import local

NEURONS_FILE = "neurons.json"  # as locate's examples call it, and the hub does
FORMAT = {"format": "pnlac-neurons", "version": 1}
SIDES = "sides"  # in place of a tuned model: found by contrasting right and left texts, hence for any tuned model


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Neurons of one site, and how they were found.

    Attributes
    ----------
    name
        Such as "immigration/general" or "immigration/specific/race".
    kind
        "general", "specific" or "top"; "mean", "off_minus_on" or "on_minus_off" (no intersection); "random" or
        "random_top" (to compare with).
    member
        bool [layer, neuron].
    site
        Where these neurons are read.
    model
        Name of the tuned model that they were located with, or "sides" where there was none.
    topic
        Probe topic of a specific or top set, else "".
    base
        Origin of the base model (see :class:`pnlac_fast.models.Model`).
    found
        How: score, top fraction, tokens, kind of specificity, store.
    """

    name: str
    kind: str
    member: np.ndarray
    site: str = "mlp_mid"
    model: str = ""
    topic: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.member.sum())

    @property
    def share(self) -> float:
        """Share of all neurons of the site."""
        return len(self) / self.member.size

    @property
    def per_layer(self) -> list[int]:
        """Number of neurons in each layer."""
        return [int(n) for n in self.member.sum(1)]

    @property
    def last_projection(self) -> str | None:
        """Path of the MLP's last projection, where the base model had to be loaded with one."""
        return self.base.get("last_projection")

    def layer(self, index: int) -> list[int]:
        """The neurons of one layer, ascending."""
        return [int(n) for n in self.member[index].nonzero()[0]]

    def fits(self, model: Any) -> None:
        """Refuse a model with other layers or another width, or in parts, and an empty set.

        Raises
        ------
        UserError
            It says which of these, and what to do.
        """
        if not len(self):
            raise UserError(f"The neuron set '{self.name}' is empty: raise --top in pnlac-fast locate.")
        if model.part.ranks > 1:
            raise UserError(f"The neurons of '{model.name}' lie in several processes: load it without tp.")
        shape = (len(model.blocks), model.width(self.site))
        if self.member.shape != shape:
            raise UserError(
                f"The neuron set '{self.name}' is for {self.member.shape[0]} layers of {self.member.shape[1]} neurons, "
                f"the model '{model.name}' has {shape[0]} of {shape[1]}: locate them again on this model."
            )

    def check(self, base: Any) -> None:
        """Refuse another base model than the one that these neurons were found in, by shape and by its weights."""
        self.fits(base)
        for what in ("sha256", "revision"):
            mine, theirs = self.base.get(what), base.origin.get(what)
            if mine and theirs and mine != theirs:
                raise UserError(
                    f"The neuron set '{self.name}' was found in a base model with {what} {mine[:12]}, "
                    f"'{base.name}' has {theirs[:12]}: locate the neurons on this model."
                )


def random_like(neurons: NeuronSet, seed: int, *, exclude: np.ndarray | None = None) -> NeuronSet:
    """Random neurons with the same count in every layer, none of them in ``exclude`` [layer, neuron].

    Where a layer has too few neurons outside ``exclude``, the rest of its count comes from inside, so that counts
    always match.

    Parameters
    ----------
    neurons
        What the random ones are a control of.
    seed
        The same seed draws the same neurons.
    exclude
        bool [layer, neuron]; none by default.

    Returns
    -------
    NeuronSet
        Of the same model and site.
    """
    generator = np.random.default_rng(seed)
    member = np.zeros_like(neurons.member)
    barred = np.zeros_like(member) if exclude is None else exclude
    for layer, count in enumerate(neurons.per_layer):
        order = generator.permutation(member.shape[1])
        member[layer, sorted(order, key=lambda n: bool(barred[layer, n]))[:count]] = True
    found = {**neurons.found, "random_like": neurons.name, "seed": seed}
    return replace(neurons, name=f"{neurons.name}/random{seed}", kind="random", member=member, found=found)


def random_from(neurons: NeuronSet, pool: np.ndarray, seed: int) -> NeuronSet:
    """Random neurons of ``pool`` [layer, neuron], as many as ``neurons`` and none of them.

    As many in every layer as far as the pool has them there; what a layer lacks comes from the others.

    Raises
    ------
    UserError
        The pool has too few neurons.
    """
    generator = np.random.default_rng(seed)
    free = pool & ~neurons.member
    if free.sum() < len(neurons):
        raise UserError(
            f"'{neurons.name}' has {len(neurons)} neurons, the top sets only {int(free.sum())} others to draw from: "
            f"locate with a larger --top, or leave out random_top."
        )
    order = generator.random(free.shape)
    order[~free] = np.inf
    place = order.argsort(1).argsort(1)  # of each neuron among those of its layer
    member = free & (place < np.array(neurons.per_layer)[:, None])
    order[member] = np.inf
    rest = np.unravel_index(order.argsort(None, kind="stable")[: len(neurons) - int(member.sum())], free.shape)
    member[rest] = True
    found = {**neurons.found, "random_from": neurons.name, "seed": seed}
    return replace(neurons, name=f"{neurons.name}/random_top{seed}", kind="random_top", member=member, found=found)


def lowest_like(neurons: NeuronSet, score: np.ndarray) -> NeuronSet:
    """The lowest-ranked neurons, as many in every layer and none of its own where there are enough others.

    ``score`` is [topic, layer, neuron] or [layer, neuron]; a neuron stands as high as its best topic puts it.
    """
    best = score.reshape(-1, *score.shape[-2:]).max(0)
    member = np.zeros_like(neurons.member)
    for layer, count in enumerate(neurons.per_layer):
        order = np.lexsort((best[layer], neurons.member[layer]))
        member[layer, order[:count]] = True
    found = {**neurons.found, "lowest_like": neurons.name}
    return replace(neurons, name=f"{neurons.name}/lowest", kind="lowest", member=member, found=found)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def to_dataset(sets: Sequence[NeuronSet]) -> xr.Dataset:
    """Sets as the store keeps them: ``member`` bool (neuron_set, layer, neuron)."""

    def text(values: list[str]) -> tuple[str, np.ndarray]:
        return "neuron_set", np.array(values, dtype=object)

    return xr.Dataset(
        {"member": (("neuron_set", "layer", "neuron"), np.stack([s.member for s in sets]))},
        coords={
            "neuron_set": text([s.name for s in sets]),
            **{name: text([getattr(s, name) for s in sets]) for name in ("model", "kind", "topic", "site")},
        },
        attrs={"found": json.dumps(dict(sets[0].found))},
    )


def to_record(neurons: NeuronSet) -> dict[str, Any]:
    """A set as plain values that JSON holds: neurons by layer, and where they come from."""
    return {
        "name": neurons.name,
        "kind": neurons.kind,
        "site": neurons.site,
        "model": neurons.model,
        "topic": neurons.topic,
        "layers": neurons.member.shape[0],
        "width": neurons.member.shape[1],
        "base": dict(neurons.base),
        "found": dict(neurons.found),
        "neurons": {str(i): neurons.layer(i) for i, count in enumerate(neurons.per_layer) if count},
    }


def from_record(record: Mapping[str, Any]) -> NeuronSet:
    """The set of a record; ValueError, KeyError, TypeError, IndexError or AttributeError where it is damaged."""
    member = np.zeros((record["layers"], record["width"]), bool)
    for layer, neurons in record["neurons"].items():
        if neurons and (min(neurons) < 0 or int(layer) < 0):
            raise IndexError("negative index")
        member[int(layer), neurons] = True
    names = ("name", "kind", "site", "model", "topic", "base", "found")
    return NeuronSet(member=member, **{name: record[name] for name in names})


def save_sets(sets: Sequence[NeuronSet], path: str | Path) -> None:
    """Write neuron sets to a JSON file: neurons by layer, and where they come from.

    Parameters
    ----------
    sets
        With different names; :func:`load_sets` returns them by these.
    path
        The file, replaced where it exists.
    """
    record = {**FORMAT, "sets": [to_record(s) for s in sets]}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def load_sets(path: str | Path) -> dict[str, NeuronSet]:
    """Read the neuron sets of a JSON file, by name.

    Parameters
    ----------
    path
        The file, or ``hf://USER/NAME`` for that of a repository on the hub, see :func:`pnlac_fast.publish`.

    Returns
    -------
    dict
        Set by name, such as "race/general".

    Raises
    ------
    UserError
        The file does not exist, is not of this format, or names neurons that cannot exist.
    """
    path = local(path, NEURONS_FILE)
    if not Path(path).is_file():
        raise UserError(f"There is no neuron file '{path}': make one with pnlac-fast locate STORE -o {path}.")
    try:
        record = json.loads(Path(path).read_text())
        if record.get("format") != FORMAT["format"] or record["version"] > FORMAT["version"]:
            raise UserError(f"'{path}' is not a pnlac-neurons file of version {FORMAT['version']}: locate them again.")
        sets = {entry["name"]: from_record(entry) for entry in record["sets"]}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"The neuron file '{path}' is damaged ({error}): locate the neurons again.") from error
    return sets


def choose(sets: Mapping[str, NeuronSet], kind: str, *, model: str = "", topic: str = "") -> NeuronSet:
    """The one set of a kind, told apart by tuned model and probe topic where there are several.

    Raises
    ------
    UserError
        None or several fit; it lists the names to choose from.
    """
    fitting = [
        s
        for s in sets.values()
        if s.kind == kind and (not model or s.model in (model, SIDES)) and (not topic or s.topic == topic)
    ]
    if len(fitting) != 1:
        raise UserError(
            f"{len(fitting)} neuron sets are {kind}{f' for {topic}' if topic else ''}: name one of "
            f"{', '.join(s.name for s in (fitting or sets.values()))} with --set."
        )
    return fitting[0]


def for_training(path: str | Path, mode: str, topic: str, *, name: str | None = None) -> NeuronSet:
    """The set of a neuron file that a fine-tune on ``topic`` inhibits.

    ``name`` where it is given; else the general set for the modes "freeze" and "anchor", the topic's specific set for
    "specific", of the model tuned on that topic where the file has several models.
    """
    sets = load_sets(path)
    models = {s.model for s in sets.values()}
    model = topic if len(models) > 1 and topic in models else ""
    if name is not None:
        if name not in sets:
            raise unknown("neuron set", name, sets)
        return sets[name]
    if mode in ("freeze", "anchor"):
        return choose(sets, "general", model=model)
    return choose(sets, "specific", model=model, topic=topic)
