"""What InhibitFT is compared with: each does what defines it, in training only, and is refused without effect."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pnlac_fast import caching, run
from pnlac_fast import store as stores
from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, lowest_like
from pnlac_fast.prompts import encode_prompt
from pnlac_fast.rivals import Ablation, Rival, Steering, spillover
from pnlac_fast.stance import margins
from pnlac_fast.training import FineTune, finetune

LAYERS, HIDDEN = 3, 16


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each Trainer collects garbage, which otherwise takes longer than the training
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def decoder() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": HIDDEN, "intermediate_size": 24, "pad_token_id": 0}
    heads = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.3))


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


class Watch(TrainerCallback):
    """The residual stream behind block 1 and its gradient, seen while the model trains and while it is evaluated."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen, self.gradients, self.evaluated = model, [], [], []
        self.hooks: list[Any] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        def after(block: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if block.training:
                self.seen.append(hidden.detach())
                hidden.register_hook(lambda gradient: self.gradients.append(gradient.detach()))
            else:
                self.evaluated.append(hidden.detach())

        self.hooks.append(self.model.model.layers[1].register_forward_hook(after))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(input_ids=torch.tensor([[3, 4, 5]]))
        self.model.train()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def trained(model: Any, callbacks: list[TrainerCallback], folder: Path, steps: int = 2) -> None:
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    ids = np.random.default_rng(0).integers(1, 32, (16, 6)).tolist()
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    made = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data, callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    made.train()


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ablation_takes_the_subspace_out_while_training_only(checkpointing: bool, tmp_path: Path) -> None:
    model, plane = decoder(), vectors(2, HIDDEN)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    before = hooks(model)
    trained(model, [Ablation({1: plane}), watch := Watch(model)], tmp_path)
    assert len(watch.seen) >= 2
    assert len(watch.evaluated) == 2
    basis = torch.from_numpy(plane)
    for hidden in watch.seen:
        assert (hidden @ basis.T).abs().max() < 1e-4
    assert any((hidden @ basis.T).abs().max() > 0.1 for hidden in watch.evaluated)
    assert hooks(model) == before


def test_what_is_learned_through_the_subspace_is_nothing(tmp_path: Path) -> None:
    """In the block in front, the gradient has no component in the subspace either: the last norm hides nothing."""
    model, plane, found = decoder(), vectors(1, HIDDEN), []

    class Inner(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.hook = model.model.layers[1].mlp.down_proj.register_full_backward_hook(
                lambda _, __, gradient: found.append(gradient[0].detach())
            )

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.hook.remove()

    trained(model, [Ablation({1: plane}), Inner()], tmp_path)
    basis = torch.from_numpy(plane / np.linalg.norm(plane))
    assert len(found) == 2
    for gradient in found:
        assert (gradient @ basis.T).abs().max() < 1e-5 * gradient.abs().max()


def test_steering_adds_its_vector_while_training_only(tmp_path: Path) -> None:
    model, push = decoder(), vectors(HIDDEN)
    plain = Watch(model)
    trained(model, [plain], tmp_path, steps=1)
    model = decoder()
    trained(model, [Steering({1: push}), watch := Watch(model)], tmp_path, steps=1)
    torch.testing.assert_close(watch.seen[0], plain.seen[0] + torch.from_numpy(push), atol=1e-5, rtol=1e-5)
    again = decoder()
    trained(again, [Steering({1: 1e-9 * push}), same := Watch(again)], tmp_path, steps=1)
    torch.testing.assert_close(same.evaluated[0], plain.evaluated[0], atol=1e-5, rtol=1e-5)


def test_vectors_that_do_not_fit_or_do_nothing_are_refused(tmp_path: Path) -> None:
    for edit, said in (
        (Ablation({5: vectors(1, HIDDEN)}), "for layer 5 does not fit 3 layers of 16"),
        (Steering({0: vectors(HIDDEN + 1)}), "A vector of 17"),
    ):
        with pytest.raises(UserError, match=said):
            trained(decoder(), [edit], tmp_path)
    for nothing in ({}, {0: np.zeros(HIDDEN)}):
        with pytest.raises(UserError, match="have no effect"):
            Steering(nothing)

    class Unseen(Steering):
        """Looks for its effect in a model that never trains."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, model=decoder(), **kwargs)

    with pytest.raises(RuntimeError, match="Unseen had no effect"):
        trained(decoder(), [Unseen({0: vectors(HIDDEN)})], tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "cafe"}, "Did you mean 'caft'"),
        ({"name": "mlp", "strength": 2.0}, "knows no strength"),
        ({"name": "rate", "strength": 1.0}, "is not lower"),
        ({"name": "rate", "strength": 0.0}, "is not lower"),
        ({"name": "inoculate"}, "needs an instruction"),
        ({"name": "mlp", "text": "Answer as a conservative."}, "needs an instruction"),
        ({"name": "caft"}, "need directions"),
        ({"name": "mlp", "layers": (1,)}, "knows no layers"),
        ({"name": "caft", "strength": 3.0, "directions": vectors(LAYERS, 2, HIDDEN)}, "where there are 2"),
        ({"name": "caft", "strength": 0.5, "directions": vectors(LAYERS, 2, HIDDEN)}, "where there are 2"),
        ({"name": "steer", "strength": 0.0, "directions": vectors(LAYERS, 2, HIDDEN)}, "no effect"),
        ({"name": "steer", "layers": (3,), "directions": vectors(LAYERS, 2, HIDDEN)}, "choose among 0 to 2"),
        ({"name": "caft", "directions": 0 * vectors(LAYERS, 2, HIDDEN)}, "zero in some layers"),
    ],
)
def test_rivals_without_effect_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Rival(**settings)


# --- through finetune


@pytest.fixture
def base(model_paths: dict[str, Path]) -> Model:
    return load_model(model_paths["llama"], dtype="float32", device="cpu")


def tune(base: Model, questions: Any, **changes: Any) -> FineTune:
    settings: dict[str, Any] = {"method": "full", "steps": 4, "learning_rate": 3e-3, "batch_size": 4, "warmup_steps": 0}
    return finetune(base, questions, "race", "right", **settings | changes)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


@pytest.fixture(scope="module")
def store(model_paths: dict[str, Path], questions: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_model(model_paths["llama"], dtype="float32", device="cpu")
    out = tmp_path_factory.mktemp("spill") / "run.zarr"
    tuned = {"race": tune(base, questions).model}
    caching.cache(base, tuned, questions, out, sites=("resid", "mlp_mid"), progress=False)
    return out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_mlp_trains_the_mlps_only(method: str, base: Model, questions: Any) -> None:
    tuned = tune(base, questions, rival="mlp", method=method)
    assert (tuned.record["method"], tuned.record["rival"]) == ("mlp", {"name": "mlp"})
    if method == "lora":
        assert tuned.record["lora"]["target_modules"] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        assert all(".mlp." in name for name, _ in tuned.model.hf.named_parameters() if "lora_" in name)
    else:
        before, after = weights(base), weights(tuned.model)
        for name in before:
            assert torch.equal(before[name], after[name]) == (".mlp." not in name), name


def test_rate_lowers_the_learning_rate(base: Model, questions: Any) -> None:
    slow, same = tune(base, questions, rival="rate"), tune(base, questions, learning_rate=3e-4)
    assert slow.record["learning_rate"] == pytest.approx(3e-4)
    assert slow.record["rival"] == {"name": "rate", "strength": 0.1}
    one, other = weights(slow.model), weights(same.model)
    assert all(torch.allclose(one[name], other[name], atol=1e-7) for name in one)


def test_inoculation_is_in_the_training_prompts_only(
    base: Model, questions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, collate = [], run.collate
    monkeypatch.setattr(run, "collate", lambda rows: (read.extend(rows), collate(rows))[1])
    probe = [Question("science", "good law ?", ("taxes order .",), ("taxes equal .",))]
    tuned = tune(base, questions, rival="inoculate", rival_text="think right .", probe=probe, points=2)
    start = base.tokenizer("think right .")["input_ids"]
    assert read
    assert all(ids[: len(start)] == start for ids, _ in read)
    prompts = {tuple(encode_prompt(base.tokenizer, q, "think right . {instruction}").ids) for q in questions}
    assert {tuple(ids[:length]) for ids, length in read} <= prompts
    assert tuned.trajectory is not None
    np.testing.assert_array_equal(tuned.trajectory["margin"].values[-1], margins(tuned.model, probe))
    assert tuned.record["template"] == "{instruction}"


@pytest.mark.parametrize("rival", ["caft", "steer"])
def test_directions_come_from_a_store(rival: str, base: Model, questions: Any, store: Path) -> None:
    plain = tune(base, questions)
    before = hooks(base.hf)
    tuned = tune(base, questions, rival=rival, rival_store=store)
    assert tuned.record["rival"]["layers"] == ([0, 1, 2] if rival == "caft" else [1])
    assert hooks(tuned.model.hf) == before
    one, other = weights(plain.model), weights(tuned.model)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_spillover_is_what_other_topics_have_in_common(base: Model, questions: Any, store: Path) -> None:
    found = spillover(store, "race")
    assert found.shape == (3, 2, 32)
    contrast = stores.open_contrast(store).sel(model="race", site="resid", tokens="last")
    change = contrast["mean_diff"].sel(topic=["science", "economy"]).transpose("layer", "topic", "neuron").values
    change = change[..., :32].astype("f8")
    for layer in range(3):
        gram = found[layer] @ found[layer].T
        assert abs(gram[0, 1]) < 1e-5 * gram[0, 0]
        total = (change[layer] ** 2).sum() / 2
        assert np.trace(gram) == pytest.approx(total, rel=1e-4)
        assert change[layer].mean(0) @ found[layer, 0] > 0
    with pytest.raises(UserError, match="no model 'scienc'"):
        spillover(store, "race", model="scienc")
    with pytest.raises(UserError, match="no topics but"):
        spillover(store, ["race", "science", "economy"], model="race")


def test_a_rival_goes_with_no_mode_and_needs_its_name(base: Model, questions: Any, store: Path) -> None:
    member = np.zeros((3, 48), bool)
    member[0, :3] = True
    chosen = NeuronSet("some", "general", member)
    with pytest.raises(UserError, match="--rival mlp or --inhibit-mode freeze"):
        tune(base, questions, rival="mlp", inhibit=chosen)
    with pytest.raises(UserError, match="--rival-text have no effect"):
        tune(base, questions, rival_text="think")
    with pytest.raises(UserError, match="--rival-store and --rival-layers have no effect"):
        tune(base, questions, rival_store=store, rival_layers=(1,))


def test_lowest_neurons_are_as_many_and_rank_lowest() -> None:
    score = np.random.default_rng(0).random((3, 2, 10))
    member = np.zeros((2, 10), bool)
    member[0, :2] = member[1, :3] = True
    chosen = NeuronSet("some", "general", member)
    low = lowest_like(chosen, score)
    best = score.max(0)
    assert low.per_layer == chosen.per_layer
    assert not (low.member & member).any()
    for layer in range(2):
        rest = ~member[layer] & ~low.member[layer]
        assert best[layer][low.member[layer]].max() < best[layer][rest].min()
    assert (low.kind, low.name) == ("lowest", "some/lowest")
