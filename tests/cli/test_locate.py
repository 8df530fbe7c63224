"""Neurons as they are typed: `locate` and `patch` are the library's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typed import done, table

from pnlac_fast import store as stores
from pnlac_fast.datasets import load_questions
from pnlac_fast.generation import answers
from pnlac_fast.loading import load_model
from pnlac_fast.localize import locate
from pnlac_fast.neurons import load_sets
from pnlac_fast.patches import load_patched


def test_locate_equals_the_library_call(cli, world: Path, tmp_path: Path) -> None:
    options = ["--top", "0.3", "--score", "std_rms", "--specific", "paper", "--tokens", "prompt", "--per-layer"]
    shares = ["--general-share", "10%", "--specific-share", "5%", "--hold-out", "1"]
    asked = ["locate", world / "run.zarr", *options, *shares, "-o", tmp_path / "n.json"]
    result = done(cli(*asked, "--json")).json
    found = locate(
        world / "run.zarr",
        top=0.3,
        score="std_rms",
        specific="paper",
        tokens="prompt",
        per_layer=True,
        general_share=0.1,
        specific_share=0.05,
        hold_out=1,
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
    probed = ["--probe", base[base.index("--data") + 1], "--normalise", "sum"]
    result = done(cli(*asked, *tuned, *probed, "--json")).json
    assert stores.open_result(tmp_path / "s.zarr", "set_attribution").attrs["normalise"] == "sum"
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
