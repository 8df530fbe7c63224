"""What this machine offers: versions, devices, engines, and whether a model is as this package takes it to be."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import pnlac_fast
from pnlac_fast import ops
from pnlac_fast.checkup import self_check
from pnlac_fast.loading import opened
from pnlac_fast.models import Model
from pnlac_fast.provenance import PACKAGES, versions


def env(model: str | Path | Model | None = None) -> dict[str, Any]:
    """Versions, devices and the engines of :mod:`pnlac_fast.ops`, each "available" or the reason why it is not.

    Parameters
    ----------
    model
        Also load this model, and try it: see :func:`pnlac_fast.checkup.self_check`.

    Returns
    -------
    dict
        "pnlac-fast" and every package it runs on, by name: versions; ``threads``, ``devices``, ``engines``; and with a
        model ``model``, its origin and what the check found.

    Raises
    ------
    UserError
        The model cannot be loaded or its sites are not found.
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
        loaded = opened(model)
        report["model"] = {**loaded.origin, **self_check(loaded)}
    return report
