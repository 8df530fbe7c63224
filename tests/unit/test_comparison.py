"""Fine-tunes are put side by side as they were, and never where they cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pnlac_fast.comparison import as_run, collect, join, method_name
from pnlac_fast.errors import UserError
from pnlac_fast.reporting import style
from pnlac_fast.trajectory import save_trajectory


def trajectory(points: int, *, keys: str = "abc", normalise: str = "sum", seed: int = 0) -> xr.Dataset:
    margin = np.random.default_rng(seed).standard_normal((points, len(keys)))
    names = {
        "topic": ("question", np.array(["race"] * len(keys), object)),
        "key": ("question", np.array([*keys], object)),
    }
    data = {"margin": (("point", "question"), margin), "step": ("point", np.arange(points) * 5)}
    return xr.Dataset(data, names, {"normalise": normalise})


def record(inhibit: dict | None = None) -> dict:
    return {"tuned_topic": "race", "learning_rate": 1e-4, "seed": 3, "inhibit": inhibit or {}}


def inhibited(mode: str, share: float, *, kind: str = "general", factor: float = 0.0, **found: object) -> dict:
    return record({mode: {"factor": factor, "kind": kind, "count": 7, "share": share, "found": found}})


def penalised(weight: float = 1.0, specific: dict | None = None) -> dict:
    anchor = {"kind": "general", "count": 7, "share": 0.05, "found": {}, "weight": weight}
    first = specific["inhibit"] if specific else {}
    return record({**first, "anchor": anchor, "kl": {"weight": 1.0, "topics": ["science", "crime"]}})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (record(), "plain"),
        (inhibited("freeze", 0.0501, top=0.3), "freeze_5"),
        (inhibited("freeze", 0.002, top=0.3), "freeze_0.2"),
        (inhibited("specific", 0.02, kind="specific", top=0.1), "specific_10"),
        (inhibited("specific", 0.02, kind="random", top=0.1, seed=4), "specific_random_10"),
        (inhibited("freeze", 0.3, kind="random", top=0.1, seed=4), "freeze_random_30"),
        (inhibited("freeze", 0.0501, factor=0.0), "freeze_5"),
        (inhibited("freeze", 0.0501, factor=0.5), "slow_5_by_0.5"),
        (inhibited("freeze", 0.0501, factor=0.25, kind="random", seed=4), "slow_random_5_by_0.25"),
        ({**record(), "rival": {"name": "mlp"}}, "mlp"),
        ({**record(), "rival": {"name": "rate", "strength": 0.1}}, "rate_0.1"),
        (inhibited("freeze", 0.0501, kind="lowest"), "freeze_lowest_5"),
        (record({"kl": {"weight": 0.3, "topics": ["science"]}}), "kl_by_0.3"),
        (penalised(), "anchor_5+kl"),
        (penalised(3.0, inhibited("specific", 0.02, kind="specific", top=0.1)), "specific_10+anchor_5_by_3+kl"),
    ],
)
def test_methods_are_named_by_what_was_done(given: dict, name: str) -> None:
    assert method_name(given) == name


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("anchor_5_by_3+kl_by_0.3", "anchor general 5\u00a0%, weight 3 and KL to base, weight 0.3"),
        ("anchor_3_by_3", "anchor general 3\u00a0%, weight 3"),
        ("freeze_lowest_5", "freeze lowest-ranked 5\u00a0%"),
        ("kl_seen", "KL to base, judged on topics seen"),
        ("specific+nullspace_random_seen", "train only specific in null space, judged on topics seen: random neurons"),
        ("rate_0.1", "0.1 of the learning rate"),
        ("anchor_random@anchor_weight=3,steps=40", "anchor general: random neurons (anchor_weight=3, steps=40)"),
    ],
)
def test_names_of_methods_are_read_as_words(method: str, label: str) -> None:
    assert style.method_label(method) == label
    assert style.is_control(method) == ("random" in method)
    assert "random" not in style.controlled(method)


def test_a_kl_is_judged_on_topics_it_has_not_seen() -> None:
    """Where it has seen all of them, its name says so."""
    long = trajectory(3)
    some = {"kl": {"weight": 1.0, "topics": ["science"]}}
    assert as_run(long, {**record(some), "tuned_topic": "crime"})["method"].values.tolist() == ["kl"]
    every = {"kl": {"weight": 1.0, "topics": ["race"]}}
    assert as_run(long, {**record(every), "tuned_topic": "crime"})["method"].values.tolist() == ["kl_seen"]


def test_runs_of_different_length_keep_their_values(tmp_path: Path) -> None:
    long, short = trajectory(5), trajectory(3, seed=1)
    for name, one, about in (
        ("plain", long, record()),
        ("other", short, inhibited("specific", 0.02, kind="random", top=0.1, seed=4)),
    ):
        (tmp_path / name).mkdir()
        save_trajectory(one, tmp_path / name / "trajectory.json")
        (tmp_path / name / "pnlac.json").write_text(json.dumps(about))
    both = collect([tmp_path / "plain", tmp_path / "other"])
    assert both["margin"].dims == ("run", "point", "question")
    assert np.array_equal(both["margin"].values[0], long["margin"].values)
    assert np.array_equal(both["margin"].values[1, :3], short["margin"].values)
    assert np.isnan(both["margin"].values[1, 3:]).all()
    assert both["step"].values[1].tolist() == [0, 5, 10, -1, -1]
    assert both["method"].values.tolist() == ["plain", "specific_random_10"]
    assert both["draw"].values.tolist() == [-1, 4]
    assert both["share"].values.tolist() == [0.0, 0.02]
    assert as_run(long, penalised())["seen_topics"].values.tolist() == ["science+crime"]


@pytest.mark.parametrize("other", [trajectory(5, keys="abd"), trajectory(5, normalise="token")])
def test_runs_probed_otherwise_are_refused(other: xr.Dataset) -> None:
    with pytest.raises(UserError, match="cannot be compared"):
        join([as_run(trajectory(5), record()), as_run(other, record())])


def test_what_is_no_fine_tune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one --run"):
        collect([])
    with pytest.raises(UserError, match=r"no pnlac\.json"):
        collect([tmp_path])
    (tmp_path / "pnlac.json").write_text(json.dumps(record()))
    with pytest.raises(UserError, match="tune with --probe"):
        collect([tmp_path])
