"""Kappa against scikit-learn, intervals that cover, and what may be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import cohen_kappa_score

from pnlac_fast.agreement import agreement, agreement_rows, cohens_kappa
from pnlac_fast.errors import UserError

TOPICS = ["race"] * 20 + ["science"] * 30


def scored(scorer: str, label: np.ndarray, variable: str = "label", **attrs: Any) -> xr.Dataset:
    """A result of score(), of two models."""
    cells = ("run", "question")
    data: dict[str, Any] = {variable: (cells, label)}
    if variable == "label":
        data |= {
            "unparsed": (cells, np.zeros(label.shape, bool)),
            "answer": (cells, np.full(label.shape, "so", object)),
        }
    coords = {
        "model": ("run", ["base", "tuned"]),
        "topic": ("question", TOPICS),
        "key": ("question", [str(i) for i in range(len(TOPICS))]),
    }
    return xr.Dataset(data, coords, {"scorer": scorer, "provenance": {}, **attrs})


def noisy(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.where(generator.random(label.shape) < share, generator.integers(-1, 2, label.shape), label)


TRUTH = np.random.default_rng(0).integers(-1, 2, (2, 50))


def test_kappa_is_that_of_scikit_learn() -> None:
    one, two, margin = noisy(TRUTH, 0.3, 1), noisy(TRUTH, 0.5, 2), TRUTH * 2.5
    found = agreement([scored("a", one), scored("b", two), scored("logprob", margin, "margin")], boots=200)
    assert found["kappa"].dims == ("scorer", "other", "bound")
    for i, left in enumerate((one, two, TRUTH)):
        for j, right in enumerate((one, two, TRUTH)):
            expected = cohen_kappa_score(left.ravel(), right.ravel())
            estimate, low, high = found["kappa"].values[i, j]
            assert estimate == pytest.approx(expected)
            assert low <= estimate <= high
            assert found["error"].values[i, j, 0] == pytest.approx((left != right).mean())
    assert (found["n"] == 100).all()
    rows = agreement_rows({"agreement": found})
    assert [(r["scorer"], r["other"]) for r in rows] == [("a", "b"), ("a", "logprob"), ("b", "logprob")]
    assert agreement_rows({}) == []


def test_kappa_of_known_tables() -> None:
    tables = np.array([[[20, 5, 0], [10, 15, 0], [0, 0, 0]], [[9, 0, 0], [0, 0, 0], [0, 0, 0]], np.zeros((3, 3))])
    found = cohens_kappa(tables.astype(float))
    assert found[0] == pytest.approx(0.4)
    assert np.isnan(found[1:]).all()  # one label only, and nothing at all


def test_interval_covers_the_true_kappa() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(100):
        truth = generator.choice([-1, 1], (2, 50))
        one, two = (np.where(generator.random((2, 50)) < 0.2, -truth, truth) for _ in range(2))
        found = agreement([scored("a", one), scored("b", two)], boots=200, seed=trial)
        _, low, high = found["kappa"].values[0, 1]
        covered += low <= 0.36 <= high  # agreement .8 ** 2 + .2 ** 2 = .68 against a chance of .5
    assert 88 <= covered <= 99


def test_people_label_a_sample() -> None:
    people = scored("csv:sheet", TRUTH)
    people["unparsed"][:] = True
    people["unparsed"][:, :10] = False
    judge = noisy(TRUTH, 0.4, 3)
    found = agreement([scored("a", judge), people], boots=100)
    assert found["n"].values.tolist() == [[100, 20], [20, 20]]
    assert found["error"].values[0, 1, 0] == pytest.approx((judge != TRUTH)[:, :10].mean())
    machine = scored("b", TRUTH)
    machine["unparsed"][:] = True  # what a machine does not parse counts as neither, and is its error
    assert agreement([scored("a", judge), machine], boots=10)["n"].values[0, 1] == 100


def test_what_cannot_be_compared() -> None:
    one, two = scored("a", TRUTH), scored("b", TRUTH)
    with pytest.raises(UserError, match="two scorers"):
        agreement([one])
    with pytest.raises(UserError, match="other models or questions"):
        agreement([one, two.assign_coords(model=("run", ["base", "else"]))])
    other = two.copy(deep=True)
    other["answer"][0, 0] = "no"
    with pytest.raises(UserError, match="--answers FILE"):
        agreement([one, other])
