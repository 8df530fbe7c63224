"""Whether fine-tunes with other seeds find the same neurons: overlap of their sets, where they are of one base."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import xarray as xr

from pnlac_fast.chance import Overlap, overlap
from pnlac_fast.neurons import NeuronSet

KINDS = ("general", "specific", "top")
SEED_OVERLAP = "seed_overlap"


def seed_overlap(located: Mapping[int, Mapping[str, NeuronSet]], bases: Mapping[int, str]) -> xr.Dataset:
    """Overlap of the sets that any two seeds found for one tuned topic.

    Neuron 7 of one base is not neuron 7 of another that was trained from other random weights, so seeds with bases of
    their own are not paired.

    Parameters
    ----------
    located
        The sets of each seed, by name, as :func:`pnlac_fast.neurons.load_sets` gives them.
    bases
        What tells the base of each seed from others, such as the sha256 of its weights.

    Returns
    -------
    xarray.Dataset
        ``overlap`` (pair, figure), figures of :func:`pnlac_fast.chance.overlap`, with coordinates ``tuned_topic``,
        ``kind`` ("general"; "specific" and "top" of the tuned topic), ``seed`` and ``other_seed`` on pair; absent where
        no two seeds have one base. ``base`` (base_seed).
    """
    rows: list[tuple[str, str, int, int]] = []
    figures: list[Overlap] = []
    for one, other in itertools.combinations(located, 2):
        if bases[one] != bases[other]:
            continue
        for name, mine in located[one].items():
            topic = str(mine.found.get("tuned_topic", ""))
            if name in located[other] and mine.kind in KINDS and mine.topic in ("", topic):
                rows.append((topic, mine.kind, one, other))
                figures.append(overlap(mine.member, located[other][name].member))
    result = xr.Dataset({"base": ("base_seed", np.array([bases[seed] for seed in located], object))})
    result = result.assign_coords(base_seed=list(located))
    if not rows:
        return result
    coords: dict[str, tuple[str, np.ndarray]] = {"figure": ("figure", np.array(Overlap._fields, object))}
    for i, name in enumerate(("tuned_topic", "kind", "seed", "other_seed")):
        coords[name] = ("pair", np.array([row[i] for row in rows], object if i < 2 else np.int64))
    return result.assign(overlap=(("pair", "figure"), np.array(figures))).assign_coords(coords)
