"""Training as it is typed: every option of `finetune` and `sweep` does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typed import SMALL, done, table

from pnlac_fast.datasets import load_questions
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.neurons import load_sets
from pnlac_fast.stance import margins


def test_finetune_inhibits_by_a_factor(cli, world: Path, base, tmp_path: Path) -> None:
    asked = ["finetune", *base, "--topic", "race", "--out", tmp_path / "t", *SMALL, "--inhibit-factor", "0.5"]
    assert cli(*asked).code == 2
    neurons = ["--inhibit", world / "neurons.json"]
    assert cli(*asked, *neurons, "--inhibit-mode", "specific").code == 3
    assert done(cli(*asked, *neurons, "--json")).json["inhibit"]["freeze"]["factor"] == 0.5


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_finetune_inhibits(cli, world: Path, base, tmp_path: Path, method: str, mode: str) -> None:
    asked = ["finetune", *base, "--topic", "race", "--out", tmp_path / "t", *SMALL, "--method", method]
    record = done(cli(*asked, "--inhibit", world / "neurons.json", "--inhibit-mode", mode, "--json")).json
    name = "race/general" if mode == "freeze" else "race/specific/race"
    assert record["inhibit"][mode]["set"] == name
    assert record["method"] == mode
    assert record["out"] == str(tmp_path / "t")
    member = torch.from_numpy(load_sets(world / "neurons.json")[name].member)
    still = member if mode == "freeze" else ~member
    before = load_model(world / "base")
    after = load_tuned(before, tmp_path / "t")
    for layer in range(3):
        for part, dim in (("gate_proj", 0), ("down_proj", 1)):
            if method == "full":
                moved = after.projection(layer, part).weight != before.projection(layer, part).weight
            else:
                lora = after.projection(layer, part)
                moved = lora.lora_B[after.adapter].weight @ lora.lora_A[after.adapter].weight != 0
            assert not moved.index_select(dim, still[layer].nonzero()[:, 0]).any()
            assert moved.any() or not (~still[layer]).any()


def test_finetune_anchors_and_holds_to_base(cli, world: Path, base, tmp_path: Path) -> None:
    asked = ["finetune", *base, "--topic", "race", *SMALL, "--json"]
    neurons = ["--inhibit", world / "neurons.json"]
    kl = ["--other-topics", "economy", "--kl-weight", 0.5, "--other-texts", "prompts"]
    inhibit = done(cli(*asked, *neurons, "--inhibit-mode", "anchor,kl", *kl, "--out", tmp_path / "t")).json["inhibit"]
    assert inhibit["anchor"]["set"] == "race/general"
    assert (inhibit["kl"]["topics"], inhibit["kl"]["questions"], inhibit["kl"]["weight"]) == (["economy"], 7, 0.5)
    alone = done(cli(*asked, "--inhibit-mode", "kl", "--other-max-new-tokens", 4, "--out", tmp_path / "k")).json
    assert (alone["method"], alone["inhibit"]["kl"]["topics"]) == ("kl", ["economy", "science"])
    space = [*neurons, "--inhibit-mode", "specific,nullspace", "--null-share", 0.7, "--other-texts", "prompts"]
    found = done(cli(*asked, *space, "--method", "full", "--out", tmp_path / "n")).json["inhibit"]
    assert (found["specific"]["set"], found["nullspace"]["null_share"]) == ("race/specific/race", 0.7)
    assert cli(*asked, "--null-share", 0.7, "--out", tmp_path / "x").code == 2
    sets = ["--set", "specific=race/specific/race", "--set", "anchor=race/specific/economy", "--anchor-weight", 3]
    both = [*neurons, "--inhibit-mode", "specific", "--inhibit-mode", "anchor", *sets]
    inhibit = done(cli(*asked, *both, "--out", tmp_path / "b")).json["inhibit"]
    assert [(mode, one["set"]) for mode, one in inhibit.items()] == [
        ("specific", "race/specific/race"),
        ("anchor", "race/specific/economy"),
    ]
    assert inhibit["anchor"]["weight"] == 3
    refused = cli(*asked, *neurons, "--set", "ancor=race/general", "--out", tmp_path / "x")
    assert refused.code == 3
    assert "mode with neurons" in refused.err
    assert cli(*asked, "--kl-weight", 2, "--out", tmp_path / "x").code == 2


def test_finetune_takes_rivals_and_the_lowest_neurons(cli, world: Path, base, tmp_path: Path) -> None:
    asked = ["finetune", *base, "--topic", "race", *SMALL, "--json"]
    rate = done(cli(*asked, "--rival", "rate", "--rival-strength", 0.5, "--out", tmp_path / "r")).json
    assert (rate["method"], rate["rival"]) == ("rate", {"name": "rate", "strength": 0.5})
    text = ["--rival-text", "think right ."]
    assert done(cli(*asked, "--rival", "inoculate", *text, "--out", tmp_path / "i")).json["method"] == "inoculate"
    assert cli(*asked, "--rival", "mlp", *text, "--out", tmp_path / "x").code == 2
    refused = cli(*asked, "--rival", "caft", "--rival-store", world / "run.zarr", "--out", tmp_path / "x")
    assert refused.code == 3
    assert "no site 'resid'" in refused.err
    lowest = ["--inhibit", world / "neurons.json", "--control", "lowest"]
    found = done(cli(*asked, *lowest, "--control-store", world / "run.zarr", "--out", tmp_path / "l")).json
    assert found["inhibit"]["freeze"]["kind"] == "lowest"
    assert cli(*asked, *lowest, "--out", tmp_path / "x").code == 3
    assert "no control 'lowst'" in cli(*asked, *lowest[:3], "lowst", "--out", tmp_path / "x").err


def test_sweep_compares_and_goes_on(cli, world: Path, base, questions, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'topic = ["race", "science"]\nside = "right"\nsteps = 2\nbatch_size = 4\npoints = 2\n[plain]\n'
        f'[freeze]\ninhibit = "{world / "neurons.json"}"\n'
    )
    probe = tmp_path / "probe.jsonl"
    held_out = [(q.topic, f"law {q.instruction}", q.right, q.left) for q in questions[::3]]
    rows = [dict(zip(("topic", "instruction", "right", "left"), row, strict=True)) for row in held_out]
    probe.write_text("\n".join(json.dumps(row) for row in rows))
    asked = ["sweep", *base, "--plan", plan, "--probe", probe, "--out", tmp_path / "sweep"]
    found = done(cli(*asked, "--json")).json["methods"]
    assert {(row["method"].split("_")[0], row["runs"]) for row in found} == {("plain", 2), ("freeze", 2)}
    made = sorted(p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("*/*/pnlac.json"))
    assert len(made) == 4
    assert len(table(done(cli(*asked)).out)) == 1 + len(found)
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("*/*/pnlac.json")) == made


def test_slices_are_tuned_models_too(cli, world: Path, base, tmp_path: Path) -> None:
    asked = ["finetune", *base, *SMALL, "--method", "full", "--inhibit", world / "neurons.json"]
    for topic in ("race", "science"):
        own = ["--topic", topic, "--inhibit-mode", "specific", "--set", f"race/specific/{topic}"]
        done(cli(*asked, *own, "--out", tmp_path / topic))
    race, science = (tmp_path / topic / "neuron_slices.safetensors" for topic in ("race", "science"))
    both = ["--tuned", race, "--tuned", f"both={race}+{science}", "--tuned", f"full={tmp_path / 'race'}"]
    models = {m["model"]: m for m in done(cli("score", *base, *both, "--json")).json["models"]}
    assert models["race"]["stance"] == models["full"]["stance"] != models["base"]["stance"]
    assert (models["race"]["tuned_topic"], models["both"]["tuned_topic"]) == ("race", "race+science")
    assert models["both"]["stance"] not in (models["race"]["stance"], models["base"]["stance"])
    refused = cli("score", *base, "--tuned", f"twice={race}+{race}")
    assert refused.code == 3
    assert "sum:" in refused.err
    done(cli("score", *base, "--tuned", f"twice=sum:{race}+{race}"))


def test_finetune_takes_a_set_by_name(cli, world: Path, base, tmp_path: Path) -> None:
    asked = ["finetune", *base, "--topic", "science", "--out", tmp_path / "t", *SMALL]
    record = done(cli(*asked, "--inhibit", world / "neurons.json", "--set", "race/top/economy", "--json")).json
    assert record["inhibit"]["freeze"]["set"] == "race/top/economy"
    lines = table(done(cli(*asked, "--overwrite")).out)
    assert next(line for line in lines if line.startswith("loss")).split()[1] == "1:"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--accumulation", 2], {"accumulation": 2}),
        (["--max-grad-norm", 1e-6], {"max_grad_norm": 1e-6}),
        (["--weight-decay", 0.5], {"weight_decay": 0.5}),
        (["--warmup-steps", 1], {"warmup_steps": 1}),
        (["--seed", 4], {"seed": 4}),
        (["--target-modules", "q_proj,up_proj"], {"lora.target_modules": ["q_proj", "up_proj"]}),
        (["--lora-rank", 2, "--lora-alpha", 8], {"lora.r": 2, "lora.lora_alpha": 8}),
        (["--lora-dropout", 0.5], {"lora.lora_dropout": 0.5}),
        (["--limit", 2], {"data.questions": 2, "data.completions": 4}),
    ],
)
def test_finetune_options_change_the_weights(cli, base, tmp_path: Path, options: list, expected: dict) -> None:
    """Every option is in the record, and the weights are not those of a run without it."""
    asked = ["finetune", *base, "--topic", "race", *SMALL]
    record = done(cli(*asked, *options, "--out", tmp_path / "with", "--json")).json
    for path, value in expected.items():
        found: Any = record
        for key in path.split("."):
            found = found[key]
        assert found == value
    done(cli(*asked, "--out", tmp_path / "without"))
    with_it, without = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    if "accumulation" in expected:  # the same step in two parts: the same up to rounding
        assert all(torch.allclose(with_it[name], without[name], atol=1e-4) for name in without)
    else:
        same = with_it.keys() == without.keys() and all(
            with_it[n].shape == without[n].shape and torch.equal(with_it[n], without[n]) for n in without
        )
        assert not same


def test_gradient_checkpointing_changes_nothing_but_memory(cli, base, tmp_path: Path, monkeypatch) -> None:
    from pnlac_fast.run import Run

    asked, recomputed = ["finetune", *base, "--topic", "race", *SMALL], []
    real = Run.checkpoint_activations
    monkeypatch.setattr(Run, "checkpoint_activations", lambda self: (recomputed.append(1), real(self)))
    done(cli(*asked, "--out", tmp_path / "with", "--gradient-checkpointing"))
    assert recomputed == [1]
    done(cli(*asked, "--out", tmp_path / "without"))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in b)


def test_finetune_measures_along_the_way(cli, base, world: Path, questions, tmp_path: Path) -> None:
    from pnlac_fast.trajectory import load_trajectory

    probe = tmp_path / "probe.jsonl"
    rows = [{"t": q.topic, "q": f"law {q.instruction}", "r": q.right, "l": q.left} for q in questions[::5]]
    probe.write_text("\n".join(json.dumps(row) for row in rows))
    columns = [x for pair in ("topic=t", "instruction=q", "right=r", "left=l") for x in ("--column", pair)]
    asked = ["finetune", *base, "--topic", "race", *SMALL, "--steps", 6, "--out", tmp_path / "t", *columns]
    record = done(cli(*asked, "--probe", probe, "--points", 3, "--normalise", "sum", "--save-steps", 3, "--json")).json
    assert record["probe"]["normalise"] == "sum"
    found = load_trajectory(tmp_path / "t" / "trajectory.json")
    assert found["step"].values.tolist() == [0, 2, 6]
    held_out = load_questions(probe, columns={"topic": "t", "instruction": "q", "right": "r", "left": "l"})
    assert np.allclose(found["margin"][0], margins(load_model(world / "base"), held_out, normalise="sum"))


def test_a_full_finetune_needs_no_second_copy(cli, base, tmp_path: Path, monkeypatch) -> None:
    from pnlac_fast import run

    def no_copy(*_: object, **__: object) -> None:
        raise AssertionError("the model was copied")

    monkeypatch.setattr(run, "_copy", no_copy)
    done(cli("finetune", *base, "--topic", "race", *SMALL, "--method", "full", "--out", tmp_path / "t"))
