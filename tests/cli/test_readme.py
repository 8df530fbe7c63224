"""What the README tells a user to type works as it stands, on a small random model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pnlac_fast.cli import main
from pnlac_fast.datasets import Question, save_questions

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_paths: dict[str, Path], questions: tuple[Question, ...]
) -> Path:
    """A folder with what the README takes for granted: BASE, train and heldout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BASE").symlink_to(model_paths["llama"])
    save_questions(questions[::2], tmp_path / "train", "train")
    save_questions(questions[1::2], tmp_path / "heldout", "eval")
    return tmp_path


def test_the_commands_run_in_their_order(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [b for b in blocks("") if "pnlac-fast finetune" in b]
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) == 9
    for program, *arguments in lines:
        assert program == "pnlac-fast"
        assert main(arguments) == 0, capsys.readouterr().err
    page = (workplace / "report" / "index.html").read_text()
    assert "report --run" not in page  # the section is there, not the line that says how to get it
    methods = {row.split(",")[0] for row in (workplace / "report/tables/methods.csv").read_text().splitlines()[1:]}
    assert methods == {"plain", "specific_30", "specific_random_30"}


def test_the_python_blocks_run_in_their_order(workplace: Path) -> None:
    library, stock = blocks("python")
    scope: dict[str, object] = {}
    exec(library, scope)
    assert len(scope["general"]) > 0  # type: ignore[arg-type]
    exec(stock, scope)


def test_every_file_that_it_names_exists() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"\]\(([^)#:]+)\)", README)) | {
        "examples/plan.toml",
        "examples/your_trainer.py",
        "store/README.md",
        "CONTRIBUTING.md",
    }
    assert len(named) > 3
    assert [name for name in named if not (root / name).exists()] == []
