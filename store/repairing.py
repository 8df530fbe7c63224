"""Put right what can be made again: from the other copy, from what the caller brings, or by redoing units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pnlac_fast.store.findings import Finding
from pnlac_fast.store.groups import collect, write_root
from pnlac_fast.store.headers import Copies
from pnlac_fast.store.journal import JOURNAL, STORE, encode_line, group_key, listed, unit_key
from pnlac_fast.store.places import Place
from pnlac_fast.store.schema import CONTRAST, METADATA, parse_header
from pnlac_fast.store.verification import verify_place


def repair(
    place: Place,
    copies: Copies,
    attributes: dict[str, Any],
    created: Callable[[], Mapping[str, bytes]],
    part: int = 0,
) -> list[Finding]:
    """Mend a store, or prepare that it is mended by the units that become pending; return what was found.

    Nothing foreign is removed, and no result: whatever a user's command has made is left as it is.

    Parameters
    ----------
    place : Place
        Where the store is; the caller holds `place.changing()`, and nobody else writes.
    copies : Copies
        What the store says of itself.
    attributes : dict
        The root's attributes where neither copy says them.
    created : function
        Gives the files that a store is created with, by key.
    part : int
        The part of each unit that the caller writes; leftovers of other parts are left to their writers.
    """
    header = copies.header or parse_header(attributes, place.name)
    found = verify_place(place, copies._replace(header=header))
    damaged = [finding for finding in found if finding.kind == "damaged"]
    if any(finding.owner == "store" and finding.file != METADATA for finding in damaged):
        written = {name: place.write(name, [content]) for name, content in created().items()}
        place.sync()
        place.write(STORE, [encode_line({"attributes": header.attributes, "files": listed(written)})])
        place.sync()
    contrast = any(finding.owner == CONTRAST for finding in damaged)
    if damaged or any(finding.file == METADATA for finding in found):
        without = {finding.file.removesuffix(f"/{METADATA}") for finding in found if finding.owner != "store"}
        without |= {finding.owner for finding in found if finding.kind == "leftover" and finding.unit is None}
        write_root(place, header.attributes, collect(place, without | ({CONTRAST} if contrast else set())))
    for unit, of in sorted({(f.unit, f.part) for f in damaged if f.unit is not None and f.part is not None}):
        place.remove(unit_key(unit, of))
    for finding in damaged:
        if finding.owner == JOURNAL:
            place.remove(finding.file)
    if contrast:
        place.remove(group_key(CONTRAST))
        place.remove(CONTRAST)
    for finding in found:
        if finding.kind == "leftover" and finding.part in (None, part) and finding.file != METADATA:
            place.remove(finding.file)
    return found
