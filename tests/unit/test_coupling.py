"""Shift statistics against plain computations, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from pnlac_fast import coupling

TOPICS = ["a"] * 4 + ["b"] * 3 + ["c"] * 5
ORDER = ["a", "b", "c"]


def test_stances_are_topic_means_and_signs() -> None:
    margin = np.random.default_rng(0).standard_normal((2, 12))
    margin[0, 0] = 0.0
    means = coupling.stances(margin, TOPICS, ORDER)
    assert means.shape == (2, 3)
    assert means[1, 1] == pytest.approx(margin[1, 4:7].mean())
    s = coupling.stances(margin, TOPICS, ORDER, measure="S")
    right, left = (margin[0, :4] > 0).sum(), (margin[0, :4] < 0).sum()
    assert s[0, 0] == pytest.approx((right - left) / 4)  # the undecided one counts in the denominator


def test_resamples_keep_topic_sizes_and_start_with_the_data() -> None:
    weights = coupling.resamples(TOPICS, 50, seed=1)
    assert weights.shape == (51, 12)
    assert (weights[0] == 1).all()
    for topic in ORDER:
        own = np.array([t == topic for t in TOPICS])
        assert (weights[:, own].sum(1) == own.sum()).all()
    assert np.array_equal(weights, coupling.resamples(TOPICS, 50, seed=1))
    assert not np.array_equal(weights, coupling.resamples(TOPICS, 50, seed=2))


def test_weighted_stances_equal_resampled_data() -> None:
    margin = np.random.default_rng(0).standard_normal((2, 12))
    weights = coupling.resamples(TOPICS, 3)
    draws = coupling.stances(margin, TOPICS, ORDER, weights=weights)
    assert draws.shape == (4, 2, 3)
    repeated = np.repeat(margin[1, 7:], weights[2, 7:].astype(int))
    assert draws[2, 1, 2] == pytest.approx(repeated.mean())
    assert np.allclose(draws[0], coupling.stances(margin, TOPICS, ORDER))


def test_coupling_reduction_and_retention() -> None:
    plain, method = np.array([2.0, 0.6, -0.8]), np.array([1.5, 0.3, 0.4])
    assert coupling.coupling(plain, 0) == pytest.approx(np.sqrt((0.36 + 0.64) / 2))
    assert coupling.coupling_ratio(plain, 0) == pytest.approx(-0.05)
    assert coupling.reduction(method, plain, 0) == pytest.approx(0.5)
    assert coupling.retention(method, plain, 0) == pytest.approx(0.75)


def test_at_shift_interpolates_at_the_first_crossing() -> None:
    run = np.array([[0.0, 0.0], [1.0, 0.4], [3.0, 0.8], [2.0, 5.0], [np.nan, np.nan]])
    assert coupling.at_shift(run, 0, np.array(2.0)).tolist() == pytest.approx([2.0, 0.6])
    assert coupling.at_shift(run, 0, np.array(1.0)).tolist() == pytest.approx([1.0, 0.4])
    assert np.isnan(coupling.at_shift(run, 0, np.array(3.5))).all()
    assert coupling.at_shift(-run, 0, np.array(-2.0)).tolist() == pytest.approx([-2.0, -0.6])


def test_at_shift_keeps_leading_axes() -> None:
    runs = np.random.default_rng(0).random((7, 5, 4, 3)).cumsum(2)
    target = runs[:, :, 1, 1] + 0.01
    batched = coupling.at_shift(runs, 1, target)
    assert batched.shape == (7, 5, 3)
    assert np.allclose(batched[2, 3], coupling.at_shift(runs[2, 3], 1, target[2, 3]))


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        margin = generator.standard_normal(40)[None] + 0.3
        weights = coupling.resamples(["a"] * 40, 300, seed)
        _, low, high = coupling.interval(coupling.stances(margin, ["a"] * 40, ["a"], weights=weights))[:, 0, 0]
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_of_a_figure_that_seldom_exists_is_unknown() -> None:
    draws = np.array([1.0] + [np.nan] * 6 + [1.0] * 4)
    assert np.isnan(coupling.interval(draws)).all()
    assert coupling.interval(np.array([1.0] + [np.nan] * 3 + [2.0] * 7)).tolist() == [1.0, 2.0, 2.0]
    assert np.isnan(coupling.interval(np.array([np.nan] + [2.0] * 7))).all()


def test_unknown_measure() -> None:
    with pytest.raises(ValueError, match="measure"):
        coupling.stances(np.zeros(12), TOPICS, ORDER, measure="s")


def test_stances_count_only_what_is_counted() -> None:
    margin = np.array([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 0.0]])
    counted = np.array([[True, True, False, False], [False, True, True, True]])
    found = coupling.stances(margin, ["a"] * 4, ["a"], measure="S", counted=counted)
    assert found[:, 0].tolist() == pytest.approx([0.0, 0.0])
    weights = np.array([[1.0, 1, 1, 1], [3, 1, 0, 0]])
    drawn = coupling.stances(margin, ["a"] * 4, ["a"], measure="S", counted=counted, weights=weights)
    assert drawn[1, :, 0].tolist() == pytest.approx([0.5, 1.0])
    nothing = coupling.stances(margin, ["a", "a", "b", "b"], ["a", "b"], counted=counted)
    assert np.isnan(nothing[0, 1])


def test_over_seeds_is_the_interval_of_questions_where_seeds_agree() -> None:
    draws = np.random.default_rng(0).standard_normal((501, 1)).repeat(4, 1)
    assert np.allclose(coupling.over_seeds(draws), draws[:, 0])


def test_over_seeds_is_the_interval_of_seeds_where_questions_do_not_matter() -> None:
    values = np.array([1.0, 2.0, 6.0, 7.0, 9.0])
    draws = coupling.over_seeds(np.tile(values, (20_001, 1)))
    assert draws[0] == pytest.approx(values.mean())
    assert draws[1:].std() == pytest.approx(values.std() / np.sqrt(5), rel=0.03)
    assert draws[1:].mean() == pytest.approx(values.mean(), abs=0.05)


def test_over_seeds_adds_the_variances_of_seeds_and_questions() -> None:
    generator = np.random.default_rng(1)
    seeds, questions = generator.standard_normal(8), generator.standard_normal(50)
    weights = coupling.resamples(["a"] * 50, 4000)
    margin = seeds[:, None] + questions  # every seed answers the same questions
    draws = coupling.stances(margin, ["a"] * 50, ["a"], weights=weights)[..., 0]
    variance = seeds.var() / 8 + questions.var() / 50
    assert coupling.over_seeds(draws)[1:].var() == pytest.approx(variance, rel=0.1)


def test_over_seeds_covers_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        margin = 0.5 + 0.5 * generator.standard_normal((12, 1)) + generator.standard_normal((12, 40))
        weights = coupling.resamples(["a"] * 40, 300, trial)
        draws = coupling.stances(margin, ["a"] * 40, ["a"], weights=weights)[..., 0]
        _, low, high = coupling.interval(coupling.over_seeds(draws, seed=trial))
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_methods_are_compared_on_the_same_seeds_and_questions() -> None:
    generator = np.random.default_rng(3)
    plain = generator.standard_normal((5, 30)) * 3
    weights = coupling.resamples(["a"] * 30, 1000)
    one, two = (coupling.stances(m, ["a"] * 30, ["a"], weights=weights)[..., 0] for m in (plain + 0.1, plain))
    found = coupling.difference(coupling.over_seeds(one), coupling.over_seeds(two))
    assert found[:3].tolist() == pytest.approx([0.1] * 3)  # all that varies is common to both
    assert found[3] == pytest.approx(2 / 1000)
    assert np.allclose(coupling.over_seeds(one) - coupling.over_seeds(two), coupling.over_seeds(one - two))
    assert coupling.difference(two, two)[3].tolist() == [1.0] * 5
    assert np.isnan(coupling.difference(one * np.nan, two)).all()


def test_a_seed_without_the_figure_is_not_skipped() -> None:
    draws = np.ones((401, 2, 3))
    draws[:, 1, 2] = np.nan
    found = coupling.over_seeds(draws)
    assert found.shape == (401, 3)
    assert np.isfinite(found[:, :2]).all()
    assert np.isnan(found[0, 2])
