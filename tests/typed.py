"""What a typed command left behind, and how it should look."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

USAGE, MEND, STOPPED = 2, 3, 4  # exit codes
SMALL = ["--side", "right", "--steps", 2, "--batch-size", 4, "--warmup-steps", 0, "--learning-rate", 1e-2]


def done(result: Any) -> Any:
    """A command that worked and said nothing on stderr."""
    assert (result.code, result.err) == (0, ""), result
    return result


def table(text: str) -> list[str]:
    """The lines of a table, checked for what nobody wants to read."""
    lines = text.rstrip("\n").split("\n")
    assert all(line == line.rstrip() for line in lines)
    assert not re.search(r"np\.|array\(|\{['\"]|\[\[|\bNone\b|\bnan\b|\d\.\d{8}", text), text
    return lines


def refused(result: Any, code: int, *said: str) -> str:
    """The one sentence of a refusal."""
    assert result.code == code, result
    assert result.out == ""
    assert "Traceback" not in result.err
    text = result.err.strip()
    if code == USAGE:
        text = text[text.index("Error: ") :]
    assert "\n" not in text.strip(), text
    for part in said:
        assert part in text, text
    return text


def state(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
