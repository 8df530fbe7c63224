"""Bad input through the command line: the right exit code, one sentence that says what to do, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pnlac_fast import store as stores
from pnlac_fast.loading import load_model

USAGE, MEND, STOPPED = 2, 3, 4


def refused(result: Any, code: int, *said: str) -> str:
    """The one sentence of a refusal."""
    assert result.code == code, result
    assert result.out == ""
    assert "Traceback" not in result.err
    text = result.err.strip()
    if code == USAGE:
        text = text[text.index("Error: ") :]
    assert "\n" not in text.strip(), text
    for part in said:
        assert part in text, text
    return text


def state(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def cache(base, tuned, tmp_path: Path) -> list[Any]:
    return ["cache", *base, *tuned, "--out", tmp_path / "s.zarr"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--topics", "rase"], MEND, ["no topic 'rase'", "Did you mean 'race'"]),
        (["--site", "mlp-mid"], MEND, ["no site 'mlp-mid'", "Did you mean 'mlp_mid'"]),
        (["--tokens", "lost"], MEND, ["no token selector 'lost'", "Did you mean 'last'"]),
        (["--engine", "cppp"], MEND, ["no engine 'cppp'", "Did you mean 'cpp'"]),
        (["--raw", "some"], MEND, ["no raw mode 'some'"]),
        (["--dtype", "float31"], MEND, ["no dtype 'float31'", "Did you mean 'float32'"]),
        (["--device", "gpu"], MEND, ["device 'gpu'", "--device cpu"]),
        (["--limit", "0"], MEND, ["--limit 0 leaves no question"]),
        (["--limit", "some"], USAGE, ["'some' is not a valid integer"]),
        (["--tokens", "all", "--side", "wrong"], MEND, ["no side 'wrong'"]),
        (["--side", "left"], USAGE, ["--side has no effect without --tokens completion or all"]),
        (["--count-template"], USAGE, ["--count-template has no effect without --tokens prompt or all"]),
        (["--column", "instruction"], USAGE, ["ROLE=NAME"]),
        (["--column", "question=text"], MEND, ["no column role 'question'"]),
        (["--template", "nowhere.txt"], MEND, ["no template file 'nowhere.txt'", "--template"]),
        (["--tuned", "race=elsewhere"], USAGE, ["two values are called 'race'"]),
        (["--tuned", "base=elsewhere"], MEND, ["cannot be called 'base'", "NAME=PATH"]),
        (["--layers", "3"], USAGE, ["No such option"]),
    ],
)
def test_unknown_names(cli, cache, tmp_path: Path, options: list, code: int, said: list) -> None:
    refused(cli(*cache, *options), code, *said)
    assert not (tmp_path / "s.zarr").exists()


def test_missing_options_and_commands(cli) -> None:
    refused(cli("cache"), USAGE, "Missing option '--model'")
    refused(cli("cash"), USAGE, "No such command 'cash'")
    assert cli().code == USAGE


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["locate", "run.zarr", "--score", "std_rmse"], MEND, ["no score 'std_rmse'", "Did you mean 'std_rms'"]),
        (["locate", "run.zarr", "--top", "0"], MEND, ["not between 0 and 100 %"]),
        (["locate", "run.zarr", "--top", "many"], USAGE, ["write 5% or 0.05"]),
        (["locate", "run.zarr", "--site", "resid"], MEND, ["no site 'resid'", "Known: mlp_mid"]),
        (["locate", "run.zarr", "--tokens", "all"], MEND, ["no tokens 'all'", "Known: last, prompt"]),
        (["locate", "run.zarr", "--contrast", "side"], MEND, ["no contrast 'side'", "Did you mean 'sides'"]),
        (
            ["locate", "run.zarr", "--score", "attribution"],
            MEND,
            ["holds no attribution", "--data and --tuned"],
        ),
        (["locate", "run.zarr", "--data", "data"], USAGE, ["--data has no effect without --model"]),
        (["locate", "run.zarr", "--specific", "strct"], MEND, ["Did you mean 'strict'"]),
        (["locate", "data"], MEND, ["store"]),
        (["info", "nowhere.zarr"], MEND, ["nowhere.zarr"]),
        (["info", "data"], MEND, ["data", "store"]),
        (["report", "data", "-o", "r"], MEND, ["store"]),
        (["env", "--model", "nowhere/at/all"], MEND, ["Cannot load the model 'nowhere/at/all'"]),
        (["demo", "--size", "small", "--out", "data"], MEND, ["'data' exists already", "--overwrite"]),
        (["demo", "--size", "small", "--out", "data", "--overwrite"], MEND, ["earlier demo", "another --out"]),
    ],
)
def test_stores_and_places(cli, world: Path, monkeypatch, arguments: list, code: int, said: list) -> None:
    monkeypatch.chdir(world)
    before = state(world / "data")
    refused(cli(*arguments), code, *said)
    assert state(world / "data") == before
    assert not (world / "r").exists()


def test_no_model_at_a_path(cli, base, tuned, tmp_path: Path) -> None:
    asked = ["--data", base[3], *tuned, "--out", tmp_path / "s.zarr"]
    refused(cli("cache", "--model", tmp_path / "nothing", *asked), MEND, "Cannot load the model")
    refused(cli("cache", *base, "--tuned", tmp_path / "nothing", "--out", tmp_path / "s.zarr"), MEND, "Cannot load")
    refused(cli("cache", "--model", tuned[1], *asked), MEND, "is an adapter", "--tuned")
    assert not (tmp_path / "s.zarr").exists()


def test_a_model_type_without_mlps(cli, base, tuned, world: Path, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path / "mamba")
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "mamba")
    asked = ["score", "--model", tmp_path / "mamba", *base[2:], "--tuned", f"t={tmp_path / 'mamba'}"]
    refused(cli(*asked), MEND, "type 'mamba' is not found", "--last-projection", "mixer.out_proj")
    refused(cli(*asked, "--last-projection", "mlp.down_proj"), MEND, "at 'mlp.down_proj'")


def test_an_adapter_for_another_base(cli, base, model_paths, world: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    asked = ["--data", base[3], "--out", tmp_path / "s.zarr"]
    other = LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    narrow = LlamaForCausalLM(other)
    get_peft_model(narrow, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    said = refused(cli("cache", *base[:2], *asked, "--tuned", tmp_path / "adapter"), MEND, "does not fit this base")
    assert len(said) < 500
    narrow = LlamaForCausalLM(other)
    narrow.save_pretrained(tmp_path / "narrow")
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "narrow")
    refused(
        cli("cache", *base[:2], *asked, "--tuned", tmp_path / "narrow"), MEND, "MLP neurons", "tuned from this base"
    )
    assert not (tmp_path / "s.zarr").exists()


def test_an_adapter_that_needs_unpickling(cli, base, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "a" / "adapter_model.bin").write_text("")
    refused(cli("cache", *base, "--tuned", tmp_path / "a", "--out", tmp_path / "s.zarr"), MEND, "safetensors")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.jsonl", '{"topic": "race", "instruction": "law ?"}\n', "scoring needs pairs"),
        ("q.jsonl", '{"topic": "race", "instruction": "law ?", "right": "good"}\n', "scoring needs pairs"),
        ("q.jsonl", '{"topic": "race", "question": "law ?"}\n', "map columns with --column"),
        ("q.jsonl", "{", "line 1 is not JSON"),
        ("q.jsonl", "", "holds no questions"),
        ("q.csv", "", "holds no questions"),
        ("q.json", "[]", "holds no questions"),
        ("q.json", "{}", "JSON array"),
        ("q.txt", "law ?", "give a folder, .jsonl"),
    ],
)
def test_data_that_cannot_be_scored(cli, base, tuned, tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    refused(cli("score", *base[:2], "--data", tmp_path / name, *tuned), MEND, said)


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.json", "q.parquet"])
def test_data_that_are_no_text(cli, base, tuned, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)))
    refused(cli("score", *base[:2], "--data", tmp_path / name, *tuned), MEND, name)


def test_an_empty_folder_and_no_data(cli, base, tuned, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(cli("score", *base[:2], "--data", tmp_path / "empty", *tuned), MEND, "check --data")
    refused(cli("score", *base[:2], "--data", tmp_path / "none", *tuned), MEND, "no data at", "--data")


def test_missing_completions(cli, base, cache, world: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"topic": "race", "instruction": "law ?"}\n')
    refused(cli(*cache, "--data", bare, "--tokens", "completion"), MEND, "has no completion", "--tokens last")
    asked = ["finetune", *base[:2], "--data", bare, "--topic", "race", "--side", "left", "--out", tmp_path / "t"]
    refused(cli(*asked), MEND, "no left completion", "add completions")
    assert not list(tmp_path.glob("t*"))


def test_prompts_longer_than_the_context(cli, base, tuned, cache, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    row = {"topic": "race", "instruction": "law " * 200, "right": "good", "left": "bad"}
    long.write_text(json.dumps(row))
    said = ("needs 20", "the model's context is 128", "shorten or remove")
    refused(cli(*cache, "--data", long), MEND, *said)
    refused(cli("score", *base[:2], "--data", long, *tuned), MEND, *said)
    refused(cli("generate", *base[:2], "--data", long), MEND, "shorten or remove")
    asked = ["finetune", *base[:2], "--data", long, "--topic", "race", "--side", "left", "--out", tmp_path / "t"]
    refused(cli(*asked), MEND, *said)
    refused(cli("generate", *base, "--max-new-tokens", 500), MEND, "context")


def test_a_store_made_with_other_settings(cli, world: Path, cache, tmp_path: Path) -> None:
    assert cli(*cache).code == 0
    before = state(tmp_path / "s.zarr")
    refused(cli(*cache, "--limit", 2), MEND, "s.zarr", "--overwrite")
    refused(cli(*cache, "--tokens", "prompt"), MEND, "tokens")
    refused(cli(*cache, "--raw", "last"), MEND, "raw")
    assert state(tmp_path / "s.zarr") == before
    assert cli(*cache, "--limit", 2, "--overwrite").code == 0


def test_a_place_that_is_taken_by_something_else(cli, cache, base, tmp_path: Path) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "thesis.txt").write_text("mine")
    refused(cli(*cache), MEND, "s.zarr")
    refused(cli(*cache, "--overwrite"), MEND, "s.zarr")
    assert (tmp_path / "s.zarr" / "thesis.txt").read_text() == "mine"
    (tmp_path / "t").mkdir()
    asked = ["finetune", *base, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    refused(cli(*asked), MEND, "exists", "--overwrite")


def test_weights_that_are_not_finite(cli, base, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "tuned" / "science", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    asked = [*base, "--tuned", tmp_path / "broken"]
    refused(cli("cache", *asked, "--out", tmp_path / "s.zarr"), MEND, "'broken' at mlp_mid, layer 1", "--dtype float32")
    refused(cli("score", *asked, "--store", tmp_path / "s.zarr"), MEND, "'broken' are not finite")


def test_neurons_of_another_model(cli, base, tuned, world: Path, model_paths, tmp_path: Path) -> None:
    file = world / "neurons.json"
    other = ["--model", model_paths["llama_tuned"], *base[2:]]
    said = ("was found in a base model with sha256", "locate the neurons on this model")
    refused(cli("patch", *other, *tuned, "--neurons", file), MEND, *said)
    finetune = ["finetune", *other, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    refused(cli(*finetune, "--inhibit", file), MEND, *said)
    refused(cli(*finetune, "--inhibit", tmp_path / "none.json"), MEND, "no neuron file", "pnlac-fast locate")
    refused(cli(*finetune, "--inhibit", world / "data"), MEND, "no neuron file")
    refused(cli(*finetune, "--inhibit", world / "base" / "config.json"), MEND, "not a pnlac-neurons file")
    refused(cli(*finetune, "--inhibit", file, "--set", "race/genral"), MEND, "Did you mean 'race/general'")
    assert not list(tmp_path.iterdir())


def test_an_empty_neuron_set(cli, base, tuned, world: Path, tmp_path: Path) -> None:
    record = json.loads((world / "neurons.json").read_text())
    for entry in record["sets"]:
        if entry["kind"] == "general":
            entry["neurons"] = {}
    (tmp_path / "n.json").write_text(json.dumps(record))
    said = ("'race/general' is empty", "raise --top")
    refused(cli("patch", *base, *tuned, "--neurons", tmp_path / "n.json"), MEND, *said)
    finetune = ["finetune", *base, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    refused(cli(*finetune, "--inhibit", tmp_path / "n.json"), MEND, *said)
    assert not list(tmp_path.glob("t*"))


def test_an_inhibition_that_meets_no_weight(cli, base, world: Path, tmp_path: Path) -> None:
    asked = ["finetune", *base, "--topic", "race", "--side", "left", "--steps", 1, "--out", tmp_path / "t"]
    asked += ["--inhibit", world / "neurons.json"]
    refused(cli(*asked, "--target-modules", "q_proj,v_proj"), MEND, "q_proj and v_proj only", "add gate_proj")
    refused(cli(*asked, "--target-modules", "q_prj"), MEND, "q_prj")
    assert not list(tmp_path.glob("t*"))


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("finetune", ["--points", 3], "--points has no effect without --probe"),
        ("finetune", ["--set", "x"], "--set has no effect without --inhibit"),
        ("finetune", ["--method", "full", "--lora-rank", 4], "--lora-rank has no effect without --method lora"),
        ("score", ["--temperature", 1], "--temperature has no effect without --scorer classifier"),
        ("score", ["--scorer", "classifier", "--measure", "S"], "without --scorer logprob"),
        ("score", ["--scorer", "classifier", "--judge-url", "http://x"], "without --scorer openai:"),
        ("score", ["--scorer", "csv:x,openai:y", "--judge-label", "A=left"], "without --scorer hf: or nli:"),
        ("score", ["--dry-run"], "without --answers"),
        ("generate", ["--sheet-rows", 3], "without --sheet"),
        ("generate", ["--seed", 1], "--seed has no effect without --temperature"),
        ("patch", ["--scale", 3], "--scale has no effect without --kind scale"),
        ("patch", ["--training-data", "x"], "no effect without --max-new-tokens"),
    ],
)
def test_an_option_without_effect(cli, base, tuned, command: str, options: list, said: str) -> None:
    needed: dict[str, list[Any]] = {
        "finetune": ["--topic", "race", "--side", "left", "--out", "t"],
        "patch": [*tuned, "--neurons", "n.json"],
        "score": tuned,
        "generate": [],
    }
    refused(cli(command, *base, *needed[command], *options), USAGE, said)


def test_scores_that_cannot_be_computed(cli, base, tuned, world: Path) -> None:
    refused(cli("score", *base, *tuned, "--scorer", "logprobs"), MEND, "Did you mean 'logprob'")
    refused(cli("score", *base, *tuned, "--normalise", "tokens"), MEND, "Did you mean 'token'")
    refused(cli("score", *base, *tuned, "--scorer", "classifier"), MEND, "--training-data")
    asked = ["score", *base, *tuned, "--scorer", "classifier", "--training-data", base[3]]
    refused(cli(*asked), MEND, "in --training-data too")
    refused(cli("score", *base, *tuned, "--store", world / "data"), MEND, "data")
    patch = ["patch", *base, *tuned, "--neurons", world / "neurons.json"]
    refused(cli(*patch, "--kind", "mean"), MEND, "means from a store")
    refused(cli(*patch, "--kind", "median"), MEND, "no patch 'median'")
    refused(cli(*patch, "--direction", "base_into_tune"), MEND, "Did you mean 'base_into_tuned'")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topic", "rase"], "Did you mean 'race'"),
        (["--steps", 0], "train nothing"),
        (["--epochs", 1], "choose one"),
        (["--batch-size", 4, "--accumulation", 3], "equal parts"),
        (["--learning-rate", 1e30], "lower the learning rate"),
    ],
)
def test_settings_of_a_finetune(cli, base, tmp_path: Path, options: list, said: str) -> None:
    asked = ["finetune", *base, "--topic", "race", "--side", "left", "--steps", 3, "--out", tmp_path / "t"]
    refused(cli(*asked, *options), MEND, said)
    assert not list(tmp_path.glob("t*"))


def test_ctrl_c_in_the_middle_of_cache(cli, cache, world: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = stores.Writer.commit, []

    def interrupted(self: Any, unit: int, *args: Any, **kwargs: Any) -> Any:
        calls.append(unit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, unit, *args, **kwargs)

    cache += ["--tokens", "last,prompt", "--unit-tokens", 20]
    monkeypatch.setattr(stores.Writer, "commit", interrupted)
    refused(cli(*cache), STOPPED, "same command again", "s.zarr")
    held = cli("info", tmp_path / "s.zarr", "--json").json
    assert (held["complete"], held["units_done"]) == (False, 2)
    refused(cli("locate", tmp_path / "s.zarr"), MEND, "unfinished: 2 of", "same cache command again")
    assert cli(*cache).code == 0
    assert len(calls) == held["units_total"] + 1
    equal(tmp_path / "s.zarr", world / "run.zarr")


def test_ctrl_c_anywhere_else(cli, base, tuned, monkeypatch) -> None:
    from pnlac_fast import scoring

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "margins", interrupted)
    refused(cli("score", *base, *tuned), STOPPED, "Stopped", "same command again")


def test_ctrl_c_in_the_middle_of_the_demo(cli, tmp_path: Path, monkeypatch) -> None:
    import pnlac_fast.demonstration as demonstration

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstration.testbed, "build", interrupted)
    for _ in range(2):  # the same command again is not refused for what the first has left
        refused(cli("demo", "--out", tmp_path / "d"), STOPPED, "Stopped", "same command again")
    refused(cli("demo", "--out", tmp_path / "d", "--seed", 1), MEND, "exists already", "--overwrite")
    (tmp_path / "d" / demonstration.UNFINISHED).unlink()
    refused(cli("demo", "--out", tmp_path / "d"), MEND, "exists already", "--overwrite")


def test_ctrl_c_in_the_middle_of_a_finetune(cli, base, tmp_path: Path, monkeypatch) -> None:
    from pnlac_fast.trajectory import Trajectory

    data = ["--model", base[1], "--data", base[3], "--topic", "race", "--side", "left", "--limit", 3]
    probe = tmp_path / "probe.jsonl"
    probe.write_text('{"topic": "race", "instruction": "good law ?", "right": "good", "left": "bad"}\n')
    asked = ["finetune", *data, "--steps", 6, "--save-steps", 2, "--probe", probe, "--points", 4]
    assert cli(*asked, "--out", tmp_path / "whole").code == 0
    real: Callable[..., None] = Trajectory.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(Trajectory, "on_step_end", interrupted)
    refused(cli(*asked, "--out", tmp_path / "broken"), STOPPED, "step 5 of 6", "goes on from step 4")
    assert not (tmp_path / "broken").exists()
    monkeypatch.setattr(Trajectory, "on_step_end", real)
    refused(cli(*asked, "--out", tmp_path / "broken", "--seed", 1), MEND, "other settings (seed)", "--overwrite")
    assert cli(*asked, "--out", tmp_path / "broken").code == 0
    whole, broken = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert (tmp_path / "whole" / "trajectory.json").read_text() == (tmp_path / "broken" / "trajectory.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cache_and_the_same_command_goes_on(
    cli, base, tuned, world: Path, tmp_path: Path, number: signal.Signals
) -> None:
    rows = [{"topic": t, "instruction": f"law {'good ' * (i % 40)}?"} for t in ("race", "economy") for i in range(200)]
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "s.zarr"
    options = ["cache", *base[:2], "--data", tmp_path / "many.jsonl", *tuned, "--unit-tokens", 60]
    command = [sys.executable, "-m", "pnlac_fast.cli", *map(str, options), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        deadline = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < deadline and not committed(out):
            time.sleep(0.02)
        run.send_signal(number)
        printed, err = run.communicate(timeout=30)
    assert run.returncode == STOPPED, err
    assert printed == ""
    assert err.strip() == f"Error: Stopped. Run the same command again to go on with '{out}'."
    held = stores.info(out)
    assert 0 < held["units_done"] < held["units_total"]
    assert cli(*options, "--out", out).code == 0
    assert cli(*options, "--out", tmp_path / "whole.zarr").code == 0
    equal(out, tmp_path / "whole.zarr")


def committed(store: Path) -> bool:
    try:
        return bool(stores.info(store)["units_done"])
    except stores.StoreError:
        return False


def equal(store: Path, other: Path) -> None:
    """Two stores hold the same statistics, up to how sums were cut into units."""
    mine, theirs = stores.open_contrast(store), stores.open_contrast(other)
    assert np.array_equal(mine["n"], theirs["n"])
    for name in ("mean_base", "std_tuned", "rms"):
        assert np.allclose(mine[name].values, theirs[name].values, rtol=1e-5, atol=1e-6, equal_nan=True), name


def test_models_are_loaded_unpickled_never(cli, base, tmp_path: Path) -> None:
    shutil.copytree(base[1], tmp_path / "m")
    torch.save(load_model(base[1]).hf.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    refused(cli("env", "--model", tmp_path / "m"), MEND, "Cannot load the model")
