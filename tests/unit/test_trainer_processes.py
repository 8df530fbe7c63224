"""The callbacks under accelerate launch with two processes, and under torch.compile: what one plain process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from unit import trainer_rank as one

from pnlac_fast.anchoring import Anchor
from pnlac_fast.errors import UserError

# Half a minute of a C++ compiler: where CI is set, and in `make faults`.
LONG = {"CI", "PNLAC_LONG_TESTS"} & {name for name, value in os.environ.items() if value}
INDUCTOR = LONG and (shutil.which("g++") or shutil.which("clang++"))
GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    out = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    # By this name accelerate starts several processes of one machine; the script says that they have no GPU.
    launch += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, one.__file__, str(out)], capture_output=True, text=True, env=environ, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def check_what_moved(after: dict[str, Any], mode: str, method: str) -> None:
    """Rows and columns that must not move have the bits of the base; a control neuron has moved."""
    before = one.weights(one.decoder())
    own = torch.from_numpy(one.chosen().member[0])
    still = own if mode == "freeze" else ~own
    for name, dim in ((GATE, 1), (DOWN, 0)):
        moved = (after[name] != before[name]).any(dim)
        assert not moved[still].any()
        assert moved[~still].all()
    head = torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert head == (mode == "specific" or method == "lora")


@pytest.mark.parametrize(("mode", "method"), one.WAYS)
def test_two_processes_do_what_one_does(mode: str, method: str, launched: Path, tmp_path: Path) -> None:
    """With accumulation, clipping and decay, every callback at once, and a resume in between."""
    ranks = [torch.load(launched / f"{mode}-{method}-{rank}.pt") for rank in range(2)]
    wanted, log = one.train(mode, method, tmp_path, gradient_accumulation_steps=2 * one.PARTS)
    for rank in ranks:
        check_what_moved(rank["after"], mode, method)
        for name, value in wanted.items():
            torch.testing.assert_close(rank["after"][name], value, atol=1e-5, rtol=1e-4)
            assert torch.equal(rank["after"][name], ranks[0]["after"][name]), name
            assert torch.equal(rank["again"][name], rank["after"][name]), name
        for entry, expected in zip(rank["log"][: one.STEPS], log, strict=False):
            assert {name: entry[name] for name in ("loss", "anchor", "kl")} == pytest.approx(
                {name: expected[name] for name in ("loss", "anchor", "kl")}, rel=1e-4, abs=1e-6
            )


def test_what_several_processes_cannot_do_is_refused(launched: Path) -> None:
    for rank in range(2):
        said = json.loads((launched / f"said-{rank}.json").read_text())
        assert "make a new Trainer" in said["twice"]
        assert "sharded over processes" in said["sharded"]


def test_several_devices_of_one_process_are_refused(tmp_path: Path) -> None:
    made = one.trainer(one.decoder(), [Anchor(one.chosen())], tmp_path)
    made.args._n_gpu = 2
    with pytest.raises(UserError, match="accelerate launch"):
        made.callback_handler.callbacks[-1].on_train_begin(
            made.args, made.state, made.control, model=made.model, train_dataloader=made.get_train_dataloader()
        )


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Trainer hands torch.compile on in the environment and in accelerate's state, both of the whole process."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    torch.compiler.reset()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.filterwarnings("ignore")  # the compiler trips over warnings of its own
@pytest.mark.parametrize(
    ("mode", "terms", "backend"),
    [
        pytest.param("freeze", ("anchor",), "inductor", marks=pytest.mark.skipif(not INDUCTOR, reason="takes long")),
        ("specific", ("anchor", "kl"), "eager"),
    ],
)
def test_compiled_models_train_the_same(
    mode: str, terms: tuple[str, ...], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters.clear()
    if backend == "inductor":  # anew, but in seconds: one layer, no vectors, no trial of them
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
        monkeypatch.setattr(one, "LAYERS", 1)
        monkeypatch.setattr(inductor, "compile_threads", 1)
        monkeypatch.setattr(inductor.cpp, "vec_isa_ok", True)
        monkeypatch.setattr(inductor.cpp, "simdlen", 1)
    common: dict[str, Any] = {"max_steps": 2, "callbacks": 1 + len(terms) + (mode == "specific")}
    options = {"torch_compile": True, "torch_compile_backend": backend}
    two, log = one.train(mode, "full", tmp_path / "compiled", **common, **options)
    plain, expected = one.train(mode, "full", tmp_path / "plain", **common)
    assert counters["frames"]["ok"]
    assert bool(counters["inductor"]) == (backend == "inductor")
    check_what_moved(two, mode, "full")
    for name, value in plain.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
    for term in ("loss", *terms):
        assert log[1][term] == pytest.approx(expected[1][term], rel=1e-4)
        assert log[1][term] > 0
