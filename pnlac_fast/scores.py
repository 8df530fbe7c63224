"""Scores of neurons from the moments of a contrast: how far each one moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from pnlac_fast.errors import unknown

SCORES = ("rms", "std_rms", "mean_diff", "cohens_d", "welch_t", "paired_t", "part")
ATTRIBUTION = "attribution"  # needs the models too: see pnlac_fast.attribution


def scores(contrast: xr.Dataset, score: str = "rms") -> xr.DataArray:
    """Score of every neuron, from the moments of a contrast.

    With a the base's activation, b the tuned model's on the same token, d = b - a, n tokens, and s the population
    standard deviation:

    ========= ======================================= ==========================================================
    rms       sqrt(mean d²)                           the paper's (arXiv 2508.02360); in units of the activation
    std_rms   rms / s(a)                              ours; does not favour layers with large activations
    mean_diff abs(mean d)                             a shift in one direction only; in units of the activation
    cohens_d  abs(mean d) / sqrt((s²(a) + s²(b)) / 2) Cohen, Statistical Power Analysis (1988); unpaired
    welch_t   abs(mean d) / sqrt((s²(a) + s²(b)) / m) Welch, Biometrika 34 (1947); unpaired, m = n - 1
    paired_t  abs(mean d) / (s(d) / sqrt(m))          Student, Biometrika 6 (1908); the same tokens, m = n - 1
    part      (mean a² * mean d²) ** (1/4)            ours; 0 unless it fires and changes: what part it takes in a topic
    ========= ======================================= ==========================================================

    Within one topic welch_t ranks as cohens_d does; across topics it grows with the number of tokens. Dividing a
    population deviation by sqrt(n - 1) is dividing that of a sample by sqrt(n).

    Parameters
    ----------
    contrast
        What :func:`pnlac_fast.store.open_contrast` returns, or a selection of it.
    score
        One of the names above.

    Returns
    -------
    xarray.DataArray
        float64, dims of ``contrast["rms"]``: (model, topic, site, tokens, layer, neuron), or those selected; rms,
        mean_diff and part in units of the activation, std_rms and cohens_d in standard deviations, the t of the tests
        in standard errors. A neuron whose denominator is 0 scores 0 where it did not change, and infinity where it did.

    Raises
    ------
    UserError
        There is no such score.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    if score == "rms":
        value = contrast["rms"]
    elif score == "part":
        fires = contrast["mean_base"].astype("f8") ** 2 + contrast["std_base"].astype("f8") ** 2
        value = (contrast["rms"].astype("f8") * fires**0.5) ** 0.5
    elif score == "std_rms":
        value = _ratio(contrast["rms"], contrast["std_base"])
    elif score == "mean_diff":
        value = abs(contrast["mean_diff"])
    elif score == "paired_t":
        value = _ratio(abs(contrast["mean_diff"]), contrast["std_diff"].astype("f8") / _root_of_m(contrast))
    else:
        summed = (contrast["std_base"].astype("f8") ** 2 + contrast["std_tuned"].astype("f8") ** 2) ** 0.5
        value = _ratio(abs(contrast["mean_diff"]), summed / (2**0.5 if score == "cohens_d" else _root_of_m(contrast)))
    return value.astype("f8").transpose(*contrast["rms"].dims)


def toward_tuning(attributed: xr.Dataset, model: str) -> xr.DataArray:
    """Attribution (topic, layer, neuron) of one model, positive where a neuron moves a topic as the tuning does.

    ``attributed`` is what :func:`pnlac_fast.attribution.attribute` returns. The sign is that of the shift on the tuned
    topic, or of the mean shift where that topic is not known or not among the topics.
    """
    own = attributed.sel(model=model)
    topic, shift = str(own["tuned_topic"].values), own["shift"]
    known = topic in [str(t) for t in own["topic"].values]
    side = float(np.sign(shift.sel(topic=topic) if known else shift.mean()))
    return own["attribution"].astype("f8") * (side or 1.0)


def score_table(
    names: Sequence[str], moments: xr.Dataset | None, attributed: xr.Dataset | None, *, site: str, tokens: str
) -> xr.Dataset:
    """Several scores side by side: ``value`` float32 (score, model, topic, site, layer, neuron).

    Models and topics are those of ``moments`` where it is given; what a score does not know of them is NaN.
    """
    tables = []
    for name in names:
        if name == ATTRIBUTION:
            assert attributed is not None
            models = [str(m) for m in attributed["model"].values]
            parts = [toward_tuning(attributed, m).drop_vars("tuned_topic") for m in models]
            table = xr.concat(parts, dim="model", coords="minimal")
        else:
            assert moments is not None
            selected = moments.sel(site=site, tokens=tokens)
            table = scores(selected.isel(neuron=slice(0, int(selected["width"]))), name)
        tables.append(table.astype("f4").reset_coords(drop=True))
    joined = xr.concat(tables, dim="score", join="outer", coords="minimal").expand_dims(site=np.array([site], object))
    joined = joined.assign_coords(score=np.array(list(names), object))
    dims = ("score", "model", "topic", "site", "layer", "neuron")
    return joined.transpose(*dims).to_dataset(name="value").assign_attrs(tokens=tokens)


def _root_of_m(contrast: xr.Dataset) -> xr.DataArray:
    return (contrast["n"].astype("f8") - 1).clip(min=1) ** 0.5


def _ratio(top: xr.DataArray, bottom: xr.DataArray) -> xr.DataArray:
    bottom = bottom.astype("f8")
    return xr.where(bottom > 0, top / bottom.where(bottom > 0, 1), xr.where(top > 0, np.inf, top * 0.0))
