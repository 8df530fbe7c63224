"""The plan of a study: which neurons, which methods, and with what options, as a TOML file says it."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pnlac_fast.caching import cache
from pnlac_fast.datasets import SIDES
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.localize import locate
from pnlac_fast.patching import patch
from pnlac_fast.rivals import Rival
from pnlac_fast.scoring import score
from pnlac_fast.sweeping import KNOWN

EMBEDDED = ("testbed", "model", "demo")
# What the study itself gives to a function, and no plan may.
GIVEN = (
    *("model", "tuned", "data", "probe", "out", "store", "neurons"),
    *("template", "progress", "overwrite", "training_data"),
)
DIRECTED = ("caft", "steer")  # rivals that need a store


@dataclass(frozen=True)
class StudyPlan:
    """What a study does.

    Attributes
    ----------
    side
        Whose completions the fine-tunes learn.
    finetune, cache, patch, curve, score
        Options of :func:`pnlac_fast.finetune` for all methods, of :func:`pnlac_fast.cache`, of
        :func:`pnlac_fast.patch` for the located sets and for the curve (None: no curve), of :func:`pnlac_fast.score`.
    neurons
        Options of :func:`pnlac_fast.locate` by a name that methods give as ``inhibit``. The first is patched and shown.
    methods
        As those of :func:`pnlac_fast.sweeping.plan_runs`, "plain" among them; ``topic`` is that of the study unless
        a method names its own.
    topics
        Which are tuned on in turn; none: all of the data.
    opposite, after
        Of so many of these topics, the first ones, a model tuned plainly to the other side is scored too; and the
        models of all methods are read once more, for what became of the neurons, and for utility.
    """

    side: str
    neurons: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    finetune: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    patch: Mapping[str, Any] = field(default_factory=dict)
    curve: Mapping[str, Any] | None = None
    score: Mapping[str, Any] = field(default_factory=dict)
    topics: Sequence[str] = ()
    opposite: int = 0
    after: int = 0

    @property
    def held_out(self) -> set[int]:
        """How many topics its neurons and its KLs leave out."""
        counts = [one["hold_out"] for one in self.neurons.values() if "hold_out" in one]
        counts += [one["hold_out"] for one in (self.finetune, *self.methods.values()) if "hold_out" in one]
        return {int(count) for count in np.hstack([0, *counts]) if count}


def embedded_plan(name: str) -> str:
    """The text of a plan that comes with the package, one of :data:`EMBEDDED`."""
    if name not in EMBEDDED:
        raise unknown("embedded plan", name, EMBEDDED)
    return (files("pnlac_fast") / "plans" / f"{name}.toml").read_text()


def read_plan(plan: str | Path | Mapping[str, Any], base: str) -> StudyPlan:
    """A plan from a file, or from what such a file holds.

    Parameters
    ----------
    plan
        A TOML or JSON file, or its content. Tables that it lacks are those of the embedded plan ``base``.

    Raises
    ------
    UserError
        It cannot be read, or names what does not exist.
    """
    if not isinstance(plan, Mapping):
        try:
            text = Path(plan).read_text()
            plan = json.loads(text) if Path(plan).suffix == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(f"'{plan}' is no plan of a study ({error}): see pnlac-fast study --show-plan.") from error
    known = (
        "side",
        "topics",
        "finetune",
        "cache",
        "neurons",
        "patch",
        "curve",
        "score",
        "opposite",
        "after",
        "methods",
    )
    for name in plan:
        if name not in known:
            raise unknown("part of a study's plan", name, known)
    whole: dict[str, Any] = {**tomllib.loads(embedded_plan(base)), **plan}
    _check(whole)
    return StudyPlan(**whole)


def _check(plan: Mapping[str, Any]) -> None:
    if plan["side"] not in SIDES:
        raise unknown("side", str(plan["side"]), SIDES)
    verbs: dict[str, Callable[..., Any]] = {"cache": cache, "patch": patch, "curve": patch, "score": score}
    for name, verb in verbs.items():
        _known(f"option of [{name}]", plan.get(name, {}), list(inspect.signature(verb).parameters))
    for name, options in plan["neurons"].items():
        _known(f"option of [neurons.{name}]", options, list(inspect.signature(locate).parameters))
    if not plan["neurons"]:
        raise UserError("The plan locates no neurons: give it a table such as [neurons.general].")
    if "plain" not in plan["methods"]:
        raise UserError("The plan has nothing to compare with: give it a table [methods.plain].")
    _known("option of [finetune]", plan.get("finetune", {}), KNOWN)
    for name, options in plan["methods"].items():
        if (neurons := options.get("inhibit")) is not None and neurons not in plan["neurons"]:
            raise unknown(f"neurons of method '{name}'", str(neurons), plan["neurons"])
        if (rival := options.get("rival")) is not None and rival not in DIRECTED:
            Rival(rival, options.get("rival_strength"), options.get("rival_text"))  # what it lacks is said now
        if rival in DIRECTED and "resid" not in plan["cache"].get("sites", ()):
            raise UserError(f"Method '{name}' edits the residual stream: add resid to the sites of [cache].")


def _known(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known or name in GIVEN:
            raise unknown(what, name, [each for each in known if each not in GIVEN])
