"""Stores as they are typed: what `cache`, `merge` and `info` write, say and mend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from typed import done, table

import pnlac_fast
from pnlac_fast import store as stores


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
