"""Shells complete commands, options, their words, and files."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pexpect
import pytest

from pnlac_fast.cli import commands, main
from pnlac_fast.ops import engines
from pnlac_fast.options import Option
from pnlac_fast.shell import NO_FILES, WORDS

# Where the library has the words; those of others are in the help text.
LIBRARY = {
    "direction": "patching.DIRECTIONS",
    "inhibit_mode": "interventions.MODES",
    "kind": "patching.KINDS",
    "other_texts": "references.KINDS",
    "normalise": "stance.NORMALISE",
    "only": "benchmarking.suite.PARTS",
    "rival": "rivals.RIVALS",
    "set": "patch_sets.ALL_SETS",
    "site": "architecture.SITES",
    "specific": "top_sets.SPECIFIC",
    "tokens": "prompts.TOKENS",
    "without": "passes.SHORTCUTS",
}


def offered(shell: str, typed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the program gives a shell for what stands behind ``pnlac-fast``, the last word unfinished."""
    words = ["pnlac-fast", *typed.split(" ")]
    monkeypatch.setenv("_PNLAC_FAST_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("ca", ["plain,cache"]),
        ("", [f"plain,{name}" for name in commands.commands]),
        ("cache --raw", ["plain,--raw", "plain,--raw-dtype", "plain,--raw-layers", "plain,--raw-neurons"]),
        ("cache --raw p", ["plain,pooled"]),
        ("cache --tokens last,c", ["plain,last,completion"]),
        ("finetune --side r", ["plain,right"]),
        ("patch --kind ", [f"plain,{word}" for word in WORDS["kind"]]),
        ("cache --model mod", ["file,mod"]),
        ("patch --tuned ", ["file,"]),
        ("locate ru", ["file,ru"]),
        ("finetune --topic r", []),
    ],
)
def test_bash_is_offered(
    typed: str, wanted: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered("bash", typed, capsys, monkeypatch) == wanted


def test_zsh_and_fish_are_offered_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered("zsh", "cache --raw po", capsys, monkeypatch) == ["plain", "pooled", "_"]
    assert offered("zsh", "recount ra", capsys, monkeypatch) == ["file", "ra", "_"]
    assert offered("fish", "cache --raw po", capsys, monkeypatch) == ["plain,pooled"]
    assert offered("fish", "recount ra", capsys, monkeypatch) == ["file,ra"]


def test_the_words_are_those_of_the_library() -> None:
    for name, where in LIBRARY.items():
        module, _, constant = where.rpartition(".")
        assert set(WORDS[name]) == set(getattr(importlib.import_module(f"pnlac_fast.{module}"), constant)), name
    assert set(WORDS["engine"]) == {"auto", *engines()}
    helped: dict[str, str] = {}
    for command in commands.commands.values():
        for option in command.params:
            if isinstance(option, Option) and not isinstance(option.type, click.Choice):
                helped[option.name or ""] = helped.get(option.name or "", "") + f" {option.help}"
    for name in WORDS.keys() - LIBRARY.keys() - {"engine", "keep_scores", "shape"}:
        assert [word for word in WORDS[name] if word not in helped[name]] == [], name
    assert set(WORDS) | set(NO_FILES) <= set(helped)


TYPED = [
    ("cache --raw p", "pooled"),
    ("cache --tokens last,c", "last,completion"),
    ("cache --raw=p", "--raw=pooled"),
    ("cache --model mo", "models/"),
    ("cache --model=mo", "--model=models/"),
    ("cache --tuned a=mo", "a=models/"),
    ("--config n", "neurons.json"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, with a folder to complete, and the program on the path."""
    program = Path(sys.executable).with_name("pnlac-fast")
    if not program.exists():
        pytest.skip("the package is not installed as a program")
    (tmp_path / "models").mkdir()
    (tmp_path / "neurons.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


def documented(shell: str) -> str:
    """The line for a shell's start-up file that the documentation gives."""
    page = Path(__file__).parents[2] / "docs" / "quickstart.md"
    (line,) = [line for line in page.read_text().splitlines() if f"={shell}_source" in line]
    return line


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.usefixtures("home")
def test_bash_completes() -> None:
    words = {
        "cache --raw p": ("pooled", 3),
        "cache --raw = p": ("pooled", 4),
        "cache --raw = none --tokens = last,c": ("last,completion", 7),
        "cache --model = mo": ("", 4),  # then bash completes a file
    }
    lines = [
        f"COMP_WORDS=(pnlac-fast {typed}); COMP_CWORD={at}; COMPREPLY=(); "
        'compopt() { :; }; _pnlac_fast_completion pnlac-fast; echo "${COMPREPLY[*]}"'
        for typed, (_, at) in words.items()
    ]
    assert run("bash", "-c", "\n".join([documented("bash"), *lines])).splitlines() == [w for w, _ in words.values()]


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
@pytest.mark.usefixtures("home")
def test_fish_completes() -> None:
    lines = [documented("fish"), *(f"complete --do-complete 'pnlac-fast {typed}'" for typed, _ in TYPED)]
    assert run("fish", "-c", "\n".join(lines)).splitlines() == [wanted for _, wanted in TYPED]
    helped = run("fish", "-c", f"{lines[0]}\ncomplete --do-complete 'pnlac-fast '").splitlines()
    assert [line.split("\t")[0] for line in helped] == list(commands.commands)
    assert "Show versions, devices and engines." in "\n".join(helped)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_completes(home: Path) -> None:
    """Typed on a terminal, because zsh completes nowhere else."""
    start = f"autoload -Uz compinit && compinit -u\n{documented('zsh')}\nPS1='> '\nunsetopt zle_bracketed_paste\n"
    # A key that shows the line as it is, between signs that nothing else prints.
    show = "show() { print -r -- \"<<$BUFFER>>\"; BUFFER=; }; zle -N show; bindkey '^X' show\n"
    (home / ".zshrc").write_text(f"{start}{show}")
    shell = pexpect.spawn("zsh", ["-i"], encoding="utf-8", timeout=60, dimensions=(50, 200), env={**os.environ})
    for typed, wanted in TYPED:
        shell.send(f"pnlac-fast {typed}\t\x18")
        shell.expect("<<(.*?)>>")
        assert shell.match[1].rstrip() == f"pnlac-fast {typed.rpartition(' ')[0]} {wanted}".replace("  ", " ")
    shell.close(force=True)
