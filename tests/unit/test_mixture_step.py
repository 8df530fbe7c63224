"""The benchmark of a mixture's training step: its check can fail, and it gives ratios."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnlac_fast.benchmarking import mixture_step, training_step
from pnlac_fast.benchmarking.mixture_step import check, make_mixture, measure
from pnlac_fast.errors import UserError


def test_slices_of_experts_are_checked_against_the_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_mixture("test", device="cpu")
    check(*setting)

    def everything(hf: Any, neurons: Any) -> Any:
        sliced, parameters = training_step.slices(hf, neurons)
        return sliced, [*parameters, sliced.model.norm.weight.requires_grad_(True)]

    def still(hf: Any, neurons: Any) -> Any:
        sliced, parameters = training_step.slices(hf, neurons)
        parameters[0].register_hook(torch.zeros_like)
        return sliced, parameters

    for way, said in ((everything, r"model\.norm\.weight has moved outside"), (still, "has another gradient")):
        with monkeypatch.context() as patch:
            patch.setitem(training_step.WAYS, "slices", way)
            with pytest.raises(RuntimeError, match=said):
                check(*setting)


def test_measuring_gives_ratios_and_refuses_nonsense() -> None:
    found = measure(shape="test", repeats=2, device="cpu")
    assert found["slices_vs_full"]["repeats"] == 2
    assert 0 < found["bytes_slices_vs_full"] < 0.2
    assert (found["tokens"], found["experts"]) == (1024, mixture_step.EXPERTS)
    for changes, message in (
        ({"shape": "smal"}, "Did you mean 'small'"),
        ({"dtype": "int8"}, "dtype"),
        ({"share": 0.0}, "A share of 0"),
    ):
        with pytest.raises(UserError, match=message):
            measure(**{"shape": "test", "device": "cpu"} | changes)
