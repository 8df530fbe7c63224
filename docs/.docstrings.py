"""What the site's reader of docstrings, griffe, does not do by itself: the reStructuredText of numpydoc as Markdown.

Loaded by mkdocs.yml; the leading dot keeps the file itself out of the site.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|attr|mod|exc):`~?([\w.]+)`")
PAGES = Path(__file__).parent / "reference"


def documented() -> dict[str, str]:
    """Full names on the reference pages, by their last parts."""
    names = re.findall(
        r"^::: ([\w.]+)$(?!\n    )", "\n".join(page.read_text() for page in PAGES.glob("*.md")), flags=re.MULTILINE
    )
    return {name.rpartition(".")[2]: name for name in names}


class Docstrings(griffe.Extension):
    """Turns roles, literal blocks and tables into Markdown, and gives parameters their own types and defaults."""

    def __init__(self) -> None:
        self.pages = documented()

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _table(_literal(ROLE.sub(self._link, obj.docstring.value)))

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for section in func.docstring.parsed if func.docstring else ():
            if section.kind is griffe.DocstringSectionKind.parameters:
                section.value = _grouped(section.value)

    def _link(self, role: re.Match[str]) -> str:
        name = role[1].rpartition(".")[2]
        return f"[`{name}`][{self.pages[name]}]" if name in self.pages else f"`{name}`"


def _grouped(parameters: list[griffe.DocstringParameter]) -> list[griffe.DocstringParameter]:
    """Parameters that are described together as one entry. Their types and defaults are in the signature."""
    groups = itertools.groupby(parameters, key=lambda parameter: parameter.description)
    return [
        griffe.DocstringParameter(", ".join(p.name for p in group), description=text)
        for text, group in ((text, list(group)) for text, group in groups)
    ]


def _literal(text: str) -> str:
    """``::`` and the indented block behind it, fenced."""
    return re.sub(
        r"::\n\n((?:    .*\n?|\n(?=    ))+)",
        lambda m: ":\n\n```python\n" + re.sub(r"^    ", "", m[1], flags=re.MULTILINE).rstrip() + "\n```\n",
        text,
    )


def _table(text: str) -> str:
    """A simple table, without a header, as one of Markdown."""

    def convert(table: re.Match[str]) -> str:
        rule, *rows = table[0].strip().splitlines()[:-1]
        starts = [m.start() for m in re.finditer(r"=+", rule)]
        cells = [[row[a:b].strip() for a, b in itertools.pairwise([*starts, None])] for row in rows]
        head = "|" + " |" * len(starts) + "\n" + "|" + " --- |" * len(starts)
        return "\n".join([head, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"

    return re.sub(r"^=+ [= ]+\n(?:(?!=).*\n)+^=+ [= ]+$\n?", convert, text, flags=re.MULTILINE)
