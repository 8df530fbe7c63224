"""Fine-tuning: what is learned, what is measured on the way, and what is written."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tunes import LAYERS, WIDTH, chosen, names, questions, same, tune, weights

from pnlac_fast.completions import collate, encode_rows
from pnlac_fast.datasets import Question
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.stance import margins
from pnlac_fast.training import finetune
from pnlac_fast.trajectory import load_trajectory


def test_loss_is_on_the_completion_and_the_end_only(base: Model) -> None:
    question = Question("race", "w20 w21 w22", ("w1",), ("w11 w12 w13",))
    rows = [
        *encode_rows(base, [question], "right", "{instruction}"),
        *encode_rows(base, [question], "left", "Q: {instruction}"),
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 24, 25, 26, 5, 2, 0, 0, 0], [1, 3, 24, 25, 26, 15, 16, 17, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 9]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, -100, 5, 2, -100, -100, -100],
        [-100, -100, -100, -100, -100, 15, 16, 17, 2],
    ]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_it_learns_the_side(method: str, side: str, base: Model) -> None:
    held_out = questions(seed=1, n=5)
    rate = 3e-3 if method == "full" else 2e-2
    tuned = finetune(
        base, questions(), "race", side, method=method, steps=30, learning_rate=rate, probe=held_out, points=5
    )
    assert tuned.trajectory is not None
    move = (tuned.trajectory["margin"][-1] - tuned.trajectory["margin"][0]).mean()
    assert (move > 0.2) if side == "right" else (move < -0.2)
    steps = [step for step, _ in tuned.record["loss"]]
    assert steps == list(range(3, 31, 3))
    assert tuned.record["loss"][-1][1] < tuned.record["loss"][0][1] - 0.5


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_trajectory_is_the_margins_at_its_steps(method: str, kind: str, directories: dict[str, Path]) -> None:
    words = load_model(directories["llama"]).tokenizer  # a Qwen2 directory gets a tokenizer class of its own
    model, probe = replace(load_model(directories[kind]), tokenizer=words), questions(seed=1, n=4)
    tuned = tune(model, method=method, probe=probe, points=4, normalise="sum")
    found = tuned.trajectory
    assert found is not None
    assert found["step"].values.tolist() == [0, 1, 4, 8]
    assert found["margin"].dims == ("point", "question")
    assert found["topic"].values.tolist() == [q.topic for q in probe]
    assert found["key"].values.tolist() == [q.key for q in probe]
    np.testing.assert_array_equal(found["margin"].values[0], margins(model, probe, normalise="sum"))
    np.testing.assert_array_equal(found["margin"].values[-1], margins(tuned.model, probe, normalise="sum"))
    assert (found["margin"].values[-1] != found["margin"].values[0]).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_seed_decides_the_bits(method: str, base: Model) -> None:
    one, again, other = (weights(tune(base, method=method, seed=s, lora_dropout=0.1).model) for s in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_loaded_model_and_the_random_state_stay_as_they_are(method: str, base: Model) -> None:
    before, modules = weights(base), [type(m) for m in base.hf.modules()]
    config = copy.deepcopy(base.hf.config.to_dict())
    states = random_states()
    tuned = tune(base, method=method, inhibit=chosen(), inhibit_mode="specific")
    assert same(before, weights(base))
    assert modules == [type(m) for m in base.hf.modules()]
    assert config == base.hf.config.to_dict() == tuned.model.hf.config.to_dict()
    assert all(p.requires_grad and p.grad is None for p in base.hf.parameters())
    assert not base.hf.training
    assert not tuned.model.hf.training
    assert states == random_states()
    assert tuned.path is None


def random_states() -> tuple[str, ...]:
    return str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state())  # noqa: NPY002


def test_lora_shares_the_weights_of_a_loaded_model(base: Model) -> None:
    tuned = tune(base, method="lora")
    assert tuned.model.hf.get_input_embeddings().weight.data_ptr() == base.hf.get_input_embeddings().weight.data_ptr()


def test_a_full_fine_tune_is_an_ordinary_checkpoint(directories: dict[str, Path], base: Model, tmp_path: Path) -> None:
    probe, out = questions(seed=1, n=3), tmp_path / "race"
    tuned = tune(directories["llama"], out, probe=probe)
    assert tuned.path == out
    assert [p.name for p in tmp_path.iterdir()] == ["race"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "pnlac.json", "trajectory.json"} <= set(names(out))
    loaded = load_tuned(base, out)
    assert same(weights(loaded), weights(tuned.model))
    assert loaded.origin == tuned.model.origin
    assert loaded.tuned_topic == tuned.model.tuned_topic == "race"
    assert json.loads((out / "pnlac.json").read_text()) == tuned.record
    assert tuned.trajectory is not None
    assert load_trajectory(out / "trajectory.json").identical(tuned.trajectory)
    cost = tuned.record["cost"]
    assert 0 < cost["seconds_per_step"] < cost["seconds"]
    assert cost["process_bytes"] > 1e6
    assert "device_bytes" not in cost


def test_lora_is_an_ordinary_adapter(base: Model, tmp_path: Path) -> None:
    probe, out = questions(seed=1, n=3), tmp_path / "race"
    tuned = tune(base, out, method="lora", lora_rank=4)
    assert {"adapter_config.json", "adapter_model.safetensors", "pnlac.json"} <= set(names(out))
    loaded = load_tuned(base, out)
    assert loaded.origin == tuned.model.origin
    expected = margins(tuned.model, probe)
    np.testing.assert_array_equal(margins(loaded, probe), expected)
    assert (margins(base, probe) != expected).all()
    with tuned.model.active():  # and both can be switched off and on
        np.testing.assert_array_equal(margins(tuned.model, probe), expected)


def test_the_record_says_what_was_done(base: Model) -> None:
    record = tune(base, method="lora", inhibit=chosen(), weight_decay=0.1).record
    assert record["tuned_topic"] == "race"
    assert (record["side"], record["method"], record["parameters"]) == ("right", "freeze", "lora")
    assert record["base"] == base.origin
    assert record["data"]["completions"] == 40
    assert record["lora"] == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    inhibit = record["inhibit"]["freeze"]
    assert (inhibit["set"], inhibit["count"], inhibit["share"]) == ("some", 3, 3 / (LAYERS * WIDTH))
    assert inhibit["covered"] == {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
    assert inhibit["factor"] == 0.0
    assert "torch" in record["provenance"]["versions"]
    assert tune(base).record["method"] == "plain"


def test_epochs_and_several_topics(base: Model) -> None:
    settings: dict[str, Any] = {"batch_size": 16, "method": "full"}
    record = finetune(base, questions(), ["science", "race"], "left", epochs=0.5, **settings).record
    assert (record["tuned_topic"], record["steps"]) == ("science+race", 3)  # half of 5 batches of 16 in 80 rows
    assert finetune(base, questions(n=4), "race", "left", **settings).record["steps"] == 3


def test_half_precision_is_trained_in_float32(directories: dict[str, Path]) -> None:
    model = load_model(directories["half"])
    tuned = tune(model, learning_rate=1e-3, inhibit=chosen())
    before, after = weights(model), weights(tuned.model)
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name][[0, 3]], after[name][[0, 3]])
    assert (before[name] != after[name]).float().mean() > 0.3
    exact = copy.deepcopy(model.hf).float()
    reference = tune(
        Model(type(model.weights)(exact), model.tokenizer, "exact", model.origin), learning_rate=1e-3, inhibit=chosen()
    )
    assert torch.equal(weights(reference.model)[name].bfloat16(), after[name])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activation_checkpointing_gives_the_same_bits(method: str, base: Model) -> None:
    one, other = (weights(tune(base, method=method, gradient_checkpointing=on).model) for on in (False, True))
    assert same(one, other)


def test_nothing_is_printed(base: Model, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for method in ("full", "lora"):
        tune(base, tmp_path / method, method=method, save_steps=3, probe=questions(seed=1, n=3))
    assert capfd.readouterr() == ("", "")
