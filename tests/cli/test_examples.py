"""Every example runs as its header says, on small models."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast.datasets import Question, load_questions, save_questions
from pnlac_fast.generation import answers
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.neurons import load_sets
from pnlac_fast.patches import Patch, apply, load_patched
from pnlac_fast.sweeping import plan_runs

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_example_is_tested_here_and_says_how_to_run_it() -> None:
    here = Path(__file__).read_text()
    for script in sorted(EXAMPLES.glob("*.py")):
        assert f'"{script.name}"' in here
        assert f"python examples/{script.name} " in script.read_text().split('"""')[1]


def test_the_plan_of_a_sweep_is_one() -> None:
    runs = plan_runs(tomllib.loads((EXAMPLES / "plan.toml").read_text()))
    assert len(runs) == 6 * (1 + 3 + 3 + 1 + 9 + 1 + 1 + 1 + 1)
    assert {run.options["topic"] for run in runs} == {"race", "science"}


def test_quickstart(world: Path, questions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = [Question(q.topic, f"law {q.instruction}", q.right, q.left) for q in questions[::2]]
    save_questions(held_out, tmp_path / "probe", "eval")
    main = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]
    given = ["--model", world / "base", "--data", world / "data", "--probe", tmp_path / "probe"]
    page = main([str(a) for a in [*given, "--out", tmp_path / "q", "--steps", 3]])
    printed = capsys.readouterr().out
    assert page == tmp_path / "q" / "report" / "index.html"
    assert "general neurons" in printed
    assert "coupling reduced by" in printed


def test_query(cli, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli("locate", world / "run.zarr", "--top", "40%")
    runpy.run_path(str(EXAMPLES / "query.py"))["main"]([str(world / "run.zarr"), "--neurons", "3"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    rms = xr.open_zarr(world / "run.zarr", group="contrast")["rms"].sel(model="race", tokens="last", site="mlp_mid")
    mean = rms.mean("topic").values
    layer, neuron = np.unravel_index(np.nanargmax(mean), mean.shape)
    first = next(line for line in lines if line.startswith("  layer")).split()
    assert first[:4] == ["layer", str(layer), "neuron", str(neuron)]
    assert float(first[5]) == pytest.approx(mean.max(), rel=1e-3)
    member = load_sets(world / "neurons.json")["race/general"].member
    share = (mean**2)[member].sum() / (mean**2).sum()
    said = next(line for line in lines if "race/general " in line)
    assert f"{share:.1%} of the change in  {member.mean():.1%}" in said


def test_query_of_stance(cli, world: Path, base, tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = shutil.copytree(world / "run.zarr", tmp_path / "run.zarr")
    assert cli("score", *base, *tuned, "--store", store).code == 0
    cli("locate", store)
    runpy.run_path(str(EXAMPLES / "query.py"))["main"]([str(store), "--neurons", "2"])
    printed = capsys.readouterr().out.split("moved furthest from base, in nats\n")[1].splitlines()
    margin = xr.open_zarr(store, group="results/stance").load()
    shift = (margin["margin"][1] - margin["margin"][0]).values
    furthest = np.argsort(-abs(shift))[:2]
    keys = {q.key: q.instruction for q in load_questions(world / "data")}
    assert [line.strip() for line in printed] == [
        f"{shift[i]:+.3f}  {keys[str(margin['key'].values[i])]}" for i in furthest
    ]


def test_query_needs_no_torch() -> None:
    script = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules, 'pnlac_fast' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(EXAMPLES / "query.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


def test_your_trainer(world: Path, questions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.txt").write_text("\n".join(f"{q.instruction} {q.right[0]}" for q in questions))
    main = runpy.run_path(str(EXAMPLES / "your_trainer.py"))["main"]
    given = ["--model", world / "base", "--neurons", world / "neurons.json", "--set", "race/general"]
    given += ["--text", tmp_path / "train.txt", "--out", tmp_path / "tuned", "--steps", 3]
    inhibit = main([str(a) for a in given])
    assert inhibit.steps == 3
    assert "3 steps; still:" in capsys.readouterr().out
    base = load_model(world / "base")
    tuned = load_tuned(base, tmp_path / "tuned")
    for layer, member in enumerate(load_sets(world / "neurons.json")["race/general"].member):
        lora = tuned.projection(layer, "up_proj")
        delta = lora.lora_B[tuned.adapter].weight @ lora.lora_A[tuned.adapter].weight
        assert not delta[torch.from_numpy(member)].any()
        assert delta[torch.from_numpy(~member)].any()


def test_patched_model(cli, world: Path, base, tmp_path: Path) -> None:
    patch = ["patch", *base, "--tuned", f"science={world / 'tuned' / 'science'}", "--neurons", world / "neurons.json"]
    asked = ["--kind", "shift", "--set", "general", "--draws", 1, "--store", world / "run.zarr", "--save", tmp_path]
    assert cli(*patch, *asked, "--direction", "base_into_tuned,tuned_into_base").code == 0
    main = runpy.run_path(str(EXAMPLES / "patched_model.py"))["main"]
    prompt = "what about the law ?"
    for model, direction in ((world / "tuned" / "science", "base_into_tuned"), (world / "base", "tuned_into_base")):
        file = tmp_path / f"science-general-shift-{direction}.safetensors"
        answer = main([str(a) for a in ("--model", model, "--patch", file, "--prompt", prompt, "--max-new-tokens", 9)])
        subject = load_model(model)
        with load_patched(subject, file):
            assert answers(subject, [Question("law", prompt)], max_new_tokens=9) == [answer.strip()]


@pytest.mark.parametrize(
    ("script", "package"),
    [("nnsight_neurons.py", "nnsight"), ("transformer_lens_neurons.py", "transformer_lens")],
)
def test_recipes_of_other_packages_shift_neurons_as_we_do(script: str, package: str, world: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[bench]'")
    prompt, name = "what about the law ?", "race/general"
    given = {"--model": world / "base", "--neurons": world / "neurons.json", "--set": name, "--prompt": prompt}
    words = [str(word) for pair in (given | {"--store": world / "run.zarr"}).items() for word in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another package, about itself
        before, after = runpy.run_path(str(EXAMPLES / script))["main"](words)
    neurons = load_sets(world / "neurons.json")[name]
    contrast = xr.open_zarr(world / "run.zarr", group="contrast").sel(model="race", site="mlp_mid")
    shift = np.where(neurons.member, contrast["mean_diff"].isel(tokens=0).mean("topic").values, 0)
    model = load_model(world / "base")
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with torch.no_grad(), model.active() as hf:
        assert torch.allclose(before, hf(input_ids=ids).logits[0, -1], atol=1e-4)
        with apply(model, Patch(neurons, 1.0, shift.astype(np.float32))):
            ours = hf(input_ids=ids).logits[0, -1]
    assert torch.allclose(after, ours, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
