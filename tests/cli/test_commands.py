"""What commands share, as it is typed: data options, settings and where they come from, reports and the demo."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typed import done, table

from pnlac_fast import store as stores
from pnlac_fast.datasets import load_questions


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
