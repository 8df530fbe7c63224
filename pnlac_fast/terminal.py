"""What the commands print on stdout: a table to read, or one JSON object."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import click

WIDTH = 100  # longest cell
LISTED = 12  # longest list
DIGEST = re.compile(r"[0-9a-f]{40,}")


def show(result: Any, as_json: bool, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Print ``result`` as JSON, or ``rows`` as a table."""
    if as_json:
        click.echo(json.dumps(_finite(result), default=str, allow_nan=False))
        return
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in cells)) for name in columns}
    numbers = {name for name in columns if all(isinstance(row.get(name, 0), int | float) for row in rows)}
    for row in ({name: name for name in columns}, *cells):
        padded = (
            row.get(name, "").rjust(widths[name]) if name in numbers else row.get(name, "").ljust(widths[name])
            for name in columns
        )
        click.echo("  ".join(padded).rstrip())


def show_record(record: Mapping[str, Any], as_json: bool, *, leave_out: Sequence[str] = ()) -> None:
    """Print a record as JSON, or as lines of name and value; ``leave_out`` names what only JSON shows."""
    if as_json:
        show(record, True)
        return
    lines = list(_lines({name: value for name, value in record.items() if name not in leave_out}, 0))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name.ljust(width)}  {value}".rstrip())


def readable_bytes(count: int) -> str:
    """A number of bytes as text: ``1.5 MB``."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _lines(record: Mapping[str, Any], depth: int) -> list[tuple[str, str]]:
    """Name and value of each line; a record in a record is one line where it is short, else an indented block."""
    lines: list[tuple[str, str]] = []
    for key, value in record.items():
        name = "  " * depth + str(key)
        if value is None or value == {} or value == []:
            continue
        if key == "bytes":
            value = readable_bytes(value)
        if isinstance(value, Mapping) and depth < 2 and len(_cell(value)) >= WIDTH:
            lines += [(name, ""), *_lines(value, depth + 1)]
        elif key == "flops":
            lines.append((name, f"{value:.2g}"))
        elif key == "command":
            lines.append((name, shlex.join(value)))
        else:
            lines.append((name, _cell(value)))
    return lines


def _finite(value: Any) -> Any:
    """JSON knows no NaN: what could not be computed becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    """A value as text on one line, of at most ``WIDTH`` characters."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    if _is_estimate(value):
        if math.isnan(value[0]):
            return ""
        estimate, low, high = (f"{round(v, 2) + 0.0:.2f}" for v in value)
        return f"{estimate} [{low}, {high}]"
    if isinstance(value, Mapping):
        parts = [(name, item) for name, item in value.items() if item not in (None, {}, [])]
        parts = [(k, readable_bytes(v) if str(k).endswith("_bytes") else v) for k, v in parts]
        text = ", ".join(f"{k} ({_cell(v)})" if isinstance(v, Mapping) else f"{k} {_cell(v)}" for k, v in parts)
    elif isinstance(value, list | tuple):
        kept = value if len(value) <= LISTED else value[: LISTED - 2]
        cells = [f"{_cell(v[0])}: {_cell(v[1])}" if _is_pair(v) else _cell(v) for v in kept]
        text = ", ".join([*cells, *([f"and {len(value) - len(kept)} more"] if len(value) > len(kept) else [])])
    else:
        text = " ".join(str(value).split())
        text = text[:12] if DIGEST.fullmatch(text) else text
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _is_estimate(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, float) for v in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2
