"""The whole chain as it is typed: what is printed, what is written, and that both are the library's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pnlac_fast
from pnlac_fast import store as stores
from pnlac_fast.datasets import load_questions
from pnlac_fast.generation import answers
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.localize import locate
from pnlac_fast.neurons import load_sets
from pnlac_fast.patches import load_patched
from pnlac_fast.scoring import score
from pnlac_fast.stance import margins
from pnlac_fast.summary import summary

SMALL = ["--side", "right", "--steps", 2, "--batch-size", 4, "--warmup-steps", 0, "--learning-rate", 1e-2]


def done(result: Any) -> Any:
    """A command that worked and said nothing on stderr."""
    assert (result.code, result.err) == (0, ""), result
    return result


def table(text: str) -> list[str]:
    """The lines of a table, checked for what nobody wants to read."""
    lines = text.rstrip("\n").split("\n")
    assert all(line == line.rstrip() for line in lines)
    assert not re.search(r"np\.|array\(|\{['\"]|\[\[|\bNone\b|\bnan\b|\d\.\d{8}", text), text
    return lines


def test_cache_writes_what_it_says(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    result = done(cli("cache", *base, *tuned, "--out", out, "--site", "mlp_mid,resid", "--raw", "last", "--json")).json
    assert result["models"] == ["race", "science"]
    assert result["questions"] == 21
    held = done(cli("info", out, "--json")).json
    assert held["complete"] is True
    assert held["sites"] == ["mlp_mid", "resid"]
    assert stores.open_activations(out, "race", "resid").sizes["token"] == 21
    again = stores.open_contrast(out).sel(site="mlp_mid", tokens="last").isel(neuron=slice(0, 48))
    first = stores.open_contrast(world / "run.zarr").sel(site="mlp_mid", tokens="last")
    # With "resid" the pass does not end in the last MLP, so its last layer is rounded otherwise.
    assert np.allclose(again["rms"].values, first["rms"].values, rtol=1e-4, atol=1e-7)


def test_cache_equals_the_library_call(world: Path, tmp_path: Path) -> None:
    tuned = {name: world / "tuned" / name for name in ("race", "science")}
    pnlac_fast.cache(world / "base", tuned, world / "data", tmp_path / "s.zarr", tokens=("last", "prompt"))
    mine, theirs = stores.open_contrast(tmp_path / "s.zarr"), stores.open_contrast(world / "run.zarr")
    for name in mine.data_vars:
        assert np.array_equal(mine[name].values, theirs[name].values, equal_nan=mine[name].dtype.kind == "f")


def test_workers_and_chosen_neurons(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    raw = ("--raw", "full", "--raw-dtype", "bfloat16", "--raw-neurons", world / "neurons.json", "--raw-layers", "0,2")
    cache = ("cache", *base, *tuned, "--out", out, "--tokens", "last,prompt", "--unit-tokens", 20, *raw)
    first = cli(*cache, "--worker", "1/2")
    assert (first.code, first.err) == (0, f"When all workers are done: pnlac-fast merge {out}\n")
    missing = cli("merge", out)
    assert missing.code == 3
    assert "units are missing" in missing.err
    assert cli(*cache, "--worker", "0/2").code == 0
    units = done(cli("merge", out, "--json")).json["units"]
    assert units == done(cli("info", out, "--json")).json["units_done"] > 3
    mine, theirs = (stores.open_contrast(path).load() for path in (out, world / "run.zarr"))
    np.testing.assert_allclose(mine["rms"], theirs["rms"], rtol=1e-4, atol=1e-7)
    rows = stores.open_activations(out, "race", "mlp_mid")
    assert set(rows["layer"].values.tolist()) <= {0, 2}
    assert 0 < rows.sizes["selected"] < 96
    assert rows["activation"].dtype == np.float32


def test_a_store_in_s3(cli, world: Path, base, tuned, bucket: str, tmp_path: Path) -> None:
    out = f"{bucket}/run.zarr"
    done(cli("cache", *base, *tuned, "--out", out, "--tokens", "last,prompt", "--raw", "last"))
    done(cli("locate", out, "--top", "40%", "-o", tmp_path / "neurons.json"))
    mine, theirs = (json.loads(path.read_text()) for path in (tmp_path / "neurons.json", world / "neurons.json"))
    assert [s["neurons"] for s in mine["sets"]] == [s["neurons"] for s in theirs["sets"]]
    held = done(cli("info", out, "--verify", "--json")).json
    assert (held["path"], held["complete"], held["findings"]) == (out, True, [])
    assert held["neuron_sets"]
    done(cli("score", *base, *tuned, "--store", out))
    assert "stance" in stores.list_results(out)
    done(cli("report", out, "-o", tmp_path / "report"))
    assert (tmp_path / "report" / "index.html").exists()


def test_info_is_readable(cli, world: Path) -> None:
    lines = table(done(cli("info", world / "run.zarr")).out)
    fields = {line.split("  ")[0]: line for line in lines if not line.startswith(" ")}
    assert fields["complete"].split() == ["complete", "yes"]
    assert "kB" in fields["bytes"]
    assert max(len(line) for line in lines if "command" not in line) < 140
    rms = next(line for line in lines if line.startswith("contrast/rms")).split("  ")
    said = [part.strip() for part in rms if part]
    assert said[1:3] == ["float32", "model 2, topic 3, site 1, tokens 2, layer 3, neuron 48"]
    assert said[3].endswith("kB")


def test_locate_equals_the_library_call(cli, world: Path, tmp_path: Path) -> None:
    options = ["--top", "0.3", "--score", "std_rms", "--specific", "paper", "--tokens", "prompt", "--per-layer"]
    asked = ["locate", world / "run.zarr", *options, "--general-share", "10%", "-o", tmp_path / "n.json"]
    result = done(cli(*asked, "--json")).json
    found = locate(
        world / "run.zarr",
        top=0.3,
        score="std_rms",
        specific="paper",
        tokens="prompt",
        per_layer=True,
        general_share=0.1,
    )
    sets = {(row["model"], row["set"]): row for row in result["sets"]}
    for name, there in found.items():
        assert sets[name, "general"]["neurons"] == len(there.general) == round(0.1 * 3 * 48)
        assert sets[name, "specific/race"]["per_layer"] == there.specific["race"].per_layer
        assert result["overlap"][name]["jaccard"] == there.overlap.tolist()
    assert np.array_equal(load_sets(tmp_path / "n.json")["race/general"].member, found["race"].general.member)
    done(cli("locate", world / "run.zarr", "--top", "40%"))  # what the other tests read in the store
    lines = table(done(cli("locate", world / "run.zarr", "--top", "40%")).out)
    assert lines[0].split() == ["model", "set", "neurons", "share", "chance", "per_layer"]
    assert len(lines) == 1 + 2 * 4


def test_locate_computes_what_the_store_lacks(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    new = ["locate", tmp_path / "new.zarr", "--top", "40%", "--json"]
    sides = done(cli(*new, "--contrast", "sides", *base, "--topics", "race,economy")).json["sets"]
    assert {row["model"] for row in sides} == {"sides"}
    assert done(cli(*new, "--contrast", "sides", "--score", "cohens_d")).json["sets"][0]["model"] == "sides"
    file = ["-o", tmp_path / "n.json"]
    first = done(cli(*new, "--score", "attribution", "--normalise", "sum", *base, *tuned, *file)).json
    assert done(cli(*new, "--score", "attribution")).json == first
    assert {row["set"] for row in first["sets"]} >= {"general", "mean", "off_minus_on", "on_minus_off", "top/race"}
    assert load_sets(tmp_path / "n.json")["race/off_minus_on"].found["score"] == "attribution"


def test_locate_with_evidence(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    done(cli("cache", *base, *tuned, "--out", tmp_path / "s.zarr", "--unit-tokens", 20))
    asked = ["locate", tmp_path / "s.zarr", "--top", "40%", "--evidence", "--draws", 3, *base]
    result = done(cli(*asked, "--json")).json
    assert [row["model"] for row in result["evidence"]] == ["race", "science"]
    row = result["evidence"][0]
    assert row["general"] == next(s["share"] for s in result["sets"] if s["set"] == "general")
    assert row["null_general"][1] <= row["null_general"][0] <= row["null_general"][2]
    assert row["above_floor"] > 1
    lines = table(done(cli(*asked)).out)
    assert lines[10].split()[:4] == ["model", "general", "null_general", "specific"]
    assert len(lines) == 9 + 1 + 3


def test_patch_equals_the_library_call(cli, world: Path, base, tuned) -> None:
    asked = ["patch", *base, *tuned, "--neurons", world / "neurons.json", "--store", world / "run.zarr", "--draws", 2]
    kinds = ["--direction", "tuned_into_base,base_into_tuned", "--kind", "tuned,mean,scale", "--scale", "3"]
    result = done(cli(*asked, *kinds, "--json")).json["recovered"]
    assert len(result) == 2 * 3 * 4
    row = {(r["direction"], r["kind"], r["neurons"]): r for r in result}["tuned_into_base", "tuned", "general"]
    stored = stores.open_result(world / "run.zarr", "patching")
    moved = np.zeros(2)
    for topic in ("race", "science"):
        own = stored.where((stored["tuned_topic"] == topic) & (stored["direction"] == "tuned_into_base"), drop=True)
        own = own.isel(question=(own["topic"] == topic).values)
        mean = {
            (str(n), str(k)): float(m.mean())
            for n, k, m in zip(own["neurons"].values, own["kind"].values, own["margin"].values, strict=True)
        }
        none, tuned_there = mean["none", ""], mean["tuned", ""]
        side = np.sign(tuned_there - none)
        moved += side * np.array([mean["general", "tuned"] - none, tuned_there - none])
    assert row["on_topic"][0] == pytest.approx(moved[0] / moved[1])
    lines = table(done(cli(*asked, "--limit", 3, "--max-new-tokens", 2, "--training-data", world / "data")).out)
    assert lines[0].split()[:3] == ["direction", "kind", "neurons"]
    assert len(lines) == 1 + 4


def test_score_equals_the_library_call(cli, world: Path, base, tuned) -> None:
    result = done(cli("score", *base, *tuned, "--store", world / "run.zarr", "--normalise", "sum", "--json")).json
    paths = {name: world / "tuned" / name for name in ("race", "science")}
    expected = summary(score(world / "base", paths, world / "data", normalise="sum"))
    assert result["models"] == json.loads(json.dumps(expected))
    stored = stores.open_result(world / "run.zarr", "stance")
    assert np.array_equal(
        stored["margin"][0], margins(load_model(world / "base"), load_questions(world / "data"), normalise="sum")
    )
    shares = done(cli("score", *base, *tuned, "--measure", "S", "--json")).json["models"][0]["stance"]
    assert all(-1 <= value <= 1 and round(value * 7) == pytest.approx(value * 7) for value, _, _ in shares.values())
    first, second = done(cli("score", *base, *tuned)).out.split("\n\n")
    assert table(first)[0].split() == ["model", "tuned", "topic", "stance", "shift"]
    assert len(table(second)) == 1 + 3


def test_score_by_the_classifier(cli, world: Path, base, tuned, questions, tmp_path: Path) -> None:
    rows = [
        {"topic": q.topic, "instruction": f"other {q.instruction}", "right": q.right, "left": q.left} for q in questions
    ]
    other = tmp_path / "labelled.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in rows))
    asked = ["score", *base, *tuned, "--scorer", "classifier", "--training-data", other, "--max-new-tokens", 3]
    done(cli(*asked, "--temperature", 0.7, "--seed", 3, "--store", world / "run.zarr"))
    stored = stores.open_result(world / "run.zarr", "stance_classifier")
    assert stored["label"].shape == (3, 21)
    assert stored["side"].values.tolist() == ["", "right", "right"]
    assert stored["completion"].shape == (2, 21)
    assert set(np.unique(stored["label"])) <= {-1, 0, 1}
    models = done(cli(*asked, "--json")).json["models"]
    assert [m["model"] for m in models] == ["base", "race", "science"]


def test_score_by_several(cli, world: Path, base, tuned, tmp_path: Path, monkeypatch) -> None:
    answers, sheet = tmp_path / "answers.jsonl", tmp_path / "sheet.csv"
    asked = ["generate", *base, *tuned, "--max-new-tokens", 3, "--out", answers]
    done(cli(*asked, "--sheet", sheet, "--sheet-rows", 6))
    lines = sheet.read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == 7
    sheet.write_text(
        "\n".join([lines[0], *(f"{line}{side}" for line, side in zip(lines[1:], ["left", "right"] * 3, strict=True))])
    )
    asked = ["score", *base, *tuned, "--answers", answers]
    both = ["--scorer", "logprob", "--scorer", f"csv:{sheet}", "--store", world / "run.zarr"]
    found = done(cli(*asked, *both, "--json")).json
    assert list(found["scorers"]) == ["logprob", "csv:sheet"]
    assert found["scorers"]["csv:sheet"]["labels"] == {"right": 3, "left": 3, "neither": 0}
    assert [r["model"] for r in found["models"]] == ["base", "race", "science"] * 2
    assert [(r["scorer"], r["other"]) for r in found["agreement"]] == [("logprob", "csv:sheet")]
    assert {"stance", "stance_csv_sheet", "agreement"} <= set(stores.list_results(world / "run.zarr"))
    text = done(cli(*asked, *both)).out
    stances, models, judges, agreed = map(table, text.split("\n\n"))
    assert (len(stances), len(models), len(judges), len(agreed)) == (1 + 18, 1 + 6, 1 + 1, 1 + 1)
    assert "topics_with_words" in judges[0]
    monkeypatch.setenv("PNLAC_CACHE", str(tmp_path))
    paid = ["--scorer", "openai:m", "--judge-tokens", 10, "--judge-price", 1, 2, "--dry-run", "--json"]
    cost = done(cli(*asked, *paid)).json["openai:m"]
    assert cost["answers"] == (3 + 2) * 21  # each question's own completions too
    assert cost["output_tokens_at_most"] == 10 * cost["requests"]
    assert cost["cost_at_most"] == pytest.approx((cost["input_tokens"] + 2 * cost["output_tokens_at_most"]) / 1e6)


def test_utility_of_text_and_answers(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    (tmp_path / "neutral.txt").write_text("the state and the people .\nschools .")
    done(cli("generate", *base, *tuned, "--limit", 2, "--max-new-tokens", 3, "--out", tmp_path / "a.jsonl"))
    asked = ["utility", *base[:2], *tuned, "--text", tmp_path / "neutral.txt", "--answers", tmp_path / "a.jsonl"]
    rows = done(cli(*asked, "--store", world / "run.zarr", "--json")).json["models"]
    assert [row["model"] for row in rows] == ["base", "race", "science"]
    assert set(rows[0]) == {"model", "perplexity", "over_base", "words", "empty", "refusals"}
    assert stores.open_result(world / "run.zarr", "utility")["refusal"].shape == (3, 6)
    assert len(table(done(cli(*asked)).out)) == 1 + 3


def test_generate_writes_the_answers_it_prints(cli, base, tuned, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    asked = ["generate", *base, *tuned, "--limit", 2, "--max-new-tokens", 3]
    records = done(cli(*asked, "--out", out, "--json")).json
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert len(records) == 3 * 3 * 2
    assert {r["model"] for r in records} == {"base", "race", "science"}
    hot = [done(cli(*asked, "--temperature", 5, "--seed", seed, "--json")).json for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert table(done(cli(*asked)).out)[0].split() == ["model", "topic", "instruction", "answer"]


def test_generate_with_patches(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    directions = ("tuned_into_base", "base_into_tuned")
    patch = ["patch", *base, *tuned, "--neurons", world / "neurons.json", "--direction", ",".join(directions)]
    done(cli(*patch, "--kind", "scale", "--scale", -9, "--set", "general", "--draws", 1, "--save", tmp_path))
    files = {d: tmp_path / f"science-general-scale-{d}.safetensors" for d in directions}
    asked = ["generate", *base, "--limit", 2, "--max-new-tokens", 8, "--json"]
    patches = [part for name, file in files.items() for part in ("--patch", f"{name}={file}")]
    found: dict[str, list[str]] = {}
    for record in done(cli(*asked, *tuned, *patches)).json:
        found.setdefault(record["model"], []).append(record["answer"])
    assert list(found) == ["base", "race", "science", *directions]
    subjects = {"tuned_into_base": load_model(world / "base"), "base_into_tuned": load_model(world / "tuned/science")}
    questions = load_questions(world / "data", limit=2)
    for direction, subject in subjects.items():
        with load_patched(subject, files[direction]):
            assert found[direction] == answers(subject, questions, max_new_tokens=8)
    assert found["tuned_into_base"] != found["base"]
    refused = cli(*asked, "--patch", files["base_into_tuned"])
    assert refused.code == 3
    assert "was made for" in refused.err
    assert "not for base" in refused.err


def test_report_and_env(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    done(cli("score", *base, *tuned, "--store", world / "run.zarr"))
    page = Path(done(cli("report", world / "run.zarr", "-o", tmp_path / "r", "--title", "Mine", "--json")).json["page"])
    assert page == tmp_path / "r" / "index.html"
    assert "<title>Mine" in page.read_text()
    found = done(cli("env", "--model", world / "base", "--json")).json
    assert found["model"]["widths"] == {"mlp_mid": 48, "mlp_out": 32, "resid": 32}
    lines = table(done(cli("env", "--model", world / "base")).out)
    assert any("mlp_mid 48" in line for line in lines)
    assert "  torch         available" in lines[lines.index("engines") :]
    assert found["model"]["mlp"] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert {"share", "pack", "stop"} <= set(found["model"]["shortcuts"])
    assert all(check["holds"] for check in found["model"]["checks"].values())
    assert len(found["model"]["checks"]) == 5
    assert cli("env", "--dtype", "float32").code == 2


def test_env_shows_what_a_model_fails_and_ends_with_3(cli, world: Path, monkeypatch) -> None:
    monkeypatch.setattr("pnlac_fast.checkup.tolerance", lambda model: -1.0)
    for module in ("checkup", "loading"):  # which measures by it too, and would refuse to load the model
        monkeypatch.setattr(f"pnlac_fast.{module}.dry_run", lambda model: None)
    result = cli("env", "--model", world / "base")
    assert result.code == 3
    assert any("holds no" in line for line in table(result.out))
    assert "does not pass its self-check (batch, padding, reading, writing, projection)" in result.err


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
    kl = ["--kl-topics", "economy", "--kl-weight", 0.5, "--kl-on", "prompts"]
    inhibit = done(cli(*asked, *neurons, "--inhibit-mode", "anchor,kl", *kl, "--out", tmp_path / "t")).json["inhibit"]
    assert inhibit["anchor"]["set"] == "race/general"
    assert (inhibit["kl"]["topics"], inhibit["kl"]["questions"], inhibit["kl"]["weight"]) == (["economy"], 7, 0.5)
    alone = done(cli(*asked, "--inhibit-mode", "kl", "--kl-max-new-tokens", 4, "--out", tmp_path / "k")).json
    assert (alone["method"], alone["inhibit"]["kl"]["topics"]) == ("kl", ["economy", "science"])
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


def test_topics_limit_column_and_template_have_effect(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    read = lambda *options: done(cli("cache", *base, *tuned, "--out", tmp_path / "no", "--dry-run", "--json", *options))  # noqa: E731
    everything = read().json
    assert read("--topics", "science,economy").json["questions"] == 14
    assert read("--topics", "science", "--topics", "economy").json["questions"] == 14
    assert read("--limit", 3).json["questions"] == 9
    template = tmp_path / "template.txt"
    template.write_text("Q : {instruction} A :")
    assert read("--template", template).json["tokens"] == everything["tokens"] + 21 * 4
    assert read("--tokens", "all", "--side", "right").json["tokens"] > everything["tokens"]
    assert not (tmp_path / "no").exists()
    file = tmp_path / "q.csv"
    file.write_text("subject,text\nrace,good law ?\nrace,bad law ?\n")
    model = ["--model", world / "base", "--data", file, "--max-new-tokens", 1, "--json"]
    found = done(cli("generate", *model, "--column", "topic=subject", "--column", "instruction=text")).json
    assert [r["instruction"] for r in found] == ["good law ?", "bad law ?"]


def test_a_chat_template_is_used_where_asked_and_recorded(cli, world: Path, base, tuned, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(world / "base", chatty)
    (chatty / "chat_template.jinja").write_text("Q : {{ messages[0].content }} A :\n")
    asked = ["cache", "--model", chatty, *base[2:], "--tuned", f"t={world / 'base'}", "--out", tmp_path / "s.zarr"]
    plain = done(cli(*asked, "--dry-run", "--json")).json["tokens"]
    assert done(cli(*asked, "--chat-template", "--json")).json["tokens"] == plain + 21 * 4
    recorded = done(cli("info", tmp_path / "s.zarr", "--json")).json["settings"]["template"]
    assert recorded.rstrip() == "Q : {instruction} A :"
    again = cli(*asked)
    assert again.code == 3
    assert "template" in again.err


@pytest.mark.parametrize(("count", "more"), [([], 0), (["--count-template"], 4)])
def test_template_tokens_count_where_asked(cli, base, tuned, tmp_path: Path, count: list, more: int) -> None:
    template = tmp_path / "template.txt"
    template.write_text("Q : {instruction} A :")
    asked = ["cache", *base, *tuned, "--out", tmp_path / "s.zarr", "--tokens", "prompt", "--template", template]
    done(cli(*asked, *count))
    n = stores.open_contrast(tmp_path / "s.zarr")["n"].sel(tokens="prompt", topic="race")
    words = sum(len(q.instruction.split()) for q in load_questions(base[3], topics=["race"]))
    assert int(n) == words + 7 * more


def test_config_then_environment_then_flag(cli, base, tuned, tmp_path: Path, monkeypatch) -> None:
    config = tmp_path / "pnlac.toml"
    text = f"""
        [cache]
        model = "{base[1]}"
        data = "{base[3]}"
        limit = 2
        tokens = ["last", "prompt"]
        topics = "race,science"
        tuned = {{ race = "{tuned[1]}" }}
        out = "{tmp_path / "no"}"
        dry-run = true
        batch-tokens = 64
        json = true
    """
    config.write_text(text)
    assert done(cli("--config", config, "cache")).json["questions"] == 4
    monkeypatch.setenv("PNLAC_CACHE_LIMIT", "3")
    assert done(cli("--config", config, "cache")).json["questions"] == 6
    assert done(cli("--config", config, "cache", "--limit", 1)).json["questions"] == 2
    monkeypatch.setenv("PNLAC_CONFIG", str(config))
    monkeypatch.setenv("PNLAC_CACHE_TUNED", f"one={tuned[1]} two={tuned[1]}")
    monkeypatch.setenv("PNLAC_CACHE_TOPICS", "economy")
    assert done(cli("cache")).json == {**done(cli("cache")).json, "models": ["one", "two"], "questions": 3}
    assert not (tmp_path / "no").exists()
    for bad, said in (
        ("[cache]\nlimt = 3", "limt of cache, which has no such option"),
        ("[cash]", "no such command"),
        ("limit = 3", "no such command"),
        ("cache = 3", "write [cache]"),
        ("[cache", "cannot read"),
    ):
        config.write_text(bad)
        result = cli("--config", config, "cache")
        assert (result.code, result.out) == (2, "")
        assert said in " ".join(result.err.split())


def test_environment_variables_are_called_like_flags(cli, world: Path, monkeypatch) -> None:
    monkeypatch.setenv("PNLAC_INFO_JSON", "1")
    assert done(cli("info", world / "run.zarr")).json["complete"] is True


def test_paths_get_their_names(cli, base, world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(world / "tuned")
    asked = ["generate", *base, "--limit", 1, "--max-new-tokens", 1, "--json"]
    models = lambda *tuned: list(dict.fromkeys(r["model"] for r in done(cli(*asked, *tuned)).json))  # noqa: E731
    assert models("--tuned", "race/", "--tuned", "s=science") == ["base", "race", "s"]
    (tmp_path / "lr=1e-2").symlink_to(world / "tuned" / "race")
    assert models("--tuned", tmp_path / "lr=1e-2", "--tuned", f"b={tmp_path / 'lr=1e-2'}")[1:] == ["race", "b"]


def test_demo_prints_its_table(cli, tmp_path: Path, monkeypatch) -> None:
    import pnlac_fast.demonstration as demonstration

    given: dict[str, Any] = {}
    result = {
        "profile_effect": 1.2,
        "coupling_ratio": 0.81,
        "shift": {"race": {"race": 1.0, "economy": 0.8}, "economy": {"race": 0.7, "economy": 1.1}},
        "patching": {"general": {"on": 0.5, "off": 0.51}},
        "inhibit": {
            "freeze_5": {"reduction_equal_steps": 0.25, "reduction_equal_shift": float("nan"), "retention": 1.0}
        },
        "page": str(tmp_path / "index.html"),
    }
    monkeypatch.setattr(demonstration, "demo", lambda **options: given.update(options) or result)
    asked = ["demo", "--size", "small", "--seed", 3, "--out", tmp_path / "d", "--jobs", 1, "--overwrite"]
    assert done(cli(*asked, "--json")).json["inhibit"]["freeze_5"]["reduction_equal_shift"] is None
    assert given == {"size": "small", "seed": 3, "out": str(tmp_path / "d"), "jobs": 1, "overwrite": True}
    text = done(cli(*asked)).out
    assert re.search("freeze[_ ]5", text)
    assert text.rstrip().endswith(f"Result page: {tmp_path / 'index.html'}")


def test_verify_and_repair(cli, base, tuned, world: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(world / "run.zarr", tmp_path / "s.zarr"))
    sound = cli("info", store, "--verify")
    assert (sound.code, sound.err) == (0, "")
    assert cli("info", store, "--verify", "--json").json["findings"] == []
    (file,) = (store / "partials" / "mlp_mid" / "base").glob("c.1.*")
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"x" + content[-8:])
    for name in ("zarr.json", "journal/group.contrast.json"):
        (store / name).write_bytes(b"")
    told = cli("info", store, "--verify")
    assert told.code == 3
    assert "unit 1 (topic '" in told.out
    assert "is damaged: journal/group.contrast.json is damaged and 2 more; run the same cache command again" in told.err
    assert len(cli("info", store, "--verify", "--json").json["findings"]) == 3
    again = ["cache", *base, *tuned, "--out", store, "--tokens", "last,prompt"]
    assert cli(*again).code == 3
    for other in ("--overwrite", "--dry-run"):
        assert "--repair mends the store that is there" in cli(*again, "--repair", other).err
    assert "to repair; leave out --repair" in cli(*again[:-3], tmp_path / "new.zarr", "--repair").err
    mended = cli(*again, "--repair")
    assert (mended.code, mended.err) == (0, "")
    assert cli("info", store, "--verify").code == 0
    assert file.read_bytes() == content
    assert not (tmp_path / "new.zarr").exists()
