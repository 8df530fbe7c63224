"""How much of a tuned model's shift a patched model shows. Only numpy and xarray."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pnlac_fast import coupling

PARTS = ("on", "off")
BOUNDS = ("estimate", "low", "high")


def recovered(patching: xr.Dataset, *, boots: int = 2000, seed: int = 0) -> xr.DataArray:
    """Recovered fraction of the shift, for every run of a patching result.

    (patched - unpatched) / (source - unpatched), in mean margin: on the topic tuned on, and averaged over the others
    (arXiv 2508.02360 has it per topic, in S). Base into tuned, it is the share that is undone.

    Parameters
    ----------
    patching
        What :func:`pnlac_fast.patch` returns.
    boots, seed
        Resamples of the questions behind the 95 % intervals; the same for all runs.

    Returns
    -------
    xarray.DataArray
        float64 (run, part, bound), the ratio above: part "on" and "off", bound "estimate", "low" and "high". NaN where
        there was no shift, where the tuned topic is not among the questions, and off topic where there is no other
        topic.
    """
    names = [str(t) for t in patching["topic"].values]
    order = list(dict.fromkeys(names))
    draws = coupling.stances(
        patching["margin"].transpose("run", "question").values,
        names,
        order,
        weights=coupling.resamples(names, boots, seed),
    )
    label, model, tuned, direction = (
        [str(v) for v in patching[name].values] for name in ("neurons", "model", "tuned_topic", "direction")
    )
    ends = {(model[i], direction[i], name): i for i, name in enumerate(label) if name in ("none", "tuned")}
    found = np.full((len(label), len(PARTS), len(BOUNDS)), np.nan)
    for run in range(len(label)):
        none, source = (draws[:, ends[model[run], direction[run], end]] for end in ("none", "tuned"))
        moved, whole = draws[:, run] - none, source - none
        if tuned[run] not in order:
            continue
        at = order.index(tuned[run])
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite becomes NaN
            found[run, 0] = coupling.interval(moved[:, at] / whole[:, at])
            if len(order) > 1:
                off = coupling.off_topic(moved, at).mean(-1) / coupling.off_topic(whole, at).mean(-1)
                found[run, 1] = coupling.interval(off)
    return xr.DataArray(
        found,
        dims=("run", "part", "bound"),
        coords={"part": np.array(PARTS, object), "bound": np.array(BOUNDS, object)},
        attrs={"boots": boots, "seed": seed},
    )
