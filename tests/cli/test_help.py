"""Help that is true: it is quick, its examples parse, and every option does something."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pnlac_fast
from pnlac_fast.cli import commands, main
from pnlac_fast.options import Option

HEAVY = ("torch", "transformers", "peft", "zarr", "xarray", "numpy", "sklearn", "matplotlib")
VERBS = (
    *(
        "cache",
        "recount",
        "merge",
        "info",
        "locate",
        "patch",
        "finetune",
        "sweep",
        "generate",
        "score",
        "utility",
        "report",
        "publish",
        "study",
        "demo",
        "env",
    ),
    "bench",
)
# What a command consumes itself, and the parameter of the library call that it becomes.
LOADING = {
    **dict.fromkeys(
        ("revision", "dtype", "device", "device_map", "trust_remote_code", "last_projection", "tp"), "model"
    ),
    **dict.fromkeys(("topics", "limit", "columns"), "data"),
    "chat_template": "template",
}
RENAMED = {
    "cache": {"site": "sites"},
    "recount": {"topics": "topics"},
    "merge": {"store": "path"},
    "info": {"store": "path"},
    "bench": {"shape": "shapes", "only": "parts", "device": "device", "dtype": "dtype"},
    "patch": {"direction": "directions", "kind": "kinds", "set": "sets"},
    "finetune": {"set_names": "inhibit", "control": "inhibit", "control_store": "inhibit"},
    "score": dict.fromkeys(("judge_labels", "judge_url", "judge_tokens", "judge_concurrency"), "scorer"),
}
PRINTED = {"score": {"measure", "dry_run", "judge_price"}, "study": {"show_plan"}}


def options(command: click.Command) -> list[click.Parameter]:
    return [p for p in command.params if p.name != "as_json"]


def test_commands_are_the_verbs_of_the_library() -> None:
    assert tuple(commands.commands) == VERBS
    assert set(VERBS) <= set(pnlac_fast.__all__)


@pytest.mark.parametrize("name", VERBS)
def test_each_command_has_help_an_example_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands.commands[name]
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: pnlac-fast {name} " in " ".join(text.split())
    assert "--json" in text
    assert command.help
    assert len(command.get_short_help_str(limit=62)) < 60
    assert "..." not in command.get_short_help_str(limit=62)


@pytest.mark.parametrize("name", VERBS)
def test_the_example_parses(name: str) -> None:
    command = commands.commands[name]
    words = shlex.split((command.epilog or "").removeprefix("Example: "))
    assert words[:2] == ["pnlac-fast", name]
    context = command.make_context(name, words[2:])
    assert context.params.keys() == {p.name for p in command.params if p.expose_value and p.name != "help"}


@pytest.mark.parametrize("name", VERBS)
def test_every_option_says_what_it_is_and_reaches_the_library_call(name: str) -> None:
    call = inspect.signature(getattr(pnlac_fast, name)).parameters
    for option in options(commands.commands[name]):
        if isinstance(option, Option) and not isinstance(option.type, click.Choice):
            default = option.get_default(click.Context(commands), call=False)
            assert option.help or default is not None, f"{option.flag} says nothing of itself"
        parameter = RENAMED.get(name, {}).get(option.name or "", LOADING.get(option.name or "", option.name))
        if option.name not in PRINTED.get(name, set()):
            assert parameter in call, f"{name} {option.name} reaches nothing"


@pytest.mark.parametrize("name", VERBS)
def test_defaults_are_those_of_the_library(name: str) -> None:
    call = inspect.signature(getattr(pnlac_fast, name)).parameters
    example = shlex.split((commands.commands[name].epilog or "").removeprefix("Example: "))
    context = commands.commands[name].make_context(name, example[2:])
    for option in options(commands.commands[name]):
        parameter = call.get(RENAMED.get(name, {}).get(option.name or "", option.name or ""))
        settings = (option.name or "").startswith("judge_")  # of a scorer
        if settings or parameter is None or parameter.default is parameter.empty or option.name == "template":
            continue
        if context.get_parameter_source(option.name or "") is click.core.ParameterSource.DEFAULT:
            value = context.params[option.name or ""]
            several = option.name in ("target_modules", "scorer")
            wanted = (parameter.default,) if several else parameter.default
            assert (value or None) == (wanted or None), option.name


@pytest.mark.parametrize(
    "script",
    [
        "from pnlac_fast.cli import main; main(['--help'])",
        *(f"from pnlac_fast.cli import main; main(['{verb}', '--help'])" for verb in ("cache", "finetune", "demo")),
        "import pnlac_fast",
    ],
)
def test_help_imports_nothing_heavy(script: str) -> None:
    check = f"import sys; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{script}\n{check}"], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_version_and_the_module_as_a_program() -> None:
    asked = [sys.executable, "-m", "pnlac_fast.cli", "--version"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"pnlac-fast, version {pnlac_fast.__version__}"
    assert done.stderr == ""


def test_bodies_are_thin() -> None:
    files = Path(pnlac_fast.__file__).parent.joinpath("commands").glob("*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    bodies = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in VERBS}
    assert set(bodies) == set(VERBS)
    for name, node in bodies.items():
        assert (node.end_lineno or 0) - node.body[0].lineno < 25, name
    assert {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names} == {"click"}


def test_the_group_tells_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "pnlac-fast demo" in text
    listed = re.findall(r"^  ([a-z]+)  ", text.split("Commands:")[1], re.MULTILINE)
    assert tuple(listed) == VERBS
