"""How the stance moves while a model is fine-tuned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from transformers import TrainerCallback

from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.stance import margins
from pnlac_fast.workplace import write_json

TRAJECTORY_FILE = "trajectory.json"


class Trajectory(TrainerCallback):
    """Measures the margins of probe questions at given steps of a fine-tune, and writes them down each time.

    Parameters
    ----------
    model
        The model in training.
    at
        Steps to measure at; 0 is before training.
    file
        JSON file for what has been measured, from which a resumed run takes the points before its checkpoint.
    """

    def __init__(
        self, model: Model, questions: Sequence[Question], at: Sequence[int], file: Path, template: str, normalise: str
    ) -> None:
        self.model, self.questions, self.at, self.file = model, questions, set(at), file
        self.template, self.normalise = template, normalise
        self.margin: dict[int, list[float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the base, or take up what was measured before the checkpoint."""
        if state.global_step:
            earlier = load_trajectory(self.file)
            pairs = zip(earlier["step"].values, earlier["margin"].values, strict=True)
            self.margin = {int(s): m.tolist() for s, m in pairs if s <= state.global_step}
        else:
            self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after a step that is due."""
        self._measure(state.global_step)

    def dataset(self) -> xr.Dataset:
        """What was measured so far, see :class:`FineTune`."""
        return _trajectory(
            list(self.margin),
            list(self.margin.values()),
            [q.topic for q in self.questions],
            [q.key for q in self.questions],
            self.normalise,
        )

    def _measure(self, step: int) -> None:
        if step not in self.at:
            return
        self.model.hf.eval()  # the Trainer switches back before each forward pass
        values = margins(self.model, self.questions, template=self.template, normalise=self.normalise)
        self.margin[step] = values.tolist()
        save_trajectory(self.dataset(), self.file)


def save_trajectory(trajectory: xr.Dataset, path: str | Path) -> None:
    """Write a trajectory as JSON: steps, topic and key of each question, margins [point][question] in nats."""
    record = {
        "format": "pnlac-trajectory",
        "version": 1,
        "normalise": trajectory.attrs["normalise"],
        "step": trajectory["step"].values.tolist(),
        "topic": trajectory["topic"].values.tolist(),
        "key": trajectory["key"].values.tolist(),
        "margin": trajectory["margin"].values.tolist(),
    }
    write_json(Path(path), record, indent=None)


def load_trajectory(path: str | Path) -> xr.Dataset:
    """Read what :func:`save_trajectory` wrote; the margins come back bit for bit."""
    try:
        record = json.loads(Path(path).read_text())
        return _trajectory(*(record[name] for name in ("step", "margin", "topic", "key", "normalise")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not a trajectory of pnlac-fast finetune ({error}): tune with --probe.") from error


def _trajectory(
    step: list[int], margin: list[list[float]], topic: list[str], key: list[str], normalise: str
) -> xr.Dataset:
    return xr.Dataset(
        {
            "margin": (("point", "question"), np.array(margin, np.float64).reshape(len(step), len(key))),
            "step": ("point", np.array(step, np.int64)),
        },
        coords={"topic": ("question", np.array(topic, object)), "key": ("question", np.array(key, object))},
        attrs={"normalise": normalise},
    )
