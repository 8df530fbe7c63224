"""Sweeps: every combination once, what is there is not done again, and methods are compared at the end."""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast import processes, sweeping
from pnlac_fast.comparison import compare
from pnlac_fast.datasets import Question
from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, save_sets
from pnlac_fast.reporting.rows import COST
from pnlac_fast.sweeping import plan_runs, sweep

COMMON: dict[str, Any] = {"side": "right", "method": "full", "steps": 2, "learning_rate": 3e-3, "batch_size": 4}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base(model_paths: dict[str, Path]) -> Model:
    return load_model(model_paths["llama"], dtype="float32", device="cpu")


@pytest.fixture
def neurons(tmp_path: Path) -> Path:
    member = np.zeros((3, 48), bool)
    member[0, :3] = member[2, 5:7] = True
    sets = [NeuronSet("race/general", "general", member, model="race")]
    sets += [NeuronSet("race/specific/race", "specific", np.roll(member, 9, 1), model="race", topic="race")]
    save_sets(sets, tmp_path / "neurons.json")
    return tmp_path / "neurons.json"


@pytest.fixture
def probe(questions: tuple[Question, ...]) -> list[Question]:
    return [Question(q.topic, f"law {q.instruction}", q.right, q.left) for q in questions[::3]]


def test_a_plan_is_every_combination_of_its_lists() -> None:
    plan = {
        **COMMON,
        "topic": ["race", "science"],
        "seed": 0,
        "plain": {},
        "anchor": {"inhibit": "n.json", "inhibit_mode": "anchor", "anchor_weight": [0.3, 3], "control": [False, 0]},
        "kl": {"inhibit_mode": "kl", "other_topics": ["economy", "crime"]},
    }
    runs = plan_runs(plan)
    assert len(runs) == 2 + 2 * 2 * 2 + 2
    assert [run.name for run in runs[:3]] == [
        "plain/topic=race",
        "plain/topic=science",
        "anchor/topic=race,anchor_weight=0.3,control=none",
    ]
    assert "control" not in runs[2].options
    assert runs[3].options["control"] == 0
    assert runs[3].varied == {"anchor_weight": 0.3}
    assert runs[-1].options["other_topics"] == ["economy", "crime"]
    assert all(run.options["steps"] == 2 for run in runs)
    assert plan_runs({"topic": "race", "side": "left", "plain": {}})[0].name == "plain/only"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({**COMMON, "topic": "race"}, "no methods"),
        ({**COMMON, "plain": {}}, "has no topic"),
        ({"topic": "race", "plain": {}}, "has no side"),
        ({**COMMON, "topic": "race", "plain": {"step": 3}}, "Did you mean 'steps'"),
        ({**COMMON, "topic": "race", "plain": {"out": "x"}}, "no option"),
        ({**COMMON, "topic": [], "plain": {}}, "plans nothing"),
        ({**COMMON, "topic": "race", "plain": {"seed": [1, 1]}}, "more than once"),
    ],
)
def test_a_plan_of_nothing_or_of_unknown_options_is_refused(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_runs(plan)


def plan_of(neurons: Path, **changes: Any) -> dict[str, Any]:
    freeze = {"inhibit": str(neurons), "inhibit_mode": "freeze", "control": [False, 4]}
    return {**COMMON, "topic": "race", "points": 2, "plain": {}, "freeze": freeze, **changes}


def test_what_is_there_is_not_done_again(
    base: Model, questions: Any, probe: Any, neurons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, real = [], sweeping.finetune

    def counted(*args: Any, **options: Any) -> Any:
        done.append("/".join(options["out"].parts[-2:]))
        if len(done) == 3:
            raise Interrupted("stopped")
        return real(*args, **options)

    monkeypatch.setattr(sweeping, "finetune", counted)
    out, plan = tmp_path / "sweep", plan_of(neurons)
    with pytest.raises(Interrupted):
        sweep(base, questions, out, plan, probe=probe, progress=False)
    assert done == ["plain/only", "freeze/control=none", "freeze/control=4"]
    found = sweep(base, questions, out, plan, probe=probe, progress=False)
    assert done[3:] == ["freeze/control=4"]
    assert found["method"].values.tolist() == ["plain", "freeze", "freeze_random"]
    assert found["draw"].values.tolist() == [-1, -1, 4]
    assert found.identical(sweep(base, questions, out, plan, probe=probe, progress=False))
    wider = plan_of(neurons, seed=[0, 1])
    again = sweep(base, questions, tmp_path / "wider", wider, probe=probe, progress=False)
    assert len(done) == 10
    same = again.isel(run=[i for i, s in enumerate(again["seed"].values) if s == 0])
    assert np.array_equal(same["margin"].values, found["margin"].values)


def test_one_that_is_stopped_before_its_first_record_goes_on(
    base: Model, questions: Any, probe: Any, neurons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        raise KeyboardInterrupt  # the run is there, and the sweep knows nothing of it

    real = sweeping.finetune
    monkeypatch.setattr(sweeping, "finetune", stopped)
    plan = {**COMMON, "topic": "race", "points": 2, "plain": {}}
    with pytest.raises(KeyboardInterrupt):
        sweep(base, questions, tmp_path / "sweep", plan, probe=probe, progress=False)
    assert (tmp_path / "sweep" / "plain" / "only").is_dir()
    monkeypatch.setattr(sweeping, "finetune", real)
    found = sweep(base, questions, tmp_path / "sweep", plan, probe=probe, progress=False)
    assert found["method"].values.tolist() == ["plain"]


def test_other_settings_are_refused_or_done_again(
    base: Model, questions: Any, probe: Any, neurons: Path, tmp_path: Path
) -> None:
    out, plan = tmp_path / "sweep", plan_of(neurons)
    first = sweep(base, questions, out, plan, probe=probe, progress=False)
    with pytest.raises(UserError, match="made with another steps"):
        sweep(base, questions, out, plan_of(neurons, steps=3), probe=probe)
    with pytest.raises(UserError, match="made with another origin"):
        sweep(base, questions[:-1], out, plan, probe=probe)
    moved = NeuronSet("race/general", "general", np.roll(np.eye(3, 48, dtype=bool), 30, 1), model="race")
    save_sets([moved], neurons)
    with pytest.raises(UserError, match="freeze/control=none' was made with another neurons"):
        sweep(base, questions, out, plan, probe=probe)
    second = sweep(base, questions, out, plan, probe=probe, overwrite=True, progress=False)
    assert np.array_equal(second["margin"].values[0], first["margin"].values[0])
    assert not np.array_equal(second["margin"].values[1], first["margin"].values[1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(UserError, match="holds no sweep"):
        sweep(base, questions, tmp_path / "other", plan, probe=probe)
    with pytest.raises(UserError, match="do nothing"):
        sweep(base, questions, tmp_path / "new", plan, probe=probe, jobs=0)
    bare = plan_of(neurons, freeze={"control": 3})
    with pytest.raises(UserError, match="but no neurons"):
        sweep(base, questions, tmp_path / "bare", bare, probe=probe, progress=False)


def test_what_varies_is_part_of_the_name_and_methods_are_compared(
    base: Model, questions: Any, probe: Any, neurons: Path, tmp_path: Path
) -> None:
    anchor = {"inhibit": str(neurons), "inhibit_mode": "anchor", "anchor_weight": [1, 3], "steps": [2, 3]}
    kl = {"inhibit_mode": "kl", "other_topics": ["science"], "other_texts": "prompts"}
    plan = {**COMMON, "topic": "race", "points": 2, "plain": {}, "hold": anchor, "kl": kl}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    found = sweep(base, questions, tmp_path / "sweep", file, probe=probe, progress=False)
    assert found["method"].values.tolist() == [
        "plain",
        *(f"hold@steps={steps},anchor_weight={weight}" for steps in (2, 3) for weight in (1, 3)),
        "kl",
    ]
    rows = compare(found, boots=20)
    assert {row.method for row in rows} == set(found["method"].values.tolist())
    lines = (tmp_path / "sweep" / "comparison.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    equal = {row.method: row for row in rows if row.comparison == "equal steps"}
    assert equal["plain"].reduction.value == 0
    assert coupling_of(found, "kl", "economy") == pytest.approx(equal["kl"].coupling.value)  # science was seen
    with pytest.raises(UserError, match="no plain fine-tune"):
        compare(found.isel(run=[1, 2]))


def coupling_of(found: xr.Dataset, method: str, topic: str) -> float:
    run = found.isel(run=found["method"].values.tolist().index(method))
    last = int(run["step"].values.argmax())
    moved = (run["margin"][last] - run["margin"][0]).values[run["topic"].values == topic]
    return abs(float(moved.mean()))


class InProcess:
    """What a pool of processes does, without their start, which takes longer than all of these tests."""

    def __init__(self, jobs: int, *, initializer: Any, initargs: Any, **_: Any) -> None:
        initializer(*pickle.loads(pickle.dumps(initargs)))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, function: Any, run: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(pickle.loads(pickle.dumps(function(run))))
        return done


def test_processes_give_the_same(
    base: Model, questions: Any, probe: Any, neurons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweeping, "_worker", [])
    one, two = (sweep(base, questions, tmp_path / str(j), plan_of(neurons), probe=probe, jobs=j) for j in (1, 2))
    assert sweeping._worker[0] is not base
    timed = [*COST]  # what a run took differs from run to run
    assert one.drop_vars(timed).identical(two.drop_vars(timed))


def test_a_plan_that_is_none_is_a_sentence(base: Model, questions: Any, probe: Any, tmp_path: Path) -> None:
    for name, text in (("a.toml", "plain = {"), ("a.json", "[1]"), ("b.toml", None)):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"table for each method|not tables"):
            sweep(base, questions, tmp_path / "sweep", tmp_path / name, probe=probe)
