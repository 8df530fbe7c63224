"""What this machine offers: versions, devices, engines, and whether a model's sites are where they should be."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import pnlac_fast
from pnlac_fast import ops
from pnlac_fast.architecture import SITES
from pnlac_fast.loading import load_model
from pnlac_fast.provenance import PACKAGES, versions


def env(model: str | Path | None = None) -> dict[str, Any]:
    """Versions, devices and the engines of :mod:`pnlac_fast.ops`, each "available" or the reason why it is not.

    Parameters
    ----------
    model
        Also load this model, run four tokens through it, and give its layers and the width of each site.

    Raises
    ------
    UserError
        The model cannot be loaded or its sites are not found.
    RuntimeError
        A site does not run once per layer, or not at the width its configuration says.
    """
    report: dict[str, Any] = {
        "pnlac-fast": pnlac_fast.__version__,
        "python": platform.python_version(),
        **{name: versions()[name] for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "engines": ops.engines(),
    }
    if model is not None:
        report["model"] = _check(str(model))
    return report


def _check(source: str) -> dict[str, Any]:
    model = load_model(source)
    widths: dict[str, list[int]] = {}
    for site in SITES:
        seen = widths[site] = []
        with (
            torch.inference_mode(),
            model.active() as hf,
            model.tapped(site, lambda layer, a, seen=seen: seen.append(a.shape[-1])),  # type: ignore[misc]
        ):
            hf(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=model.device))
        if seen != [model.width(site)] * len(model.blocks):
            raise RuntimeError(
                f"site {site} of '{source}' ran at widths {seen}, expected {model.width(site)} per layer"
            )
    return {**model.origin, "layers": len(model.blocks), "widths": {site: seen[0] for site, seen in widths.items()}}
