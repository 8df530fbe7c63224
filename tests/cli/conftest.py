"""The command line in process, and a folder with models, data, a store and neurons made by typing commands."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pnlac_fast.cli import main
from pnlac_fast.datasets import save_questions


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The whole of stdout, which must be one JSON value."""
        return json.loads(self.out)


Cli = Callable[..., Result]


def run(*arguments: object) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        code = main([str(a) for a in arguments])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("info", path)`` types ``pnlac-fast info path``."""
    return run


@pytest.fixture(scope="session")
def world(model_paths: dict[str, Path], questions: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``, ``tuned/race`` (adapter), ``tuned/science`` (checkpoint), ``run.zarr`` and ``neurons.json``."""
    root = tmp_path_factory.mktemp("world")
    save_questions(questions, root / "data", "eval")
    (root / "base").symlink_to(model_paths["llama"])
    common = ["--model", root / "base", "--data", root / "data"]
    tuned = ["--tuned", root / "tuned" / "race", "--tuned", f"science={root / 'tuned' / 'science'}"]
    small = ["--side", "right", "--steps", 4, "--batch-size", 4, "--warmup-steps", 0]
    for command in (
        ["finetune", *common, "--topic", "race", "--out", root / "tuned" / "race", "--learning-rate", 1e-2, *small],
        [
            *("finetune", *common, "--topic", "science", "--out", root / "tuned" / "science", "--learning-rate", 1e-3),
            *("--method", "full", *small),
        ],
        ["cache", *common, *tuned, "--out", root / "run.zarr", "--tokens", "last,prompt"],
        ["locate", root / "run.zarr", "--top", "40%", "-o", root / "neurons.json"],
    ):
        result = run(*command)
        assert (result.code, result.err) == (0, ""), result
    return root


@pytest.fixture
def base(world: Path) -> list[str]:
    """``--model`` and ``--data`` of the world."""
    return ["--model", str(world / "base"), "--data", str(world / "data")]


@pytest.fixture
def tuned(world: Path) -> list[str]:
    """``--tuned`` of both tuned models."""
    return ["--tuned", str(world / "tuned" / "race"), "--tuned", f"science={world / 'tuned' / 'science'}"]


@pytest.fixture
def cache(base: list[str], tuned: list[str], tmp_path: Path) -> list[Any]:
    """A ``cache`` command that writes ``s.zarr``."""
    return ["cache", *base, *tuned, "--out", tmp_path / "s.zarr"]
