"""What can go wrong in a way that the user can mend, and how the command line reports it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input or the set-up: one sentence that names the next action. Exit code 3."""

    exit_code = 3


class Interrupted(Exception):
    """The run was stopped but can be resumed with the same command. Exit code 4."""

    exit_code = 4


def unknown(kind: str, value: str, known: Iterable[str]) -> UserError:
    """An error for a name that does not exist, with the nearest known one.

    Parameters
    ----------
    kind
        What the name stands for, in the singular ("topic", "site").
    value
        The name as given.
    known
        The names that do exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"There is no {kind} '{value}'.{hint} Known: {', '.join(names) or 'none'}.")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
