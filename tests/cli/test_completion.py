"""Shells complete commands, options, their words, and files."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import click
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
    "kl_on": "divergence.ON",
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


def test_bash_takes_the_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(sys.executable).with_name("pnlac-fast")
    if shutil.which("bash") is None or not program.exists():
        pytest.skip("there is no bash, or the package is not installed as a program")
    monkeypatch.setenv("_PNLAC_FAST_COMPLETE", "bash_source")
    with pytest.raises(SystemExit):
        main([])
    typing = f"\nCOMP_WORDS=(pnlac-fast cache --raw p); COMP_CWORD=3; _pnlac_fast_completion {program}"
    script = capsys.readouterr().out + typing + '; printf "%s\\n" "${COMPREPLY[@]}"'
    monkeypatch.delenv("_PNLAC_FAST_COMPLETE")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pooled"]
