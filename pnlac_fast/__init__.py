"""Find, test and inhibit the neurons by which a fine-tune on one topic moves the others.

The verbs of the command line are functions of the same name here: ``pnlac_fast.cache(...)`` is
``pnlac-fast cache``. They are imported on first use, so that importing this package loads no torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("pnlac-fast")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+uninstalled"

_VERBS = {
    "cache": "caching",
    "recount": "recounting",
    "merge": "store",
    "info": "store",
    "locate": "localize",
    "patch": "patching",
    "finetune": "training",
    "sweep": "sweeping",
    "generate": "generation",
    "score": "scoring",
    "utility": "side_effects",
    "report": "reporting",
    "publish": "publishing",
    "study": "studying",
    "demo": "demonstration",
    "env": "environment",
    "bench": "benchmarking.suite",
    "self_check": "checkup",
    "load_model": "loading",
    "load_tuned": "loading",
    "from_hf": "loading",
    "load_questions": "datasets",
    "attribute": "attribution",
    "contrast_sides": "sides",
    "noise_floor": "noise",
    "load_patched": "patches",
    "NeuronSet": "neurons",
    "slice_neurons": "slices",
    "merge_slices": "slice_file",
}

__all__ = [*_VERBS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'pnlac_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pnlac_fast.{_VERBS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
