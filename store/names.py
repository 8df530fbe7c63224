"""Names of topics, models and sites: which are allowed, and the directory each one becomes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import quote

from pnlac_fast.store.errors import StoreError

LONGEST_NAME = 200
RESULT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def check_names(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return `names` as a tuple, or raise StoreError where one is empty, doubled, too long or not plain text."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise StoreError(f"A {kind} has an empty name; give every {kind} a name.")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise StoreError(f"The {kind} {name!r} has control characters in its name; rename it.")
        if len(directory_name(name)) > LONGEST_NAME:
            raise StoreError(f"The {kind} {name[:40]!r}... has too long a name; use at most {LONGEST_NAME} characters.")
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise StoreError(f"The {kind} {doubled[0]!r} is listed twice; give every {kind} a name of its own.")
    return tuple(names)


def directory_name(name: str) -> str:
    """Return the directory of a model or site: the name with everything unsafe in a path percent-encoded.

    Letters, digits, ``-``, ``_``, ``.`` and ``~`` stay. A leading dot or underscore is encoded, because Zarr reserves
    names made of dots or beginning with two underscores, and so is the name of Zarr's own metadata file.
    """
    encoded = quote(name, safe="")
    if encoded[0] in "._" or encoded == "zarr.json":
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    return encoded


def check_result_name(name: str) -> str:
    """Return `name` if it can name a group under /results, else raise StoreError."""
    if not RESULT_NAME.fullmatch(name):
        raise StoreError(
            f"{name!r} cannot name a result; use a letter followed by at most 63 letters, digits or underscores."
        )
    return name


def unknown_name(kind: str, name: str, known: Sequence[str]) -> StoreError:
    """Return the error for a model, site or result that the store lacks; it lists those that are there."""
    return StoreError(f"The store has no {kind} {name!r}; it has {', '.join(known) if known else 'none'}.")
