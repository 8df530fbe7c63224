"""The benchmark of a training step: each way trains what it says, and its check can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnlac_fast.benchmarking import mixture_step, training_step
from pnlac_fast.benchmarking.training_step import WAYS, check, make_setting, measure, prepare
from pnlac_fast.errors import UserError


@pytest.mark.parametrize("way", WAYS)
def test_a_way_trains_what_it_says(way: str) -> None:
    hf, neurons, batch = make_setting("test", device="cpu")
    step = prepare(hf, neurons, batch, way)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    step()
    moved = {name for name, tensor in step.model.state_dict().items() if tensor.ne(before[name]).any()}
    if way in ("full", "freeze", "anchor"):
        assert moved == set(before)
    elif way == "lora":
        assert moved == {name for name in before if "lora_" in name}
    else:
        assert moved == {name for name in before if ".mlp." in name}
    size = 3 * sum(p.nbytes for p in step.parameters) + 4 * len(step.parameters)  # and a counter each
    assert step.bytes() == size + (0 if step.space is None else step.space.nbytes)


def test_slices_are_checked_against_the_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("test", device="cpu")
    check(*setting)

    def everything(hf: Any, neurons: Any) -> Any:
        sliced, parameters = training_step.slices(hf, neurons)
        norm = sliced.model.norm.weight.requires_grad_(True)
        return sliced, [*parameters, norm]

    with monkeypatch.context() as patch:
        patch.setitem(training_step.WAYS, "slices", everything)
        with pytest.raises(RuntimeError, match=r"model\.norm\.weight has moved outside"):
            check(*setting)

    def still(hf: Any, neurons: Any) -> Any:
        sliced, parameters = training_step.slices(hf, neurons)
        parameters[0].register_hook(torch.zeros_like)
        return sliced, parameters

    with monkeypatch.context() as patch:
        patch.setitem(training_step.WAYS, "slices", still)
        with pytest.raises(RuntimeError, match="has another gradient"):
            check(*setting)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_right_passes_in_any_precision(dtype: str) -> None:
    """In bfloat16 a step rounds to nothing in what is near 1, and along every direction of a null space."""
    setting = make_setting("test", device="cpu", dtype=dtype)
    assert setting[0].dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    for right in (check, training_step.check_freeze, training_step.check_anchor, training_step.check_null_space):
        right(*setting)
    mixture_step.check(*mixture_step.make_mixture("test", device="cpu", dtype=dtype))


def test_the_null_space_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("test", device="cpu")
    training_step.check_null_space(*setting)
    monkeypatch.setattr(training_step.NullSpace, "on_train_begin", lambda self, *_, **__: None)
    with pytest.raises(RuntimeError, match="has moved along a direction of the null space"):
        training_step.check_null_space(*setting)


def test_freezing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("test", device="cpu")
    training_step.check_freeze(*setting)
    plain = training_step.prepare
    with monkeypatch.context() as patch:
        patch.setattr(training_step, "prepare", lambda hf, neurons, batch, way: plain(hf, neurons, batch, "full"))
        with pytest.raises(RuntimeError, match="Frozen entries of"):
            training_step.check_freeze(*setting)
    with monkeypatch.context() as patch:
        patch.setattr(training_step, "prepare", lambda hf, neurons, batch, way: plain(hf, neurons, batch, "slices"))
        patch.setattr(training_step, "_own", lambda name, neurons: None)
        with pytest.raises(RuntimeError, match="does not train"):
            training_step.check_freeze(*setting)


def test_anchoring_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("test", device="cpu")
    training_step.check_anchor(*setting)
    plain = training_step.prepare
    monkeypatch.setattr(training_step, "prepare", lambda hf, neurons, batch, way: plain(hf, neurons, batch, "full"))
    with pytest.raises(RuntimeError, match="no difference"):
        training_step.check_anchor(*setting)


def test_measuring_gives_ratios_and_refuses_nonsense() -> None:
    found = measure(shape="test", repeats=2, device="cpu")
    assert found["slices_vs_full"]["repeats"] == found["freeze_vs_full"]["repeats"] == 2
    assert 0 < found["bytes_slices_vs_full"] < found["bytes_lora_vs_full"] < 1
    assert found["tokens"] == 1024
    for changes, message in (
        ({"shape": "smal"}, "Did you mean 'small'"),
        ({"dtype": "int8"}, "dtype"),
        ({"share": 0.0}, "share of 0"),
    ):
        with pytest.raises(UserError, match=message):
            measure(**{"shape": "test", "device": "cpu"} | changes)
