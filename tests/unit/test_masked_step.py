"""The benchmark of the masked step: that it compares what it says, and that its check fails where it should."""

from __future__ import annotations

import pytest
import torch

from pnlac_fast.benchmarking import masked as module


def test_every_way_and_round_is_timed() -> None:
    seconds = module.masked_step(2, shapes=((9, 40), (40, 9)))
    ways = {f"{way} {dim}" for way in ("masked", "zeroed", "restored") for dim in ("rows", "columns")}
    assert seconds.keys() == {"torch", *ways}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


@pytest.mark.parametrize("dim", [0, 1])
def test_ways_differ_in_what_they_leave_alone(dim: int) -> None:
    moved = {}
    for way, make in module.WAYS.items():
        weights = module.make_weights(dim, ((30, 40),))
        before = weights.parameters[0].detach().clone()
        make(weights)()
        changed = before.ne(weights.parameters[0].detach())
        assert changed.any()
        moved[way] = bool(changed.index_select(dim, weights.still[0]).any())
    assert moved == {"torch": True, "masked": False, "zeroed": True, "restored": False}


def test_the_check_notices_a_step_that_moves_inhibited_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    module.check()
    monkeypatch.setattr(module, "masked", module.zeroed)
    with pytest.raises(RuntimeError, match="moved in the way 'zeroed'"):
        module.check()


def test_the_check_notices_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(weights: module.Weights) -> object:
        for group in weights.optimizer.param_groups:
            group["lr"] *= 1.001
        return module.restored(weights)

    monkeypatch.setattr(module, "masked", halved)
    with pytest.raises(RuntimeError, match="differs from the reference"):
        module.check()


def test_the_result_has_a_ratio_for_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "masked_step", lambda repeats, device: {"torch": [1.0, 2.0], "masked rows": [1.0, 3.0]})
    found = module.measure(repeats=2, device="cpu")
    assert found["rows"] == {"median": 1.25, "min": 1.0, "max": 1.5, "repeats": 2}
    assert (found["share"], found["parameters"]) == (0.05, 33_554_432)
    assert torch.tensor(module.SHAPES).prod(1).sum() == found["parameters"]
