"""Fine-tunes side by side: the trajectories of several runs as one result, from which methods are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.errors import UserError
from pnlac_fast.interventions import ON_OTHERS
from pnlac_fast.loading import FINETUNE_FILE
from pnlac_fast.reporting.rows import COST, MethodRow
from pnlac_fast.trajectory import TRAJECTORY_FILE, load_trajectory


def as_run(trajectory: xr.Dataset, record: Mapping[str, Any]) -> xr.Dataset:
    """A trajectory (point, question) as a result of one run, (run, point, question).

    Parameters
    ----------
    trajectory, record
        Of a :class:`pnlac_fast.training.FineTune`.

    Returns
    -------
    xarray.Dataset
        ``margin`` and ``step``, with coordinates ``method`` (see :func:`method_name`; "kl_seen" where it has read all
        topics that could be judged), ``tuned_topic``, ``seen_topics``
        (joined by "+"), ``draw`` (seed of random neurons, else -1), ``count`` and ``share`` (of all neurons, those of
        the first mode that has any), ``learning_rate`` and ``seed`` on run; and of its ``COST`` what was recorded,
        NaN else.
    """
    inhibit = record["inhibit"]
    sets = [one for one in inhibit.values() if "count" in one] or [{"count": 0, "share": 0.0, "kind": "", "found": {}}]
    seen = next((inhibit[mode]["topics"] for mode in ON_OTHERS if mode in inhibit), ())
    judged = {str(t) for t in trajectory["topic"].values} - {*seen, record["tuned_topic"]}
    name = method_name(record) if judged or not seen else f"{method_name(record)}_seen"
    draws = [one["found"].get("seed", -1) for one in sets if one["kind"] == "random"]
    values: dict[str, Any] = {
        "method": np.array([name], dtype=object),
        "tuned_topic": np.array([record["tuned_topic"]], dtype=object),
        "seen_topics": np.array(["+".join(seen)], dtype=object),
        "draw": [draws[0] if draws else -1],
        "count": [sets[0]["count"]],
        "share": [sets[0]["share"]],
        "learning_rate": [record["learning_rate"]],
        "seed": [record["seed"]],
        **{name: [_number(record.get("cost", {}).get(name))] for name in COST},
    }
    return trajectory.expand_dims("run").assign_coords({name: ("run", value) for name, value in values.items()})


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def method_name(record: Mapping[str, Any]) -> str:
    """What a run is called in comparisons.

    "plain"; "freeze_5" where 5 % of all neurons were frozen; "specific_10" where only those specific in the top 10 %
    were trained; "freeze_random_5" and "specific_random_10" with random neurons in their place; "slow_5_by_0.5" where
    5 % took half of each step; "anchor_5" and "kl", with "_by_3" for a weight of 3; "anchor_5+kl" for both together;
    "nullspace", and "nullspace_50" for another share than 80 %.
    Rivals are "mlp", "inoculate", or with their strength "rate_0.1", "caft_1", "steer_1". "freeze_lowest_5" is freezing
    the lowest-ranked neurons.
    """
    rival = record.get("rival")
    if rival is not None:
        return rival["name"] if rival.get("strength") is None else f"{rival['name']}_{rival['strength']:g}"
    return "+".join(_mode_name(mode, one) for mode, one in record["inhibit"].items()) or "plain"


def _mode_name(mode: str, one: Mapping[str, Any]) -> str:
    weight = "" if one.get("weight", 1) == 1 else f"_by_{one['weight']:g}"
    if mode == "kl":
        return f"kl{weight}"
    if mode == "nullspace":
        return "nullspace" if one["null_share"] == 0.8 else f"nullspace_{100 * one['null_share']:.0f}"
    percent = 100 * (one["found"].get("top", one["share"]) if mode == "specific" else one["share"])
    control = f"{one['kind']}_" if one["kind"] in ("random", "lowest") else ""
    amount = f"{control}{percent:{'.0f' if percent >= 0.5 else '.2g'}}"
    return f"slow_{amount}_by_{one['factor']:g}" if one.get("factor") else f"{mode}_{amount}{weight}"


def compare(training: xr.Dataset, boots: int = 2000, seed: int = 0) -> list[MethodRow]:
    """Every method beside plain tuning of the same topic and seed, at equal steps and at equal on-topic shift.

    See :func:`pnlac_fast.coupling.at_shift`, :func:`pnlac_fast.coupling.reduction` and
    :func:`pnlac_fast.coupling.over_seeds`.

    Parameters
    ----------
    training
        (run, point, question), from :func:`join`, :func:`collect` or :func:`pnlac_fast.sweeping.sweep`.
    boots, seed
        Resamples of the questions behind each 95 % interval.

    Returns
    -------
    list of MethodRow
        One for each method and comparison: coupling in nats, reduction and retention as ratios, with their intervals,
        and those of each random control.

    Raises
    ------
    UserError
        There is no plain run to compare with.
    """
    from pnlac_fast.reporting.tables import method_rows

    rows, _ = method_rows(training, boots, seed)
    if not rows:
        raise UserError("There is no plain fine-tune to compare with on these topics: add one without modes or rival.")
    return rows


def join(runs: Sequence[xr.Dataset]) -> xr.Dataset:
    """Several runs as one result; shorter ones end in step -1 and NaN.

    Raises
    ------
    UserError
        The runs were not probed with the same questions in the same way.
    """
    first = runs[0]
    for run in runs[1:]:
        same = first["key"].values.tolist() == run["key"].values.tolist()
        if not same or first.attrs["normalise"] != run.attrs["normalise"]:
            raise UserError(
                "The fine-tunes were probed with different questions or normalisation, so their stances cannot be "
                "compared: tune them with the same --probe and --normalise."
            )
    points = max(run.sizes["point"] for run in runs)
    filled = {"step": -1, "margin": np.nan}
    padded = [run.pad(point=(0, points - run.sizes["point"]), constant_values=filled) for run in runs]
    joined = xr.concat(padded, "run", data_vars="all", coords="minimal", compat="override", join="exact")
    return joined.assign(step=joined["step"].astype("i8"))


def collect(paths: Sequence[str | Path]) -> xr.Dataset:
    """The trajectories of fine-tuned directories, as written by ``pnlac-fast finetune --probe``.

    Raises
    ------
    UserError
        A directory has no record or no trajectory, or none is given.
    """
    if not paths:
        raise UserError("There is no fine-tune to compare: give at least one --run.")
    runs = []
    for path in map(Path, paths):
        if not (path / FINETUNE_FILE).is_file():
            raise UserError(f"'{path}' is not a model tuned by pnlac-fast finetune: it has no {FINETUNE_FILE}.")
        runs.append(as_run(load_trajectory(path / TRAJECTORY_FILE), json.loads((path / FINETUNE_FILE).read_text())))
    return join(runs)
