"""What a fine-tune does against spill-over: which modes, on which neurons, and what goes with what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pnlac_fast import store as stores
from pnlac_fast.anchoring import Anchor
from pnlac_fast.base_activations import base_activations, stored_activations
from pnlac_fast.datasets import Question, by_topic, fingerprint
from pnlac_fast.divergence import KLToBase
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.masks import MODES as WEIGHTS
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, for_training, lowest_like, random_like
from pnlac_fast.null_space import NullSpace
from pnlac_fast.penalties import Penalty
from pnlac_fast.references import references
from pnlac_fast.rivals import ResidualEdit, Rival
from pnlac_fast.scores import scores

MODES = (*WEIGHTS, "nullspace", "anchor", "kl")  # what trains, which way, and what is minimised beside
ON_NEURONS = (*WEIGHTS, "anchor")
ON_OTHERS = ("nullspace", "kl")  # need questions of other topics


@dataclass(frozen=True, eq=False)
class Interventions:
    """The modes of one fine-tune, with all that they need.

    Attributes
    ----------
    modes
        In the order of ``MODES``.
    sets
        Neurons of each mode that has any.
    factor
        Of the mode "freeze", see :class:`pnlac_fast.inhibition.InhibitFT`.
    anchor_weight, kl_weight
        Of the penalties.
    null_share
        Of the mode "nullspace", see :class:`pnlac_fast.null_space.NullSpace`.
    others
        Questions of other topics, for the modes "nullspace" and "kl".
    other_texts, other_max_new_tokens
        See :func:`pnlac_fast.references.references`.
    anchor_store
        Where the base's activations are, for the mode "anchor"; see
        :func:`pnlac_fast.base_activations.stored_activations`. Default: read them with the model.
    rival
        What InhibitFT is compared with, instead of any mode.
    """

    modes: tuple[str, ...]
    sets: Mapping[str, NeuronSet]
    factor: float = 0.0
    anchor_weight: float = 1.0
    kl_weight: float = 1.0
    null_share: float = 0.8
    others: tuple[Question, ...] = ()
    other_texts: str = "answers"
    other_max_new_tokens: int = 64
    rival: Rival | None = None
    anchor_store: str | Path | None = None

    def __post_init__(self) -> None:
        if self.factor and "freeze" not in self.modes:
            raise UserError("An inhibit factor slows frozen neurons: choose mode freeze, or leave the factor out.")
        if self.anchor_store is not None and "anchor" not in self.modes:
            raise UserError("A store of base's activations is for anchoring: choose mode anchor, or leave it out.")
        if self.rival is not None and self.modes:
            raise UserError(
                f"A rival is compared with InhibitFT, not combined: give --rival {self.rival.name} or "
                f"--inhibit-mode {','.join(self.modes)}."
            )

    @property
    def name(self) -> str:
        """Such as "anchor+kl"; that of the rival; "plain" where there is neither."""
        return "+".join(self.modes) or ("plain" if self.rival is None else self.rival.name)

    @property
    def record(self) -> dict[str, dict[str, Any]]:
        """What a fine-tune's record says of each mode."""
        found: dict[str, dict[str, Any]] = {}
        for mode in self.modes:
            found[mode] = describe(self.sets[mode]) if mode in self.sets else {}
        if "freeze" in found:
            found["freeze"]["factor"] = self.factor
        if "anchor" in found:
            found["anchor"]["weight"] = self.anchor_weight
        for mode in ON_OTHERS:
            if mode in found:
                own = {"weight": self.kl_weight} if mode == "kl" else {"null_share": self.null_share}
                found[mode] = {
                    **own,
                    "on": self.other_texts,
                    "topics": list(by_topic(self.others)),
                    "questions": len(self.others),
                    "sha256": fingerprint(self.others),
                    "max_new_tokens": self.other_max_new_tokens,
                }
        return found

    def weights(self) -> InhibitFT | None:
        """The callback that decides which weights train, where one of the modes does."""
        for mode in WEIGHTS:
            if mode in self.modes:
                return InhibitFT(self.sets[mode], mode, self.factor)
        return None

    def edits(self, last_projection: str | None = None) -> list[ResidualEdit]:
        """The callback by which a rival edits the residual stream, where it does."""
        edit = None if self.rival is None else self.rival.callback(last_projection)
        return [] if edit is None else [edit]

    def beside(
        self, module: nn.Module, model: Model, rows: Sequence[Sequence[int]], template: str, batch_size: int, seed: int
    ) -> list[Penalty | NullSpace]:
        """The callbacks that need the base beside what trains, made while the model still is its base.

        Parameters
        ----------
        module, model
            What trains, as the Trainer and as this package sees it.
        rows
            Token ids of the rows to train on.
        batch_size
            Rows of one part of a batch, and so texts of the KL.
        """
        found: list[Penalty | NullSpace] = []
        if "anchor" in self.modes:
            neurons = self.sets["anchor"]
            if self.anchor_store is None:
                base = base_activations(module, rows, neurons)
            else:
                base = stored_activations(self.anchor_store, neurons)
            found.append(Anchor(neurons, self.anchor_weight, base))
        if set(ON_OTHERS) & set(self.modes):
            options: dict[str, Any] = {"max_new_tokens": self.other_max_new_tokens, "seed": seed}
            texts = references(model, self.others, texts=self.other_texts, template=template, **options)
            last = model.weights.last_projection
            if "nullspace" in self.modes:
                found.append(NullSpace(texts, self.null_share, batch_size=batch_size, last_projection=last))
            if "kl" in self.modes:
                found.append(KLToBase(texts, self.kl_weight, batch_size=batch_size, seed=seed))
        return found


