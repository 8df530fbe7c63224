"""Which neurons are patched: those that were located, sets of other sizes, and random ones to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pnlac_fast.errors import UserError
from pnlac_fast.localize import resize
from pnlac_fast.neurons import NeuronSet, choose, random_from, random_like
from pnlac_fast.top_sets import Localization, top_set

SETS = ("general", "specific", "top", "random")
ALL_SETS = (*SETS, "random_top", "mean", "off_minus_on", "on_minus_off")


@dataclass(frozen=True)
class Chosen:
    """Neurons to patch: ``kind`` is one of :data:`ALL_SETS`, ``draw`` the number of a random set, else -1."""

    kind: str
    draw: int
    neurons: NeuronSet


def choose_all(
    located: Mapping[str, NeuronSet],
    model: str,
    topic: str,
    kinds: Sequence[str],
    *,
    draws: int,
    seed: int,
    shares: Sequence[float] = (),
    store: str | Path | None = None,
) -> list[Chosen]:
    """Everything that is patched for one model tuned on ``topic``, smallest share first.

    Without ``shares``, the sets as they were located; else sets of these shares of all neurons, by the scores in
    ``store``. Random sets follow the general one of the same size.

    Raises
    ------
    UserError
        A set was not located, is not to be had at a chosen size, or leaves too few neurons to draw from.
    """
    kinds = kinds or (("general", "random") if shares else SETS)
    located_general = choose(located, "general", model=model)
    tops = [s.member for s in located.values() if s.kind == "top" and s.model == located_general.model]
    found: list[Chosen] = []
    sizes: list[Localization | None] = [resize(store, located_general, share) for share in sorted(shares) if store]
    for again in sizes or [None]:
        general = located_general if again is None else again.general
        for kind in kinds:
            if kind == "random":
                drawn = [random_like(general, seed + i, exclude=general.member) for i in range(draws)]
            elif kind == "random_top":
                drawn = [random_from(general, np.any(tops, axis=0), seed + i) for i in range(draws)]
            elif again is None:
                own = topic if kind in ("specific", "top") else ""
                found.append(Chosen(kind, -1, choose(located, kind, model=model, topic=own)))
                continue
            else:
                found.append(Chosen(kind, -1, _sized(again, kind, topic)))
                continue
            found += [Chosen(kind, i, neurons) for i, neurons in enumerate(drawn)]
    return found


def _sized(again: Localization, kind: str, topic: str) -> NeuronSet:
    """A set of as many neurons as are general."""
    if kind in ("general", "mean"):
        return again.general if kind == "general" else again.mean
    if kind == "top" and topic in again.top:
        member = top_set(again.score.sel(topic=topic).values, again.general.share)
        return replace(again.top[topic], member=member)
    if kind not in again.contrasted:
        raise UserError(f"There is no {kind} set of a chosen size for '{topic}': leave it out, or give no --shares.")
    return again.contrasted[kind]
