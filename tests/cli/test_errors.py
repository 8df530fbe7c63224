"""Bad input through the command line: the right exit code, one sentence that says what to do, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typed import MEND, USAGE, refused, state

from pnlac_fast import loading


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study"], "needs --model, --data and --probe"),
        (["study", "--data", "data"], "needs --model, --data and --probe"),
        (["study", "--data", "data", "--probe", "data", "--seeds", "1,1"], "each seed once"),
        (["study", "--data", "data", "--probe", "data", "--plan", "no.toml"], "no plan of a study"),
        (["study", "--data", "data", "--probe", "data", "--text", "no.txt"], "no file 'no.txt'"),
        (["sweep", "--data", "data", "--probe", "data", "--plan", "no.toml", "--out", "o"], "no.toml"),
        (["cache", "--tuned", "T", "--data", "data", "--out", "o", "--site", "mid"], "no site 'mid'"),
        (
            ["cache", "--tuned", "T", "--data", "data", "--out", "o", "--raw-dtype", "int8", "--raw", "full"],
            "raw dtype",
        ),
        (["cache", "--tuned", "T", "--data", "data", "--out", "o", "--worker", "2/2"], "no worker"),
        (["patch", "--tuned", "T", "--data", "data", "--neurons", "no.json"], "no neuron file"),
        (["finetune", "--data", "data", "--topic", "race", "--side", "left", "--out", "o", "--epochs", "0"], "nothing"),
        (["finetune", "--data", "data", "--topic", "race", "--side", "left", "--out", "o", "--rival", "x"], "no rival"),
        (["finetune", "--data", "data", "--topic", "race", "--side", "left", "--out", "data"], "'data' exists"),
        (
            ["finetune", "--data", "data", "--topic", "race", "--side", "left", "--out", "o", "--lora-rank", "0"],
            "LoRA of rank 0",
        ),
        (
            ["finetune", "--data", "data", "--topic", "race", "--side", "left", "--out", "o", "--lora-dropout", "1"],
            "a dropout in [0, 1)",
        ),
        (["generate", "--data", "data", "--max-new-tokens", "0"], "--max-new-tokens 1"),
        (
            [
                *("score", "--data", "data", "--tuned", "T", "--scorer", "classifier", "--training-data", "data"),
                *("--max-new-tokens", "0"),
            ],
            "--max-new-tokens 1",
        ),
        (["utility", "--tuned", "T"], "--text, --answers"),
        (["generate", "--data", "data", "--patch", "no.safetensors"], "no.safetensors"),
        (["locate", "no.zarr", "--data", "data", "--tuned", "T", "--score", "attribution"], "no.zarr"),
        (["locate", "run.zarr", "--data", "data", "--tuned", "T"], "need no model"),
    ],
)
def test_no_model_is_loaded_for_what_options_alone_tell(
    cli, world: Path, monkeypatch, arguments: list, said: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.chdir(world)
    refused(cli(*arguments, "--model", "BASE"), MEND, said)