def combine(
    inhibit: NeuronSet | Mapping[str, NeuronSet] | None, modes: str | Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, NeuronSet]]:
    """The modes of a fine-tune in the order of ``MODES``, and the neurons of each that has any.

    Parameters
    ----------
    inhibit
        Neurons for every mode that needs some, or neurons by mode.
    modes
        One or several, also as "anchor,kl". Default: "freeze" where there are neurons, or the modes that have some.

    Raises
    ------
    UserError
        A mode is unknown, lacks neurons, or does not go with another; neurons have no mode.
    """
    if modes is None:
        modes = () if inhibit is None else ("freeze",) if isinstance(inhibit, NeuronSet) else tuple(inhibit)
    asked = modes.split(",") if isinstance(modes, str) else list(modes)
    for mode in asked:
        if mode not in MODES:
            raise unknown("inhibit mode", mode, MODES)
    if set(WEIGHTS) <= set(asked):
        raise UserError("Modes freeze and specific both say which weights train: choose one of them.")
    needing = [mode for mode in ON_NEURONS if mode in asked]
    sets = dict.fromkeys(needing, inhibit) if isinstance(inhibit, NeuronSet) else dict(inhibit or {})
    if inhibit is not None and (not sets or set(sets) - set(needing)):
        raise UserError(f"Neurons have no effect in mode {' and '.join(asked)}: add freeze, specific or anchor.")
    if lacking := [mode for mode in needing if mode not in sets]:
        raise UserError(f"Mode {lacking[0]} needs neurons: give those of pnlac-fast locate with --inhibit.")
    own, held = sets.get("specific"), sets.get("anchor")
    if own and held and own.site == held.site and (both := int((own.member & held.member).sum())):
        raise UserError(f"{both} neurons are to train alone and to be anchored: give the mode anchor others.")
    return tuple(mode for mode in MODES if mode in asked), sets


def choose_sets(
    path: str | Path,
    modes: Sequence[str],
    topic: str,
    *,
    names: Sequence[str] = (),
    control: str | None = None,
    store: str | Path | None = None,
) -> dict[str, NeuronSet]:
    """The sets of a neuron file for each mode that needs one, see :func:`pnlac_fast.neurons.for_training`.

    Parameters
    ----------
    names
        "SET", for all of them, or "MODE=SET".
    control
        Other neurons in their place, as many in every layer: a seed for random ones, or "lowest" for those that rank
        lowest by the score that the sets were located with, in ``store``.
    """
    needing = [mode for mode in modes if mode not in ON_OTHERS]
    named: dict[str, str] = {}
    for name in names:
        mode, equals, rest = name.partition("=")
        if equals and mode not in needing:
            raise unknown("mode with neurons", mode, needing)
        named |= {mode: rest} if equals else dict.fromkeys(needing, name)
    chosen = {mode: for_training(path, mode, topic, name=named.get(mode)) for mode in needing}
    return chosen if control is None else {mode: _control(own, control, store) for mode, own in chosen.items()}


def _control(neurons: NeuronSet, control: str, store: str | Path | None) -> NeuronSet:
    if control.isdecimal():
        return random_like(neurons, int(control), exclude=neurons.member)
    if control != "lowest":
        raise unknown("control", control, ("lowest", "0", "1"))
    if store is None:
        raise UserError("The lowest-ranked neurons are found by their scores: give the store with --control-store.")
    moments = stores.open_contrast(store)
    score = str(neurons.found.get("score", "rms"))
    for dim, name in (("model", neurons.model), ("site", neurons.site), ("tokens", neurons.found.get("tokens"))):
        if name not in moments[dim].values:
            raise unknown(dim, str(name), map(str, moments[dim].values))
    own = moments.sel(model=neurons.model, site=neurons.site, tokens=neurons.found["tokens"])
    value = scores(own, score).isel(neuron=slice(0, neurons.member.shape[1]))
    return lowest_like(neurons, value.transpose("topic", "layer", "neuron").values)


def describe(neurons: NeuronSet) -> dict[str, Any]:
    """Neurons as a fine-tune's record has them."""
    return {
        "set": neurons.name,
        "kind": neurons.kind,
        "site": neurons.site,
        "count": len(neurons),
        "share": neurons.share,
        "denominator": "all neurons of the site",
        "sha256": hashlib.sha256(np.packbits(neurons.member).tobytes()).hexdigest(),
        "found": dict(neurons.found),
    }


def questions_of_others(
    questions: Sequence[Question], tuned: Sequence[str], topics: Sequence[str] | None
) -> tuple[Question, ...]:
    """The questions of topics that are not tuned on: of those named, or of all others.

    Raises
    ------
    UserError
        A topic is tuned on or has no questions, or none is left.
    """
    groups = by_topic(questions)
    for topic in topics or ():
        if topic not in groups:
            raise unknown("topic", topic, groups)
        if topic in tuned:
            raise UserError(f"'{topic}' is tuned on, so that the model cannot be held to its base there: name others.")
    chosen = tuple(q for topic in (topics or groups) if topic not in tuned for q in groups[topic])
    if not chosen:
        raise UserError("There are no questions of other topics to hold the model to its base on: give --other-data.")
    return chosen
