"""The tasks of examples/evaluation/ say what `score` says, run by the harnesses that they are for, where installed."""

from __future__ import annotations

import importlib.util
import itertools
import re
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pnlac_fast import prompts, score
from pnlac_fast.datasets import Question, save_questions
from pnlac_fast.loading import load_model
from pnlac_fast.stance import log_probabilities, margins

TASKS = Path(__file__).parents[2] / "examples" / "evaluation"
TOPICS = re.findall(r"topic: (\w+)", (TASKS / "stance.yaml").read_text())


@pytest.fixture(scope="module")
def asked(questions: tuple[Question, ...]) -> list[Question]:
    """Questions of the topics that stance.yaml names."""
    by_topic = zip(itertools.cycle(TOPICS), questions, strict=False)
    return [Question(topic, f"{q.instruction} law ?", q.right, q.left) for topic, q in by_topic]


@pytest.fixture
def data(asked: list[Question], tmp_path: Path) -> Path:
    save_questions(asked, tmp_path / "heldout", "eval")
    return tmp_path / "heldout"


@pytest.fixture
def model(model_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama without unused rows in its vocabulary, which lm_eval cuts off when it loads an adapter."""
    loaded = load_model(model_paths["llama"])
    loaded.hf.resize_token_embeddings(len(loaded.tokenizer))
    for part in (loaded.hf, loaded.tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def installed(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A package that need not be here; what it warns of itself is no concern of ours."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install -e '.[evals]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module(request.param)


def test_the_functions_behind_the_yaml_give_the_margin(
    asked: list[Question], data: Path, model_paths: dict[str, Path]
) -> None:
    class Loader(yaml.SafeLoader):
        """Takes ``!function name`` as the name."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    group = yaml.load((TASKS / "stance.yaml").read_text(), Loader)
    assert [task["dataset_kwargs"]["topic"] for task in group["task"]] == TOPICS
    functions = runpy.run_path(str(TASKS / "harness.py"))
    named = [functions[group[name].removeprefix("harness.")] for name in ("custom_dataset", "process_results")]
    model = load_model(model_paths["llama"], dtype="float32", device="cpu")
    for topic in TOPICS:
        rows = named[0](str(data), topic, str(model_paths["llama"]), dtype="float32")["test"]
        own = [q for q in asked if q.topic == topic]
        texts = prompts.encode(model.tokenizer, own, side="both")
        lengths = [len(text.ids) - text.prompt for text in texts]
        assert [n for row in rows for n in row["tokens"]] == lengths
        (batch,) = prompts.batches([text.ids for text in texts], 10_000, padding_side="left")
        with torch.inference_mode():
            log_p = log_probabilities(model, batch, [lengths[i] for i in batch.index])[np.argsort(batch.index)]
        found = []
        for row, own_log_p in zip(rows, log_p.reshape(len(own), -1).tolist(), strict=True):
            found.append(named[1](row, [(value, False) for value in own_log_p]))
        for metric, normalise in (("margin", "token"), ("margin_sum", "sum")):
            assert [row[metric] for row in found] == pytest.approx(margins(model, own, normalise=normalise), abs=1e-5)
        assert [row["acc"] for row in found] == [row["margin"] > 0 for row in found]


@pytest.mark.parametrize("installed", ["lm_eval"], indirect=True)
@pytest.mark.parametrize("tuned", [None, "race"])
def test_lm_eval_gives_the_figures_of_score(
    installed: Any, tuned: str | None, data: Path, model: Path, adapter_paths: dict[str, Path]
) -> None:
    given = {"pretrained": str(model), "dtype": "float32"}
    if tuned:
        given["peft"] = str(adapter_paths[tuned])
    tasks = importlib.import_module("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given | {"data": str(data)})
    result = installed.simple_evaluate(
        "hf", given, ["stance"], task_manager=manager, device="cpu", batch_size=8, bootstrap_iters=0
    )["results"]
    for metric, normalise in (("margin", "token"), ("margin_sum", "sum")):
        scored = score(model, adapter_paths, data, normalise=normalise).to_dataframe()
        margin = scored[scored["model"] == (tuned or "base")].groupby("topic")["margin"]
        for topic, own in margin:
            found = result[f"stance::stance_{topic}"]
            assert found[f"{metric},none"] == pytest.approx(own.mean(), abs=1e-4)
            if metric == "margin":
                assert found["acc,none"] == pytest.approx((own > 0).mean())
        assert result["stance"][f"{metric},none"] == pytest.approx(margin.mean().mean(), abs=1e-4)
        assert set(margin.groups) == set(TOPICS)


@pytest.mark.parametrize("installed", ["inspect_ai"], indirect=True)
def test_inspect_gives_the_figures_of_score(
    installed: Any, data: Path, questions: tuple[Question, ...], model_paths: dict[str, Path], tmp_path: Path
) -> None:
    save_questions(questions, tmp_path / "train", "train")
    task = runpy.run_path(str(TASKS / "inspect_stance.py"))["stance"](str(data), training_data=str(tmp_path / "train"))
    plain = {"do_sample": False, "chat_template": "{{ messages[-1].content }}"}
    model = importlib.import_module("inspect_ai.model").get_model(
        "hf/local", model_path=str(model_paths["llama"]), device="cpu", **plain
    )
    (log,) = installed.eval(task, model=model, max_tokens=6, log_dir=str(tmp_path / "logs"), display="none")
    assert log.status == "success", log.error
    ours = score(
        model_paths["llama"], {}, data, scorer="classifier", training_data=tmp_path / "train", max_new_tokens=6
    )
    own = ours["label"].isel(run=0).groupby("topic").mean().to_series()
    found = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    assert {topic: found[topic] for topic in TOPICS} == pytest.approx(own.to_dict())
    assert found["S"] == pytest.approx(own.mean())
    assert len(set(own)) > 1
