"""The one error of the store that a user can put right."""

from __future__ import annotations


class StoreError(Exception):
    """A store cannot be opened, read or written as asked: one sentence that names the next action. Exit code 3."""

    exit_code = 3
