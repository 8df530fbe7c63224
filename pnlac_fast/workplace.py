"""Where a fine-tune lives until it is finished: a folder that appears at its destination complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pnlac_fast.errors import UserError

SETTINGS_FILE = "settings.json"
CHECKPOINTS = "checkpoints"


@contextmanager
def workplace(out: str | Path | None, settings: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """Folder for an unfinished run: beside ``out``, where it survives an interruption, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="pnlac-") as temporary:
            yield Path(temporary)
        return
    out = Path(out)
    require_free(out, overwrite)
    work = out.with_name(f"{out.name}.partial")
    if work.exists():
        found = json.loads((work / SETTINGS_FILE).read_text()) if (work / SETTINGS_FILE).is_file() else {}
        names = [name for name in {**settings, **found} if _json(settings.get(name)) != found.get(name)]
        saved = last_checkpoint(work / CHECKPOINTS)
        if saved and names and not overwrite:
            raise UserError(
                f"'{work}' holds an interrupted run with other settings ({', '.join(names)}): give the same settings "
                f"to resume it, or --overwrite to drop it."
            )
        if names or not saved:
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / SETTINGS_FILE, settings)
    try:
        yield work
    except UserError:  # the same settings would fail again, and others must not be refused for its sake
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def require_free(out: str | Path | None, overwrite: bool) -> None:
    """Refuse a place that is taken, unless it may be replaced."""
    if out is not None and Path(out).exists() and not overwrite:
        raise UserError(f"'{out}' exists: give another --out, or --overwrite to replace it.")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; the Trainer writes its state last."""
    found = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def write_json(path: Path, record: Mapping[str, Any], indent: int | None = 1) -> None:
    """JSON that is there complete or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(record, indent=indent) + "\n")
    os.replace(draft, path)
