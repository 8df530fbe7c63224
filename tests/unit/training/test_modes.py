"""Modes of a fine-tune: what each holds, what goes together, and on which neurons and questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tunes import LAYERS, SPECIAL, WIDTH, WORDS, chosen, questions, same, tune, weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model
from pnlac_fast.rivals import Rival


def test_the_record_says_what_was_minimised_beside_the_loss(base: Model) -> None:
    options: dict[str, Any] = {"anchor_weight": 2.0, "kl_weight": 0.5, "other_texts": "prompts"}
    record = tune(base, inhibit=chosen(), inhibit_mode="kl,anchor", **options).record
    assert record["method"] == "anchor+kl"
    assert list(record["inhibit"]) == ["anchor", "kl"]
    assert (record["inhibit"]["anchor"]["set"], record["inhibit"]["anchor"]["weight"]) == ("some", 2.0)
    kl = record["inhibit"]["kl"]
    assert (kl["weight"], kl["on"], kl["topics"], kl["questions"]) == (0.5, "prompts", ["science"], 20)
    for term in ("anchor", "kl"):
        assert [step for step, _ in record[term]] == [step for step, _ in record["loss"]]
        assert record[term][-1][1] > 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_last_projection_that_was_named_is_known_to_every_mode(
    method: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    """Of a mixture with a shared expert; neurons carry what their base was loaded with."""
    shape = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"vocab_size": len(SPECIAL) + len(WORDS), "num_experts": 2, "moe_intermediate_size": 8}
    torch.manual_seed(0)
    mixture = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2_moe", **shape, shared_expert_intermediate_size=WIDTH, num_experts_per_tok=1)
    )
    mixture.save_pretrained(tmp_path / "mixture")
    load_model(directories["llama"]).tokenizer.save_pretrained(tmp_path / "mixture")
    with pytest.raises(UserError, match="--last-projection"):
        load_model(tmp_path / "mixture")
    mixed = load_model(tmp_path / "mixture", last_projection="mlp.shared_expert.down_proj")
    neurons = replace(chosen(), base=mixed.origin)
    before = weights(mixed)
    options: dict[str, Any] = {"method": method, "steps": 2, "other_max_new_tokens": 4}
    for mode in ("freeze,anchor,kl", "specific,nullspace"):
        tuned = tune(mixed, inhibit=neurons, inhibit_mode=mode, **options)
        assert tuned.model.width("mlp_mid") == WIDTH
        if method == "full":
            name = "model.layers.0.mlp.shared_expert.gate_proj.weight"
            moved = (weights(tuned.model)[name] != before[name]).any(1)
            own = torch.from_numpy(neurons.member[0])
            assert (moved == (own if "specific" in mode else ~own)).all()
    vectors = np.ones((LAYERS, 1, 16), np.float32)
    steered = tune(mixed, rival=Rival("steer", directions=vectors), **options)
    assert not same(weights(steered.model), before) or method == "lora"


@pytest.mark.parametrize("mode", ["anchor", "kl"])
def test_a_penalty_holds_what_it_is_for(mode: str, base: Model) -> None:
    """The more of it, the smaller its term at the end; the side is learned all the same."""
    held_out, ends = questions(seed=1, n=5), []
    for weight in (1e-6, 30.0 if mode == "anchor" else 3.0):
        options: dict[str, Any] = {f"{mode}_weight": weight, "inhibit": chosen() if mode == "anchor" else None}
        tuned = tune(base, steps=30, probe=held_out, inhibit_mode=mode, other_max_new_tokens=5, **options)
        assert tuned.trajectory is not None
        assert (tuned.trajectory["margin"][-1] - tuned.trajectory["margin"][0]).values[:5].mean() > 0.2
        ends.append(tuned.record[mode][-1][1])
    assert ends[1] < 0.4 * ends[0]


def test_kl_is_on_other_topics_than_the_tuned_and_on_other_questions_than_the_probes(base: Model) -> None:
    with pytest.raises(UserError, match="'race' is tuned on"):
        tune(base, inhibit_mode="kl", other_topics=("race",))
    with pytest.raises(UserError, match="Did you mean 'science'"):
        tune(base, inhibit_mode="kl", other_topics=("scienc",))
    with pytest.raises(UserError, match="no questions of other topics"):
        tune(base, inhibit_mode="kl", other_data=questions(topics=("race",)))
    with pytest.raises(UserError, match="also those of other topics"):
        tune(base, inhibit_mode="kl", probe=questions()[-3:])


def test_modes_that_do_not_go_together_or_have_no_effect_are_refused(base: Model) -> None:
    for inhibit, mode, said in (
        (chosen(), "freeze,specific", "choose one of them"),
        (chosen(), "specific,anchor", "3 neurons are to train alone"),
        (chosen(), "kl", "Neurons have no effect in mode kl"),
        ({"anchor": chosen()}, "freeze", "Neurons have no effect in mode freeze"),
        ({"anchor": chosen()}, "freeze,anchor", "Mode freeze needs neurons"),
        (None, "anchor", "Mode anchor needs neurons"),
        (chosen(), "ancor", "Did you mean 'anchor'"),
    ):
        with pytest.raises(UserError, match=said):
            tune(base, inhibit=inhibit, inhibit_mode=mode)
    with pytest.raises(UserError, match="choose mode freeze"):
        tune(base, inhibit=chosen(), inhibit_mode="anchor", inhibit_factor=0.5)


def test_each_mode_may_have_neurons_of_its_own(base: Model) -> None:
    held = replace(chosen(), name="held", member=np.roll(chosen().member, 1, axis=1))
    record = tune(base, inhibit={"specific": chosen(), "anchor": held}).record
    assert record["method"] == "specific+anchor"
    assert [record["inhibit"][mode]["set"] for mode in ("specific", "anchor")] == ["some", "held"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_factor_lies_between_freezing_and_plain_tuning(method: str, base: Model) -> None:
    """How far the chosen rows of a gate move, as a part of how far they move in plain tuning."""
    moved = []
    for factor in (0.0, 0.5, 1.0):
        tuned = tune(base, method=method, inhibit=chosen(), inhibit_factor=factor)
        assert tuned.record["inhibit"]["freeze"]["factor"] == factor
        rows = torch.from_numpy(chosen().member[0])
        gate = tuned.model.projection(0, "gate_proj")
        delta = (
            gate.get_delta_weight("default")
            if method == "lora"
            else gate.weight - base.projection(0, "gate_proj").weight
        )
        moved.append(float(delta[rows].detach().norm()))
    assert moved[0] == 0
    assert 0.35 * moved[2] < moved[1] < 0.65 * moved[2]


@pytest.mark.parametrize("mode", ["freeze", "specific"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_inhibited_neurons_keep_their_bits(mode: str, accumulation: int, base: Model) -> None:
    tuned = tune(base, inhibit=chosen(), inhibit_mode=mode, weight_decay=0.1, accumulation=accumulation)
    before, after = weights(base), weights(tuned.model)
    for layer in range(LAYERS):
        rows = torch.from_numpy(chosen().member[layer])
        for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            name = f"model.layers.{layer}.mlp.{part}.weight"
            moved = (before[name] != after[name]).any(1 - dim)
            assert moved.tolist() == (~rows if mode == "freeze" else rows).tolist()
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before[attention], after[attention]) == (mode == "specific")
