"""How far scorers agree on the same answers, and how often each is wrong where people say what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast import coupling
from pnlac_fast.errors import UserError

LABELS = (-1, 0, 1)
BOOTS = 2000


def agreement(results: Sequence[xr.Dataset], *, boots: int = BOOTS, seed: int = 0) -> xr.Dataset:
    """Cohen's kappa and error rates of scorers that judged the same answers.

    Log-probability takes part with the side that a model finds likelier on each question; it reads no answer, so its
    agreement with judges says whether what models prefer and what they write move together. An answer without a label
    counts as "neither", unless a sheet of people lacks it: then it is left out of all that concerns the sheet.

    Parameters
    ----------
    results
        From :func:`pnlac_fast.score`, two or more, over the same models and questions.
    boots, seed
        Resamples of the questions behind each 95 % interval; the answers of all models to a question go together.

    Returns
    -------
    xarray.Dataset
        ``kappa`` and ``error`` float64 (scorer, other, bound: estimate, low, high) and ``n`` int64 (scorer, other), how
        many answers were compared. ``error`` is the share of answers on which ``scorer`` differs from ``other``, which
        is an error rate where ``other`` is a sheet of people. Kappa (Cohen 1960, doi 10.1177/001316446002000104) is
        NaN where both give one label only.

    Raises
    ------
    UserError
        There are fewer than two results, or they are of different models, questions or answers.
    """
    if len(results) < 2:
        raise UserError("Agreement takes two scorers or more: give --scorer more than once.")
    first = results[0]
    answered = [result for result in results if "answer" in result]
    for result in results[1:]:
        for name in ("model", "key"):
            if result[name].values.tolist() != first[name].values.tolist():
                raise UserError("The scorers were given other models or questions: score them with the same ones.")
    for result in answered[1:]:
        if not (result["answer"].values == answered[0]["answer"].values).all():
            raise UserError(
                "The scorers judged different answers: generate them once (pnlac-fast generate --out FILE), and score "
                "all with --answers FILE."
            )
    names = [str(result.attrs["scorer"]) for result in results]
    labels = np.stack([_labels(result) for result in results])  # [scorer, run, question]
    given = np.stack([_given(result) for result in results])
    weights = coupling.resamples([str(t) for t in first["topic"].values], boots, seed)
    size = (len(names), len(names))
    kappa, error = np.full((*size, 3), np.nan), np.full((*size, 3), np.nan)
    n = np.zeros(size, np.int64)
    for i in range(len(names)):
        for j in range(len(names)):
            both = given[i] & given[j]
            tables = _tables(labels[i], labels[j], both, weights)
            n[i, j] = int(both.sum())
            kappa[i, j] = coupling.interval(cohens_kappa(tables))
            error[i, j] = coupling.interval(1 - _observed(tables))
    dims = ("scorer", "other", "bound")
    coords: dict[str, Any] = {name: np.array(names, dtype=object) for name in dims[:2]}
    coords["bound"] = np.array(["estimate", "low", "high"], dtype=object)
    data = {"kappa": (dims, kappa), "error": (dims, error), "n": (dims[:2], n)}
    return xr.Dataset(data, coords, {"boots": boots, "seed": seed, "provenance": first.attrs["provenance"]})


def cohens_kappa(tables: np.ndarray) -> np.ndarray:
    """Agreement beyond chance, [...], of contingency tables [..., label, label]; NaN where chance explains all.

    Cohen 1960, doi 10.1177/001316446002000104.
    """
    total = tables.sum((-2, -1))
    rows, columns = tables.sum(-1), tables.sum(-2)
    observed = _observed(tables)
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = (rows * columns).sum(-1) / total**2
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def agreement_rows(results: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """One record per pair of scorers: ``scorer``, ``other``, ``answers``, ``kappa`` and ``error`` with intervals.

    Parameters
    ----------
    results
        As from :func:`pnlac_fast.score` or from a store; none where they hold no "agreement".
    """
    if (found := results.get("agreement")) is None:
        return []
    names = [str(name) for name in found["scorer"].values]
    return [
        {
            "scorer": name,
            "other": other,
            "answers": int(found["n"].values[i, j]),
            "kappa": [float(v) for v in found["kappa"].values[i, j]],
            "error": [float(v) for v in found["error"].values[i, j]],
        }
        for i, name in enumerate(names)
        for j, other in enumerate(names)
        if i < j
    ]


def _labels(result: xr.Dataset) -> np.ndarray:
    """int8 [run, question]."""
    variable = "label" if "label" in result else "margin"
    return np.sign(result[variable].transpose("run", "question").values).astype(np.int8)


def _given(result: xr.Dataset) -> np.ndarray:
    """bool [run, question]: which answers count. People label a sample; what a machine fails on is its failure."""
    if str(result.attrs["scorer"]).startswith("csv:"):
        return ~result["unparsed"].transpose("run", "question").values
    return np.ones(_labels(result).shape, bool)


def _tables(one: np.ndarray, two: np.ndarray, both: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Contingency tables [draw, label, label] of two scorers' labels [run, question], questions weighted by draw."""
    cells = [[((one == a) & (two == b) & both).sum(0) for b in LABELS] for a in LABELS]
    return np.einsum("dq,abq->dab", weights, np.array(cells, float))


def _observed(tables: np.ndarray) -> np.ndarray:
    total = tables.sum((-2, -1))
    agreed = np.trace(tables, axis1=-2, axis2=-1)
    return np.divide(agreed, total, out=np.full(total.shape, np.nan), where=total > 0)
