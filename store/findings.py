"""What is wrong with a file of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["damaged", "foreign", "leftover"]

REPAIR = "run the same cache command again with --repair"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the store's journal says.

    Attributes
    ----------
    file : str
        The file, relative to the store.
    problem : str
        What is wrong with it: "is missing", "is changed" and so on.
    kind : {"damaged", "foreign", "leftover"}
        Damaged: something was written and is not there any more as it was. Foreign: nothing of this store's. Leftover:
        what a crash left, or what another process is writing; no reader takes it for anything, so the store is sound.
    owner : str
        What it belongs to: a unit, a group such as ``contrast``, or "store" for what the store was created with.
    action : str
        What to do about it.
    unit, part : int, optional
        The unit, and the part of it.
    """

    file: str
    problem: str
    kind: Kind
    owner: str
    action: str
    unit: int | None = None
    part: int | None = None
