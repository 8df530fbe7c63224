"""Tail averaging: the mean of the last steps' weights, exact where nothing moves, the same after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tunes import tune
from inhibited import LAYERS, chosen, decoder, lora, trainer, weights
from torch import Tensor
from transformers import TrainerCallback

from pnlac_fast.averaging import TailAverage
from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.models import Model
from pnlac_fast.null_space import NullSpace
from pnlac_fast.references import Reference


class Recorded(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after.append(weights(model))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_training_ends_with_the_mean_of_its_last_steps(adapted: bool, tmp_path: Path) -> None:
    model, seen = decoder(), Recorded()
    model = lora(model) if adapted else model
    trainer(model, [seen, TailAverage(4)], tmp_path).train()
    assert len(seen.after) == 6
    for name, found in weights(model).items():
        wanted = torch.stack([step[name].double() for step in seen.after[-4:]]).mean(0)
        # The factors of a LoRA are averaged, not their product.
        torch.testing.assert_close(found.double(), wanted, atol=2e-3 if adapted else 1e-6, rtol=0)
    assert any(not torch.equal(found, seen.after[-1][name]) for name, found in weights(model).items())


def test_one_step_is_the_plain_training(tmp_path: Path) -> None:
    models = [decoder(), decoder()]
    for model, callbacks in zip(models, ([], [TailAverage(1)]), strict=True):
        trainer(model, callbacks, tmp_path).train()
    one, other = map(weights, models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_frozen_neurons_keep_their_bits(tmp_path: Path) -> None:
    model = decoder()
    before = weights(model)
    trainer(model, [InhibitFT(chosen()), TailAverage(3)], tmp_path).train()
    after = weights(model)
    for layer in range(LAYERS):
        own = torch.from_numpy(chosen().member[layer])
        for name in (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")):
            assert torch.equal(after[name][own], before[name][own])
            assert not torch.equal(after[name], before[name])


def test_slices_are_averaged_and_stay_in_the_null_space(tmp_path: Path) -> None:
    texts = [Reference((5, 6, 7, 8), 2), Reference((9, 3, 11, 4, 5, 6), 3)]
    model, space, seen = decoder(), NullSpace(texts, 0.6), Recorded()
    before, name = weights(model), "model.layers.0.mlp.gate_proj.weight"
    trainer(model, [space, InhibitFT(chosen(), "specific"), seen, TailAverage(5)], tmp_path).train()
    moved = weights(model)[name] - before[name]
    own = torch.from_numpy(chosen().member[0])
    assert not moved[~own].any()
    assert (moved @ space.directions[0]).abs().max() < 1e-5 < 1e-3 < moved[own].abs().max()
    slices = torch.stack([step["model.layers.0.mlp.gate_proj.slice_weight"] for step in seen.after[-5:]])
    torch.testing.assert_close(weights(model)[name][own], slices.mean(0))


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_a_resumed_training_ends_with_the_bits_of_the_uninterrupted_one(mode: str, tmp_path: Path) -> None:
    def made(model: Any, **how: Any) -> Any:
        return trainer(model, [InhibitFT(chosen(), mode), TailAverage(5)], tmp_path, **how)

    whole, resumed = decoder(), decoder()
    made(whole, save_strategy="steps", save_steps=2).train()
    made(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "averages-4.safetensors").unlink()
    with pytest.raises(UserError, match="missing, without which the mean is not known"):
        made(decoder()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_averages_go_with_their_checkpoints(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer(decoder(), [TailAverage(5)], tmp_path, **how).train()
    # A checkpoint is removed when the next is there, and its averages before the one after that.
    assert sorted(file.name for file in tmp_path.glob("averages-*")) == [f"averages-{n}.safetensors" for n in (4, 5)]


def test_a_mean_that_cannot_be_is_refused(base: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="average 1 or more"):
        TailAverage(0)
    with pytest.raises(UserError, match="average fewer"):
        trainer(decoder(), [TailAverage(7)], tmp_path).train()
    for last in (0, 9):
        with pytest.raises(UserError, match=f"the last {last} of 8 steps: average 1 to 8"):
            tune(base, average_last=last)

    class Early(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    with pytest.raises(RuntimeError, match="not averaged"):
        trainer(decoder(), [TailAverage(2), Early()], tmp_path).train()


def test_of_a_fine_tune_it_is_an_option_and_the_last_point_is_of_the_mean(base: Model, tmp_path: Path) -> None:
    from fine_tunes import questions

    probe = questions(seed=1, n=2)
    plain = tune(base, probe=probe, points=8)
    averaged = tune(base, tmp_path / "run", probe=probe, points=8, average_last=4)
    assert (plain.record["average_last"], averaged.record["average_last"]) == (1, 4)
    assert plain.trajectory is not None
    assert averaged.trajectory is not None
    same = [np.array_equal(a, b) for a, b in zip(plain.trajectory.margin, averaged.trajectory.margin, strict=True)]
    assert same == [True] * (len(same) - 1) + [False]
