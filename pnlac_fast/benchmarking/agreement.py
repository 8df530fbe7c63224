"""What every way of localising computes: the contrast sums by topic, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pnlac_fast.benchmarking.workloads import Workload
from pnlac_fast.capture import Sums

TOKENS = ("prompt", "last")
# Of what a layer's neurons typically are. In bfloat16 another batch rounds every activation differently: by 2 % in the
# last of 32 layers of hidden 1024, more where layers are wider.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sums of a workload.

    Attributes
    ----------
    counts
        int64 [topic, tokens]: tokens counted.
    sums
        float64 [model, topic, tokens, 5, layer, neuron]: sums of a, b, a^2, b^2 and (b - a)^2.
    """

    counts: np.ndarray
    sums: np.ndarray

    def figures(self) -> dict[str, np.ndarray]:
        """Means and root mean squares of base, tuned and their difference, [model, topic, tokens, layer, neuron]."""
        means = self.sums / self.counts[None, :, :, None, None, None]
        named = dict(zip(("mean_base", "mean_tuned"), np.moveaxis(means, 3, 0)[:2], strict=True))
        squares = np.moveaxis(means, 3, 0)[2:]
        return named | dict(zip(("rms_base", "rms_tuned", "rms"), np.sqrt(squares), strict=True))


def of_captures(captures: Sequence[Sums]) -> Statistics:
    """The sums of one capture a topic."""
    base = np.stack([c.base["mlp_mid"] for c in captures])  # [topic, tokens, 2, layer, neuron]
    tuned = np.stack([c.tuned["mlp_mid"] for c in captures], 1)  # [model, topic, tokens, 3, layer, neuron]
    own = np.broadcast_to(base, (len(tuned), *base.shape))
    parts = [own[:, :, :, 0], tuned[:, :, :, 0], own[:, :, :, 1], tuned[:, :, :, 1], tuned[:, :, :, 2]]
    return Statistics(np.stack([c.counts for c in captures]), np.stack(parts, 3))


def of_tensors(workload: Workload, totals: Tensor) -> Statistics:
    """The sums of one tuned model, ``totals`` [topic, tokens, 5, layer, neuron]."""
    counts = [[sum(len(t.positions(name)) for t in group) for name in TOKENS] for group in workload.texts.values()]
    return Statistics(np.array(counts), totals.double().cpu().numpy()[None])


def read_store(path: Path, workload: Workload) -> dict[str, np.ndarray]:
    """The same figures from a store of ``workload``."""
    from pnlac_fast.store import open_contrast

    at = {"model": list(workload.tuned), "topic": list(workload.texts), "site": "mlp_mid", "tokens": list(TOKENS)}
    with open_contrast(path) as stored:
        held = {
            name: stored[name].sel({key: at[key] for key in at if key in stored[name].dims}).values.astype(np.float64)
            for name in ("mean_base", "std_base", "mean_tuned", "std_tuned", "rms")
        }
    figures = {"rms": held["rms"]}
    for which in ("base", "tuned"):
        figures[f"mean_{which}"] = np.broadcast_to(held[f"mean_{which}"], held["rms"].shape)
        figures[f"rms_{which}"] = np.hypot(figures[f"mean_{which}"], held[f"std_{which}"])
    return figures


def distance(mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Largest difference of any figure in any layer: the norm over its neurons, as a share of what base's is."""
    typical = _norms(mine["rms_base"])
    return float(np.max([_norms(mine[name] - theirs[name]) / typical for name in mine]))  # NaN stays NaN


def _norms(values: np.ndarray) -> np.ndarray:
    """Of each layer, over all other dimensions."""
    return np.sqrt(np.square(values).sum((0, 1, 2, 4)))
