"""Units are cut, committed and resumed so that an interruption, a damaged commit or another setting loses nothing."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pnlac_fast import store as stores
from pnlac_fast.caching import cache, plan
from pnlac_fast.datasets import Question
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.prompts import encode

TEMPLATE = "Q : {instruction} A :"


def test_an_interrupted_run_resumes_to_the_same_bits(model_paths, questions, tmp_path: Path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    options = {"tokens": ("last", "prompt"), "unit_tokens": 30}
    result = cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, whole, **options)
    assert result["units"] > 4
    real, calls = stores.Writer.commit, []

    def interrupted(self, unit, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(unit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, unit, *args, **kwargs)

    monkeypatch.setattr(stores.Writer, "commit", interrupted)
    with pytest.raises(Interrupted, match="same command again"):
        cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, broken, **options)
    assert stores.info(broken)["complete"] is False
    cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, broken, **options)
    assert len(calls) == result["units"] + 1  # the two units that were done are not done again
    a, b = stores.open_contrast(whole), stores.open_contrast(broken)
    for name in a.data_vars:
        assert np.array_equal(a[name].values, b[name].values, equal_nan=a[name].dtype.kind == "f")


def test_a_signal_during_a_commit_waits_for_its_end(model_paths, questions, tmp_path: Path, monkeypatch) -> None:
    out, real = tmp_path / "s.zarr", stores.Writer.commit

    def interrupted(self, unit, *args, **kwargs):  # type: ignore[no-untyped-def]
        signal.raise_signal(signal.SIGINT)
        return real(self, unit, *args, **kwargs)

    monkeypatch.setattr(stores.Writer, "commit", interrupted)
    with pytest.raises(Interrupted):
        cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, out, unit_tokens=30)
    assert stores.info(out)["units_done"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_resumed_run_keeps_its_pass_whatever_memory_is_free(model_paths, questions, tmp_path, monkeypatch) -> None:
    out, arguments = tmp_path / "s.zarr", (model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions)
    cache(*arguments, out)
    before = stores.info(out)["settings"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 19))
    cache(*arguments, out)
    assert stores.info(out)["settings"] == before
    cache(*arguments, tmp_path / "t.zarr")
    small = stores.info(tmp_path / "t.zarr")["settings"]["batch_tokens"]
    assert 64 <= small < before["batch_tokens"] <= 2048
    assert np.log2(small) % 1 == 0


@pytest.mark.parametrize("without", [(), ("overlap",)])
def test_a_commit_that_fails_in_the_background_is_reported(
    model_paths, questions, tmp_path, monkeypatch, without
) -> None:
    out, real, calls = tmp_path / "s.zarr", stores.Writer.commit, []

    def full(self, unit, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(unit)
        if len(calls) == 2:
            raise stores.StoreError("the disk is full")
        return real(self, unit, *args, **kwargs)

    arguments = (model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, out)
    monkeypatch.setattr(stores.Writer, "commit", full)
    with pytest.raises(stores.StoreError, match="the disk is full"):
        cache(*arguments, unit_tokens=30, without=without)
    assert stores.info(out)["units_done"] == 1
    assert len(calls) == 2
    cache(*arguments, unit_tokens=30, without=without)
    assert stores.info(out)["complete"]


def test_units_cover_every_question_once(llama: Model, questions) -> None:
    texts = encode(llama.tokenizer, questions[:7], side="both")
    units = list(plan("race", texts, 40, "full"))
    assert [u.first for u in units] == list(np.cumsum([0, *(u.count for u in units)])[:-1])
    assert sum(u.count for u in units) == 7
    assert all(u.count >= 1 for u in units)
    assert sum(u.rows for u in units) == sum(len(t.ids) - t.repeated for t in texts)


def test_other_settings_are_refused_and_nothing_is_lost(model_paths, questions, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, out)
    before = stores.open_contrast(out).load()
    with pytest.raises(stores.StoreError, match="template"):
        cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, out, template=TEMPLATE)
    assert stores.open_contrast(out).load().identical(before)
    cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, out, template=TEMPLATE, overwrite=True)
    assert not stores.open_contrast(out).load().equals(before)


def test_a_tuned_model_may_move(model_paths, adapter_paths, questions, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    cache(model_paths["llama"], {"race": adapter_paths["race"]}, questions, out)
    shutil.copytree(adapter_paths["race"], tmp_path / "race")
    cache(model_paths["llama"], {"race": tmp_path / "race"}, questions, out)
    config = tmp_path / "race/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(stores.StoreError, match="tuned"):
        cache(model_paths["llama"], {"race": tmp_path / "race"}, questions, out)


def test_dry_run_writes_nothing(model_paths, questions, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    result = cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, out, dry_run=True)
    assert not out.exists()
    assert result["questions"] == len(questions)
    assert result["tokens"] == sum(len(q.instruction.split()) + 1 for q in questions)
    fronts = {
        (q.topic, *words[:n]) for q in questions for words in [q.instruction.split()] for n in range(len(words) + 1)
    }
    assert result["computed"] == len(fronts) < result["tokens"]


def test_not_finite_activations_name_model_site_and_layer(model_paths, questions, tmp_path: Path) -> None:
    base = load_model(model_paths["llama"])
    tuned = load_tuned(base, model_paths["llama_tuned"], name="broken")
    with torch.no_grad():
        tuned.blocks[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(UserError, match="'broken' at mlp_mid, layer 1,"):
        cache(base, {"broken": tuned}, questions, tmp_path / "s.zarr")
    with pytest.raises(UserError, match="the base model at mlp_mid, layer 1,"):
        cache(tuned, {"fine": base}, questions, tmp_path / "t.zarr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ("mlp_mit",)}, "Did you mean 'mlp_mid'"),
        ({"tokens": ("first",)}, "no token selector 'first'"),
        ({"tokens": ()}, "at least one"),
        ({"tokens": ("last", "last")}, "once"),
        ({"raw": "some"}, "no raw mode"),
        ({"engine": "cuda9"}, "no engine"),
        ({"without": ("packs",)}, "Did you mean 'pack'"),
        ({"batch_tokens": 0}, "--batch-tokens 1"),
    ],
)
def test_bad_options_are_refused(model_paths, questions, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, questions, tmp_path / "s.zarr", **options)


def test_completions_are_needed_where_they_count(model_paths, questions, tmp_path: Path) -> None:
    bare = [Question(q.topic, q.instruction) for q in questions]
    with pytest.raises(UserError, match="--tokens last or prompt"):
        cache(
            model_paths["llama"], {"t": model_paths["llama_tuned"]}, bare, tmp_path / "s.zarr", tokens=("completion",)
        )
    cache(model_paths["llama"], {"t": model_paths["llama_tuned"]}, bare, tmp_path / "s.zarr")
    with pytest.raises(UserError, match="at least one --tuned"):
        cache(model_paths["llama"], {}, bare, tmp_path / "t.zarr")
