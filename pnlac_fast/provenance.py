"""Where a result came from: versions, machine, time, command line."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pnlac_fast

PACKAGES = ("torch", "transformers", "peft", "zarr", "numpy", "xarray")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    return {name: version(name) for name in PACKAGES}


def provenance(**extra: Any) -> dict[str, Any]:
    """What every result records: package versions, Python, platform, UTC time, command line, and ``extra``."""
    return {
        "package": f"pnlac-fast {pnlac_fast.__version__}",
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **extra,
    }
