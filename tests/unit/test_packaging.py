"""What pip installs: the right folders, the right files, and a build that says what it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGES = {name: ROOT / SETUPTOOLS["package-dir"].get(name, name.replace(".", "/")) for name in SETUPTOOLS["packages"]}


def run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_package_list_names_every_folder() -> None:
    folders = {init.parent for top in ("pnlac_fast", "store") for init in (ROOT / top).rglob("__init__.py")}
    assert set(PACKAGES.values()) == folders


def test_every_file_that_is_not_python_is_package_data() -> None:
    left_out = {".py", ".so", ".pyc", ".md"}
    for name, folder in PACKAGES.items():
        patterns = SETUPTOOLS["package-data"].get(name, [])
        extra = [path for path in folder.iterdir() if path.is_file() and path.suffix not in left_out]
        assert [path.name for path in extra if not any(fnmatch(path.name, pattern) for pattern in patterns)] == []


def test_every_requirement_is_pinned_to_a_version_it_accepts() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], *PROJECT["build-system"]["requires"]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(Version(pins[requirement.name.lower()])), requirement
    makefile, setup = (ROOT / "Makefile").read_text(), (ROOT / "setup.py").read_text()
    assert set(re.findall(r"torch==([\d.]+)", makefile + setup)) == {pins["torch"]}


def test_the_installed_version_is_the_one_in_pyproject() -> None:
    assert version("pnlac-fast") == PROJECT["project"]["version"]


@pytest.mark.parametrize("from_checkout", [True, False])
def test_store_imports_without_torch(from_checkout: bool, tmp_path: Path) -> None:
    script = "import sys, pnlac_fast.store; sys.exit(int('torch' in sys.modules))"
    done = run(script, ROOT if from_checkout else tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_build_without_torch_says_what_to_install() -> None:
    done = run("import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')", ROOT)
    assert done.returncode == 1
    assert "pip install torch==2.13.0 setuptools ninja\n    pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


def test_only_one_room_knows_torch_and_only_its_stable_part() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    includes = {path: re.findall(r'#include [<"](torch|ATen|c10|Python)([^>"]*)', path.read_text()) for path in sources}
    assert {path.parent.name for path, found in includes.items() if found} == {"torch"}
    ours = [include for found in includes.values() for include in found]
    assert all(top == "torch" and rest.startswith(("/csrc/stable/", "/headeronly/")) for top, rest in ours)
