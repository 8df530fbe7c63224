"""Fine-tuning: what is learned, what is measured on the way, what is written, and what survives an interruption."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pnlac_fast import run
from pnlac_fast.completions import collate, encode_rows
from pnlac_fast.datasets import Question
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.rivals import Rival
from pnlac_fast.stance import margins
from pnlac_fast.training import FineTune, finetune
from pnlac_fast.trajectory import load_trajectory

LAYERS, WIDTH = 2, 24
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face directories of random models."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    shape: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    made = {}
    torch.manual_seed(0)
    for name, hf in (
        ("llama", LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))),
        ("qwen2", Qwen2ForCausalLM(Qwen2Config(**shape))),
        ("half", LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()),
    ):
        made[name] = tmp_path_factory.mktemp(name) / name
        hf.save_pretrained(made[name])
        fast.save_pretrained(made[name])
    return made


@pytest.fixture
def base(directories: dict[str, Path]) -> Model:
    return load_model(directories["llama"])


def questions(seed: int = 0, n: int = 20, topics: tuple[str, ...] = ("race", "science")) -> tuple[Question, ...]:
    """Right completions are of words 0 to 9, left ones of words 10 to 19."""
    draw = random.Random(seed)

    def text(low: int, high: int, length: int) -> str:
        return " ".join(draw.choice(WORDS[low:high]) for _ in range(length))

    return tuple(
        Question(
            t, text(20, 40, draw.randint(4, 7)), (text(0, 10, 3), text(0, 10, 2)), (text(10, 20, 3), text(10, 20, 2))
        )
        for t in topics
        for _ in range(n)
    )


def tune(model: Model | Path, out: Path | None = None, **changes: Any) -> FineTune:
    settings: dict[str, Any] = {"method": "full", "steps": 8, "learning_rate": 3e-3, "warmup_steps": 2, "batch_size": 4}
    return finetune(model, questions(), "race", "right", out, **settings | changes)


def chosen() -> NeuronSet:
    member = np.zeros((LAYERS, WIDTH), bool)
    member[0, [0, 3]] = True
    member[1, 5] = True
    return NeuronSet("some", "general", member)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


def names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


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


def test_the_record_says_what_was_minimised_beside_the_loss(base: Model) -> None:
    options: dict[str, Any] = {"anchor_weight": 2.0, "kl_weight": 0.5, "kl_on": "prompts"}
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
    options: dict[str, Any] = {"method": method, "steps": 2, "kl_max_new_tokens": 4}
    for mode in ("freeze,anchor,kl", "specific"):
        tuned = tune(mixed, inhibit=neurons, inhibit_mode=mode, **options)
        assert tuned.model.width("mlp_mid") == WIDTH
        if method == "full":
            name = "model.layers.0.mlp.shared_expert.gate_proj.weight"
            moved = (weights(tuned.model)[name] != before[name]).any(1)
            own = torch.from_numpy(neurons.member[0])
            assert (moved == (own if mode == "specific" else ~own)).all()
    vectors = np.ones((LAYERS, 1, 16), np.float32)
    steered = tune(mixed, rival=Rival("steer", directions=vectors), **options)
    assert not same(weights(steered.model), before) or method == "lora"


@pytest.mark.parametrize("mode", ["anchor", "kl"])
def test_a_penalty_holds_what_it_is_for(mode: str, base: Model) -> None:
    """The more of it, the smaller its term at the end; the side is learned all the same."""
    held_out, ends = questions(seed=1, n=5), []
    for weight in (1e-6, 30.0 if mode == "anchor" else 3.0):
        options: dict[str, Any] = {f"{mode}_weight": weight, "inhibit": chosen() if mode == "anchor" else None}
        tuned = tune(base, steps=30, probe=held_out, inhibit_mode=mode, kl_max_new_tokens=5, **options)
        assert tuned.trajectory is not None
        assert (tuned.trajectory["margin"][-1] - tuned.trajectory["margin"][0]).values[:5].mean() > 0.2
        ends.append(tuned.record[mode][-1][1])
    assert ends[1] < 0.4 * ends[0]


def test_kl_is_on_other_topics_than_the_tuned_and_on_other_questions_than_the_probes(base: Model) -> None:
    with pytest.raises(UserError, match="'race' is tuned on"):
        tune(base, inhibit_mode="kl", kl_topics=("race",))
    with pytest.raises(UserError, match="Did you mean 'science'"):
        tune(base, inhibit_mode="kl", kl_topics=("scienc",))
    with pytest.raises(UserError, match="no questions of other topics"):
        tune(base, inhibit_mode="kl", kl_data=questions(topics=("race",)))
    with pytest.raises(UserError, match="used for the KL"):
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


def test_epochs_and_several_topics(base: Model) -> None:
    settings: dict[str, Any] = {"batch_size": 16, "method": "full"}
    record = finetune(base, questions(), ["science", "race"], "left", epochs=0.5, **settings).record
    assert (record["tuned_topic"], record["steps"]) == ("science+race", 3)  # half of 5 batches of 16 in 80 rows
    assert finetune(base, questions(n=4), "race", "left", **settings).record["steps"] == 3


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


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the batch of a step is made."""
    calls = [0]

    def stop(rows: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise KeyboardInterrupt
        return collate(rows)

    monkeypatch.setattr(run, "collate", stop)


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *(("full", "freeze"), ("full", "specific"), ("lora", "freeze")),
        *(("full", "anchor,kl"), ("lora", "anchor,kl"), ("full", "specific,kl")),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    method: str, mode: str, base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "method": method,
        "inhibit": chosen(),
        "inhibit_mode": mode,
        "kl_max_new_tokens": 5,
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


def test_nothing_is_printed(base: Model, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for method in ("full", "lora"):
        tune(base, tmp_path / method, method=method, save_steps=3, probe=questions(seed=1, n=3))
    assert capfd.readouterr() == ("", "")


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
        ({"method": "lora", "target_modules": ["query"]}, "LoRA cannot be put on this model"),
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
