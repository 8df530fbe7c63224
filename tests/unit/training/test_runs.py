"""A run of a fine-tune survives interruptions, leaves nothing half done, and refuses what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fine_tunes import WORDS, chosen, interrupt_at, names, questions, same, tune, weights

from pnlac_fast.datasets import Question
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.training import finetune
from pnlac_fast.trajectory import load_trajectory


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *(("full", "freeze"), ("full", "specific"), ("lora", "freeze")),
        *(("full", "anchor,kl"), ("lora", "anchor,kl"), ("full", "specific,kl")),
        *(("full", "specific,nullspace"), ("lora", "specific,nullspace,kl")),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    method: str, mode: str, base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "method": method,
        "inhibit": chosen(),
        "inhibit_mode": mode,
        "other_max_new_tokens": 5,
        "probe": questions(seed=1, n=3),
        "points": 6,
        "lora_dropout": 0.1,
    }
    settings |= {"weight_decay": 0.1, "steps": 14}  # more than one pass over 40 completions in batches of 4
    whole = tune(base, tmp_path / "whole", **settings)
    out = tmp_path / "race"
    with monkeypatch.context() as patch:
        interrupt_at(14, patch)
        with pytest.raises(Interrupted, match="goes on from step 12"):
            tune(base, out, save_steps=4, **settings)
    assert sorted(names(tmp_path)) == ["race.partial", "whole"]
    with pytest.raises(UserError, match=r"other settings \(learning_rate\)"):
        tune(base, out, save_steps=4, learning_rate=1e-3, **settings)
    resumed = tune(base, out, save_steps=4, **settings)
    assert sorted(names(tmp_path)) == ["race", "whole"]
    assert same(weights(whole.model), weights(resumed.model))
    assert whole.trajectory is not None
    assert whole.trajectory.identical(resumed.trajectory)  # type: ignore[arg-type]
    for term in {"loss", *mode.split(",")} & whole.record.keys():
        assert whole.record[term] == resumed.record[term]


def test_a_model_tuned_in_place_is_plain_after_an_interruption(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [type(m) for m in base.hf.modules()]
    before = weights(base)
    interrupt_at(6, monkeypatch)
    held = replace(chosen(), member=np.roll(chosen().member, 1, axis=1))
    with pytest.raises(Interrupted):
        tune(base, keep_base=False, inhibit={"specific": chosen(), "anchor": held})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.hf.modules())
    assert modules == [type(m) for m in base.hf.modules()]
    assert before.keys() == weights(base).keys()
    assert not same(before, weights(base))


@pytest.mark.parametrize(("save_steps", "overwrite"), [(2, True), (None, False)])
def test_an_interrupted_run_with_other_settings_can_be_dropped(
    save_steps: int | None, overwrite: bool, base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "race"
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(Interrupted, match="from step 4" if save_steps else "--save-steps"):
            tune(base, out, probe=questions(seed=1, n=2), save_steps=save_steps)
    tuned = tune(base, out, seed=1, overwrite=overwrite)
    assert same(weights(tuned.model), weights(tune(base, seed=1).model))
    assert names(tmp_path) == ["race"]
    assert "trajectory.json" not in names(out)


def test_a_run_that_failed_leaves_nothing_behind(base: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower the learning rate"):
        tune(base, tmp_path / "race", learning_rate=1e30, max_grad_norm=0.0, save_steps=1)
    assert names(tmp_path) == []


def test_an_existing_directory_is_replaced_only_when_asked(base: Model, tmp_path: Path) -> None:
    out = tmp_path / "race"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(UserError, match="--overwrite"):
        tune(base, out)
    assert names(out) == ["precious"]
    tune(base, out, overwrite=True)
    assert "precious" not in names(out)
    assert names(tmp_path) == ["race"]


def with_adapter(model: Model) -> Model:
    return tune(model, method="lora").model


LONG = Question("race", " ".join(WORDS), ("w1",), ("w2",))
ONE_SIDED = (*questions(), Question("race", "w39", (), ("w1",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topic": "rase"}, "Did you mean 'race'"),
        ({"topic": ()}, "No topic"),
        ({"side": "rigth"}, "Did you mean 'right'"),
        ({"method": "qlora"}, "Did you mean 'lora'"),
        ({"data": ONE_SIDED}, "1 of 21 questions on race have no right completion, such as 'w39'"),
        ({"data": [LONG]}, "the model's context is 32"),
        ({"probe": questions()[:3]}, "3 of the probe questions are trained on"),
        ({"epochs": 2}, "Both steps and epochs"),
        ({"steps": 0}, "give 1 or more"),
        ({"batch_size": 6, "accumulation": 4}, "equal parts"),
        ({"method": "lora", "target_modules": ["query"]}, "'query'.* not found .* ones are down_proj, gate_proj"),
        ({"method": "lora", "target_modules": ["q_proj", "v_proj"], "inhibit": chosen()}, "leaves nothing to inhibit"),
        ({"learning_rate": 1e30, "max_grad_norm": 0.0}, "lower the learning rate"),
    ],
)
def test_bad_input_is_a_sentence(changes: dict[str, Any], message: str, base: Model) -> None:
    settings: dict[str, Any] = {"data": questions(), "topic": "race", "side": "right", "method": "full", "steps": 4}
    settings |= {"learning_rate": 1e-3} | changes
    with pytest.raises(UserError, match=message):
        finetune(base, settings.pop("data"), settings.pop("topic"), settings.pop("side"), **settings)


def test_a_model_with_adapters_is_refused(base: Model) -> None:
    with pytest.raises(UserError, match="load the base afresh"):
        tune(with_adapter(base))


def test_several_processes_are_refused(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Trainer of your own"):
        tune(base)


def test_neurons_of_another_base_are_refused(base: Model) -> None:
    neurons = NeuronSet("other", "general", chosen().member, base={"sha256": "0" * 64})
    with pytest.raises(UserError, match="locate the neurons on this model"):
        tune(base, inhibit=neurons)


def test_a_damaged_trajectory_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "trajectory.json").write_text("{}")
    with pytest.raises(UserError, match="is not a trajectory"):
        load_trajectory(tmp_path / "trajectory.json")
