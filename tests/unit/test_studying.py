"""The whole study: every stage once, gone on with where it stopped, and what its plan may say."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from pnlac_fast import store as stores
from pnlac_fast import studying, sweeping
from pnlac_fast.datasets import Question
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model
from pnlac_fast.neurons import jaccard, load_sets
from pnlac_fast.study_plan import EMBEDDED, embedded_plan, read_plan
from pnlac_fast.study_subject import Subject
from pnlac_fast.study_subject import testbed_plan as plan_of_size
from pnlac_fast.studying import study

PLAN: dict[str, Any] = {
    "side": "right",
    "opposite": 1,
    "after": 1,
    "finetune": {"method": "full", "steps": 2, "learning_rate": 3e-3, "batch_size": 4, "points": 2},
    "cache": {"sites": ["mlp_mid", "resid"], "unit_tokens": 16},
    "neurons": {"general": {"top": 0.4, "evidence": True, "draws": 2}, "few": {"top": 0.1}},
    "patch": {"draws": 1, "sets": ["general", "random"]},
    "curve": {"shares": [0.05], "draws": 1},
    "score": {"scorer": ["logprob", "classifier"], "max_new_tokens": 2},
    "methods": {
        "plain": {},
        "specific": {"inhibit": "few", "inhibit_mode": "specific", "control": [False, 0]},
        "kl": {"inhibit_mode": "kl", "hold_out": 1, "other_max_new_tokens": 2},
        "steer": {"rival": "steer", "topic": ["race"]},
    },
}


@pytest.fixture
def base(model_paths: dict[str, Path]) -> Model:
    return load_model(model_paths["llama"], dtype="float32", device="cpu", name="tiny")


@pytest.fixture
def probe(questions: tuple[Question, ...]) -> list[Question]:
    return [Question(q.topic, f"law {q.instruction}", q.right, q.left) for q in questions[::3]]


def test_a_study_is_done_once_and_grows(
    base: Model,
    model_paths: dict[str, Path],
    questions: Any,
    probe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, done = tmp_path / "study", []
    (tmp_path / "text.txt").write_text("law tax border race state\nschool gene vote tax law\n")
    given: dict[str, Any] = {"probe": probe, "seeds": [3, 4], "jobs": 1, "progress": False}
    given["text"] = tmp_path / "text.txt"
    real = sweeping.finetune

    def counted(*args: Any, **options: Any) -> Any:
        done.append("/".join(options["out"].parts[-3:]))
        if len(done) == 7:
            raise Interrupted("stopped")
        return real(*args, **options)

    pages, draw = [], studying.report

    def drawn(store: Path, folder: Path, **options: Any) -> Path:
        pages.append(folder.name)
        if store.name == "study.zarr" and len(pages) < 6:  # one is enough: each takes seconds
            return draw(store, folder, **options)
        assert stores.list_results(store)
        return folder / "index.html"

    monkeypatch.setattr(studying, "report", drawn)
    monkeypatch.setattr(sweeping, "finetune", counted)
    with pytest.raises(Interrupted):
        study(base, questions, out, plan=PLAN, **given)
    found = study(base, questions, out, plan=PLAN, **given)
    a_seed = 3 + 3 * 2 + 3 + 1 + 1  # plain, specific with its control, kl, steer on one topic, plain to the left
    assert len(done) == 2 * a_seed + 1  # the one that was stopped is done again
    assert done[6] == done[7]

    assert {row["method"] for row in found["methods"]} == {"plain", "specific", "specific_random", "kl", "steer"}
    training = stores.open_result(out / "study.zarr", "training")
    assert sorted(set(training["seed"].values.tolist())) == [3, 4]
    assert training.sizes["run"] == 2 * (a_seed - 1)  # the model tuned to the left is no method
    pairs = stores.open_result(out / "study.zarr", "seed_overlap")
    assert sorted(zip(pairs["tuned_topic"].values, pairs["kind"].values, strict=True)) == sorted(
        itertools.product(dict.fromkeys(q.topic for q in questions), ("general", "specific", "top"))
    )
    for name, member in (("general", "general"), ("top", "top/race")):
        a, b = (load_sets(out / f"seed-{s}" / "neurons" / "general.json")[f"race/{member}"].member for s in (3, 4))
        own = pairs.isel(pair=((pairs["kind"] == name) & (pairs["tuned_topic"] == "race")).values)
        assert own["overlap"].sel(figure="jaccard").item() == jaccard(a, b)
    kl = training.isel(run=(training["method"] == "kl").values)
    topics = list(dict.fromkeys(q.topic for q in questions))
    for tuned, seen in zip(kl["tuned_topic"].values, kl["seen_topics"].values, strict=True):
        assert [seen] == [t for t in topics if t not in (tuned, topics[(topics.index(tuned) + 1) % 3])]
    one = out / "seed-3"
    assert {"stance", "stance_classifier", "agreement", "patching", "patching_curve", "evidence", "utility"} < set(
        stores.list_results(one / "store.zarr")
    )
    for name in ("patching", "set_attribution"):
        assert set(stores.open_result(out / "study.zarr", name)["seed"].values) == {3, 4}
    stance = stores.open_result(one / "store.zarr", "stance")
    assert stance["model"].values.tolist() == ["base", *topics, f"{topics[0]} left"]
    assert set(stores.info(one / "after.zarr")["models"]) == {
        f"{method} {topics[0]}" for method in ("plain", "specific", "kl", *(["steer"] if topics[0] == "race" else []))
    }
    patched = stores.open_result(out / "study.zarr", "patching")
    assert {name.rpartition(", ")[2] for name in patched["model"].values} == {"seed 3", "seed 4"}
    assert {row["neurons"] for row in found["patching"]} == {"general", "random"}
    assert Path(found["page"]).is_file()
    assert pages == ["report", "after"] * 2 + ["report"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    with monkeypatch.context() as patched_again:
        for name in ("cache", "locate", "patch", "score", "generate", "utility"):
            patched_again.setattr(studying, name, never)
        assert study(base, questions, out, plan=PLAN, **given)["methods"] == found["methods"]
        moved = load_model(shutil.copytree(model_paths["llama"], tmp_path / "moved"), dtype="float32", device="cpu")
        elsewhere = {**given, "text": shutil.copy(given["text"], tmp_path / "moved")}
        assert study(moved, questions, out, plan=PLAN, **elsewhere)["methods"] == found["methods"]
    assert len(done) == 2 * a_seed + 1
    other = load_model(model_paths["llama_tuned"], dtype="float32", device="cpu")
    with pytest.raises(UserError, match="made with another origin"):
        study(other, questions, out, plan=PLAN, **given)

    rate = {"rival": "rate", "topic": ["race"]}
    more = {**PLAN, "after": 0, "methods": {**PLAN["methods"], "rate": rate}}
    study(base, questions, out, plan=more, **given)
    assert [name.split("/")[1] for name in done[2 * a_seed + 1 :]] == ["rate", "rate"]

    other = {**PLAN, "finetune": {**PLAN["finetune"], "steps": 3}}
    with pytest.raises(UserError, match="made with another steps"):
        study(base, questions, out, plan=other, **given)


def test_a_study_of_adapters_keeps_its_base_free_of_them(
    base: Model, questions: Any, probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studying, "report", lambda store, out, **_: out / "index.html")
    freeze = {"inhibit": "general", "inhibit_mode": "freeze"}
    plan = {
        **{name: PLAN[name] for name in ("side", "opposite", "after", "neurons", "patch", "score")},
        "topics": ["race", "science"],
        "cache": {"unit_tokens": 16},
        "finetune": {"method": "lora", "lora_rank": 2, "steps": 1, "batch_size": 4, "points": 2},
        "methods": {"plain": {}, "freeze": freeze},
    }
    out = tmp_path / "study"
    found = study(base, questions, out, probe=probe, seeds=[0], plan=plan, jobs=1, progress=False)
    assert base.weights.peft is None
    assert {row["method"] for row in found["methods"]} == {"plain", "freeze"}
    stance = stores.open_result(out / "seed-0" / "store.zarr", "stance")
    assert stance["model"].values.tolist() == ["base", "race", "science", "race left"]
    assert set(stores.info(out / "seed-0" / "after.zarr")["models"]) == {"plain race", "freeze race"}


def test_a_study_needs_all_of_a_model_and_its_data(base: Model, questions: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model, --data and --probe"):
        study(base, questions, tmp_path / "s")
    with pytest.raises(UserError, match="each seed once"):
        study(base, questions, tmp_path / "s", probe=questions, seeds=[1, 1])
    two = [question for question in questions if question.topic != "science"]
    with pytest.raises(UserError, match="Of 2 topics, 1 besides 'race' cannot be held out"):
        study("nowhere", two, tmp_path / "s", probe=two)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {}}, "Did you mean 'methods'"),
        ({"side": "middle"}, "no side 'middle'"),
        ({"cache": {"site": ["resid"]}}, "Did you mean 'sites'"),
        ({"cache": {"out": "x"}}, r"option of \[cache\]"),
        ({"neurons": {}}, "locates no neurons"),
        ({"neurons": {"general": {"topp": 0.1}}}, "Did you mean 'top'"),
        ({"methods": {"kl": {}}}, r"\[methods.plain\]"),
        ({"methods": {"plain": {}, "freeze": {"inhibit": "generl"}}}, "Did you mean 'general'"),
        ({"methods": {"plain": {}, "steer": {"rival": "steer"}}, "cache": {"sites": ["mlp_mid"]}}, "resid"),
        ({"methods": {"plain": {}, "inoculate": {"rival": "inoculate"}}}, "needs an instruction"),
    ],
)
def test_a_plan_that_names_what_does_not_exist_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_plan({**PLAN, **changes}, "testbed")


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_plans_hold_and_what_a_plan_lacks_is_theirs(name: str, tmp_path: Path) -> None:
    whole = read_plan({}, name)
    assert "plain" in whole.methods
    file = tmp_path / "plan.toml"
    file.write_text(embedded_plan(name))
    assert read_plan(file, name) == whole
    assert read_plan({"side": "left"}, name).neurons == tomllib.loads(embedded_plan(name))["neurons"]
    file.write_text("side = ")
    with pytest.raises(UserError, match="--show-plan"):
        read_plan(file, name)


def test_rates_of_a_plan_are_brought_to_the_size_of_the_testbed() -> None:
    plan = read_plan({"methods": {"plain": {}, "slow": {"learning_rate": [3e-4, 6e-4], "steps": 9}}}, "testbed")
    large = plan_of_size(plan, "large")
    assert large.finetune["learning_rate"] == pytest.approx(5e-5)
    assert large.methods == {"plain": {}, "slow": {"learning_rate": pytest.approx([5e-5, 1e-4]), "steps": 9}}
    assert plan_of_size(plan, "full") == plan


def test_a_study_computes_as_its_base_was_trained_and_so_do_its_processes(
    base: Model, questions: Any, probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 on a GPU, where the testbed's large base is trained with it; what was set before comes back."""
    before, seen = torch.get_float32_matmul_precision(), []
    monkeypatch.setattr(sweeping, "load_model", lambda *_, **__: seen.append(torch.get_float32_matmul_precision()))

    def one_process(jobs: int, begin: Any, arguments: Any) -> Any:
        torch.set_float32_matmul_precision("highest")  # as a new process begins
        begin(*arguments)
        return contextlib.nullcontext(lambda _, todo: todo)

    monkeypatch.setattr(sweeping, "pool", one_process)
    runs = sweeping.plan_runs({"side": "right", "plain": {"topic": ["race", "science"]}})
    try:
        for tf32, wanted in ((True, "high"), (False, "highest")):
            with Subject(base, 0, questions, tuple(probe), tmp_path, tf32=tf32).computing():
                list(sweeping._run_all(base, questions, probe, "", tmp_path, runs, 2))
            assert seen.pop() == wanted
            assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(before)
