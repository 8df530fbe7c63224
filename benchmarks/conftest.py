"""Which shapes of model ``bench_localise.py`` runs on."""

from __future__ import annotations

import pytest

from pnlac_fast.benchmarking.workloads import SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shape", action="append", choices=list(SHAPES), help="Model shape to localise in; may be repeated."
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.config.getoption("--shape") or ["tiny"], scope="module")
