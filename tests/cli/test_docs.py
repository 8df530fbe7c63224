"""Every code block of the README and the site runs as it stands, in the order of its page.

A block is run: commands of ours in process, on a small random model; Python in one scope a page; TOML, JSON and YAML
are read, and a block with a title is saved as that file for the blocks after it. A block that cannot run here stands
under ``<!-- not run: reason -->``; it must parse all the same, and its commands of ours must have options that exist.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pnlac_fast.cli import commands, main
from pnlac_fast.datasets import Question, save_questions

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
SHELL = ("", "bash")


class Block(NamedTuple):
    """One code block of a page."""

    language: str
    code: str
    title: str | None
    reason: str | None


def included(line: re.Match[str]) -> str:
    """What a page takes from another file; of what only `make docs` makes, nothing."""
    return "" if line[1].startswith("build/") else (ROOT / line[1]).read_text()


def blocks(page: Path) -> list[Block]:
    text = re.sub(r"^--8<-- \"(.+)\"$", included, page.read_text(), flags=re.MULTILINE)
    return [Block(m["language"], m["code"], m["title"], m["reason"]) for m in BLOCK.finditer(text)]


def lines(code: str) -> list[list[str]]:
    """The commands of a shell block, as words."""
    joined = code.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_ours(words: list[str]) -> None:
    """Parse a command of ours without running it; a mistake raises."""
    name, *arguments = words
    commands.commands[name].make_context(name, arguments)


def type_in(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line, or check that it would start what is there."""
    if words[0] == "pnlac-fast":
        assert main(words[1:]) == 0, capsys.readouterr().err
    elif words[0] == "make":
        assert set(words[1:]) <= targets(), words
    elif words[:2] == ["git", "clone"]:
        assert words[-3:] == ["&&", "cd", "pnlac-fast"]
    elif words[0].endswith("pip") or words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(.+)\]", " ".join(words))
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for group in extras for name in group.split(",")} <= set(known), words
    else:
        raise AssertionError(f"the test does not know how to run {words}")


@pytest.fixture
def workplace(tmp_path: Path, world: Path, questions: tuple[Question, ...], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages take for granted: BASE, train, heldout, tuned models, a store and neurons."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BASE").symlink_to((world / "base").resolve())
    save_questions(questions[::2], tmp_path / "train", "train")
    save_questions(questions[1::2], tmp_path / "heldout", "eval")
    return tmp_path


def prepare(page: Path, workplace: Path, world: Path) -> None:
    """Give a page what earlier pages make; README and quickstart make it themselves."""
    if page.name in ("README.md", "quickstart.md"):
        return
    shutil.copytree(world / "tuned", workplace / "tuned")
    shutil.copy(world / "neurons.json", workplace)
    if page.name == "store.md":  # of a store with everything
        given = ["--model", "BASE", "--tuned", "tuned/race", "--data", "heldout"]
        assert main(["cache", *given, "--raw", "full", "--out", "run.zarr"]) == 0
        assert main(["score", *given, "--store", "run.zarr"]) == 0
    else:
        shutil.copytree(world / "run.zarr", workplace / "run.zarr")


def test_the_pages_are_found_and_all_of_them_are_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)
    assert sum(len(blocks(page)) for page in PAGES) > 30


def test_every_command_has_its_help_on_the_page_of_commands() -> None:
    page = (ROOT / "docs/reference/commands.md").read_text()
    shown = re.findall(r"^## (\w+)\n\n```text\n--8<-- \"build/help/\1.txt\"$", page, re.MULTILINE)
    assert shown == list(commands.commands)


@pytest.mark.parametrize("page", [page for page in (README, *PAGES) if blocks(page)], ids=lambda page: page.stem)
def test_every_block_runs(page: Path, workplace: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(page, workplace, world)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason:
            check(block)
        elif block.language in SHELL:
            for words in lines(block.code):
                type_in(words, capsys)
        elif block.language == "python":
            exec(compile(block.code, page.name, "exec"), scope)
        else:
            check(block)
            if block.title:
                Path(block.title).write_text(block.code)

    if page == README:
        assert len(scope["general"]) > 0
        check_report(workplace / "report")


def check_report(report: Path) -> None:
    """The page compares what the README has tuned: its section is there, not the line that says how to get it."""
    assert "report --run" not in (report / "index.html").read_text()
    methods = {row.split(",")[0] for row in (report / "tables/methods.csv").read_text().splitlines()[1:]}
    assert methods == {"plain", "specific_30", "specific_random_30"}


def test_every_file_that_the_readme_links_to_or_names_exists() -> None:
    text = README.read_text()
    named = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(
        re.findall(r"`((?:examples|store|benchmarks)/[^`{}]*)`", text)
    )
    assert len(named) > 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_file_that_a_page_of_the_site_links_to_or_shows_exists() -> None:
    """The site's own check takes a link to a picture that is gone for a file."""
    linked = {page.parent / name for page in PAGES for name in re.findall(r"\]\(([^)#:\s]+)[#)]", page.read_text())}
    assert len(linked) > 10
    assert [str(path) for path in linked if not path.exists()] == []


def check(block: Block) -> None:
    """A block that does not run, or is no program, is at least what its language says."""
    if block.language in SHELL:
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        code = re.sub(r"\\\n", " ", block.code)
        for call in re.findall(r"^[^#\n]*?pnlac-fast (\w+ [^>\n]*)", code, flags=re.MULTILINE):
            check_ours(shlex.split(re.sub(r"\$\w+|\$\{\w+\}", "x", call), comments=True))
    elif block.language == "python":
        ast.parse(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "yaml":
        list(yaml.safe_load_all(block.code))
    else:
        assert block.language == "text", f"{block.language} is nothing that this test can check"
