"""Read every byte of a store, and say what is not as the journal says."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import xxhash

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.files import Part
from pnlac_fast.store.findings import REPAIR, Finding
from pnlac_fast.store.groups import collect, encode_root
from pnlac_fast.store.headers import Copies, read_copies
from pnlac_fast.store.journal import JOURNAL, STORE, decode_line, files_of, group_key, group_of, unit_key
from pnlac_fast.store.journal import Files as Sums
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.local import PARTIAL
from pnlac_fast.store.places import Location, Place, Sum, place_of
from pnlac_fast.store.schema import (
    ACTIVATIONS,
    CONTRAST,
    EXAMPLES,
    METADATA,
    NEURON_SETS,
    PARTIALS,
    RESULTS,
    TOKENS,
    is_whole,
)
from pnlac_fast.store.units import unit_files

_AT_ONCE = 4 << 20  # bytes in memory, times the place's threads
_CREATED = (PARTIALS, TOKENS, ACTIVATIONS, EXAMPLES)
_UNIT = re.compile(rf"{JOURNAL}/unit\.(\d{{1,18}})\.(\d{{1,18}})\.json")
_AGAIN = "run the command that was writing again"
_SAME = "run the same cache command again"


def verify(path: Location) -> list[Finding]:
    """Read every byte of a store and compare it with the journal.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store. What another process writes meanwhile may be reported.

    Returns
    -------
    list of Finding
        Sorted by file; empty where all is as it was written. Flipped bits, files that are cut off, missing, or not of
        this store, metadata and the journal's own lines included; and what a crash has left, which is no damage.

    Raises
    ------
    StoreError
        If `path` is no store, or nothing tells any more what it held.
    """
    place = place_of(path)
    return verify_place(place, read_copies(place))


def certify(report: Mapping[str, Any]) -> None:
    """Raise StoreError where the findings in `report`, which `info` returned, are more than leftovers."""
    found = report.get("findings", [])
    damaged, foreign = ([f for f in found if f["kind"] == kind] for kind in ("damaged", "foreign"))
    if damaged:
        others = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        first = damaged[0]
        raise StoreError(f"{report['path']} is damaged: {first['file']} {first['problem']}{others}; {first['action']}.")
    if foreign:
        raise StoreError(
            f"{report['path']} is sound, but {len(foreign)} of the files in it are not its own, such as "
            f"{foreign[0]['file']}; {foreign[0]['action']}."
        )


def verify_place(place: Place, copies: Copies) -> list[Finding]:
    """Do what `verify` does, where the place and what the store says of itself are known."""
    if copies.header is None:
        if copies.line is None and place.read(METADATA) is None and not place.sizes(f"{JOURNAL}/"):
            reason = "is not a pnlac store" if place.foreign() else "does not exist"
            raise StoreError(f"{place.name} {reason}; give the path of a store that the cache command made.")
        raise StoreError(
            f"{place.name} is not a pnlac store, or both {METADATA} and {STORE} are damaged; if a cache command made "
            "it, run that again with --repair."
        )
    return sorted(_Check(place, copies, copies.header.layout).findings(), key=lambda found: found.file)


class _Check:
    """One look at a store: its files and lines as they are, and which of them have been accounted for."""

    def __init__(self, place: Place, copies: Copies, layout: Layout | None) -> None:
        self.place, self.copies, self.layout = place, copies, layout
        self.sizes = place.sizes()
        self.lines = place.read_all(key for key in self.sizes if key.startswith(f"{JOURNAL}/"))
        self.documents = collect(place)
        self.known: set[str] = set()
        self.listed = _consolidated(place.read(METADATA))
        self.mend = REPAIR if layout is not None else "run the command that made the store again"
        # Of a store that has statistics every unit was there; of another one, some may not have been made yet.
        self.complete = group_key(CONTRAST) in self.lines or CONTRAST in (self.listed or ())

    def findings(self) -> Iterator[Finding]:
        sums: dict[str, tuple[Sum, Finding]] = {}  # what each file must be, and what to say if it is not
        yield from self._creation(sums)
        if self.layout is not None:
            yield from self._units(self.layout, sums)
        yield from self._groups(sums)
        self.known.update(sums, (METADATA,))
        broken = []
        for found in _compare(self.place, self.sizes, sums):
            broken.append(found.file)
            yield found
        yield from self._root(sums, broken)
        yield from self._others(sums)

    def _creation(self, sums: dict[str, tuple[Sum, Finding]]) -> Iterator[Finding]:
        of_store = Finding(STORE, "", "damaged", "store", self.mend)
        self.known.add(STORE)
        files = _files(self.copies.line)
        if files is not None and self.copies.line is not None and "attributes" in self.copies.line:
            sums.update({name: (value, replace(of_store, file=name)) for name, value in files.items()})
            return
        self.known.update(key for key in self.sizes if self._is_created(key))
        if STORE in self.lines:
            yield replace(of_store, problem="is damaged")
        elif any(key.endswith(".json") for key in self.lines):
            yield replace(of_store, problem="is missing")
        else:
            problem = "is not there: making the store was cut off"
            yield replace(of_store, problem=problem, kind="leftover", action=_AGAIN)

    def _is_created(self, key: str) -> bool:
        """Whether `key` may be of the store's creation, as far as that can be told without its line."""
        name = key.rpartition("/")[2]
        made = key.split("/")[0] in _CREATED and (
            name == METADATA or key.startswith(f"{EXAMPLES}/") or re.search(r"/(layer|neuron)/c\.0$", key)
        )
        return bool(made) or key == f"{RESULTS}/{METADATA}"

    def _units(self, layout: Layout, sums: dict[str, tuple[Sum, Finding]]) -> Iterator[Finding]:
        for unit, described in enumerate(layout.units):
            for part in range(layout.parts):
                key = unit_key(unit, part)
                owner = f"unit {unit} ({described})" + (f", part {part}" if layout.parts > 1 else "")
                of_unit = Finding(key, "", "damaged", owner, REPAIR, unit, part)
                names = set(unit_files(layout, unit, part))
                files, problem = self._unit_line(key, unit, part, names, layout)
                if files:
                    self.known.add(key)
                    sums.update({name: (value, replace(of_unit, file=name)) for name, value in files.items()})
                elif problem:
                    self.known.update(names, (key,))
                    yield replace(of_unit, problem=problem)
                else:
                    left = replace(of_unit, problem="is of a unit that was not finished", kind="leftover", action=_SAME)
                    there = names & self.sizes.keys()
                    self.known.update(there)
                    yield from (replace(left, file=name) for name in there)

    def _unit_line(self, key: str, unit: int, part: int, names: set[str], layout: Layout) -> tuple[Sums, str]:
        """Return the files of a unit, or what is wrong with its line, or neither where it has not been made."""
        if key not in self.lines:
            return {}, "is missing" if self.complete else ""
        record = decode_line(self.lines[key])
        if record is None:
            return {}, "is damaged"
        if [record.get(name) for name in ("unit", "part", "layout")] != [unit, part, layout.fingerprint()]:
            return {}, "is of another store"
        files = _files(record)
        if files is None or set(files) != names:
            return {}, "does not list the unit's files"
        return files, ""

    def _groups(self, sums: dict[str, tuple[Sum, Finding]]) -> Iterator[Finding]:
        there = {path for key in self.sizes if (path := _group_above(key))}
        for path in sorted(there | {path for key in self.lines if (path := group_of(key))}):
            key = group_key(path)
            if not is_whole(path):
                continue
            of_group = Finding(key, "", "damaged", path, self._remake(path))
            record = decode_line(self.lines.get(key, b""))
            files = _files(record)
            if record and files and record.get("group") == path and all(name.startswith(f"{path}/") for name in files):
                self.known.add(key)
                sums.update({name: (value, replace(of_group, file=name)) for name, value in files.items()})
                continue
            self.known.update(name for name in (*self.sizes, key) if name == key or name.startswith(f"{path}/"))
            if key in self.lines:
                yield replace(of_group, problem="is damaged")
            elif path in (self.listed or ()):
                yield replace(of_group, problem="is missing")
            else:
                problem = "is not there: writing the group was cut off"
                yield replace(of_group, problem=problem, kind="leftover", action=_AGAIN)

    def _remake(self, path: str) -> str:
        """Return how to make a group again: with the command in its attributes, if they say one."""
        if path == CONTRAST:
            return REPAIR
        try:
            command = self.documents[path]["attributes"]["provenance"]["command"]
            return f"make it again: {shlex.join(command)}"
        except (LookupError, TypeError):
            return "run pnlac-fast locate again" if path == NEURON_SETS else "run the command that made it again"

    def _root(self, sums: Mapping[str, Any], broken: Iterable[str]) -> Iterator[Finding]:
        of_root = Finding(METADATA, "", "damaged", "store", self.mend)
        content, (root, line, _) = self.place.read(METADATA), self.copies
        unsound = {key.removesuffix(f"/{METADATA}") for key in broken}
        if content is None or root is None or self.listed is None:
            yield replace(of_root, problem="is missing" if content is None else "is damaged")
            return
        if line is not None and root != line.get("attributes"):
            yield replace(of_root, problem=f"does not agree with {STORE}")
            return
        below = {name: kept if name in unsound else self.documents.get(name) for name, kept in self.listed.items()}
        if content != encode_root(root, below):
            yield replace(of_root, problem="is changed")
            return
        named = {key.removesuffix(f"/{METADATA}") for key in sums if key.endswith(f"/{METADATA}")}
        if unlisted := named - unsound - self.listed.keys():
            problem = f"does not list {min(unlisted)} yet: a write was cut off"
            yield replace(of_root, problem=problem, kind="leftover", action=_AGAIN)

    def _others(self, sums: Mapping[str, Any]) -> Iterator[Finding]:
        for key in self.sizes:
            if key in self.known:
                continue
            target = key.removesuffix(PARTIAL)
            if key.startswith(f"{JOURNAL}/unit.") and target == key:  # readers refuse it, so it cannot stay
                yield Finding(key, "is the line of no unit of this store", "damaged", JOURNAL, REPAIR)
            elif target != key and (target in self.known or self._may_be(target)):
                yield Finding(key, "is half a file, left by a crash", "leftover", "", "nothing; --repair removes it")
            else:
                yield Finding(key, "is not of this store", "foreign", "", "move it to another place")

    def _may_be(self, key: str) -> bool:
        """Whether a file of a unit, a line or a group may have the name `key`, though there is none now."""
        if self._is_created(key) or is_whole(group_of(key) or ""):
            return True
        if self.layout is None:
            return False
        if line := _UNIT.fullmatch(key):
            unit, part = map(int, line.groups())
            return unit < len(self.layout.units) and part < self.layout.parts and unit_key(unit, part) == key
        parts = itertools.product(range(len(self.layout.units)), range(self.layout.parts))
        return any(key in unit_files(self.layout, unit, part) for unit, part in parts)


def _consolidated(content: bytes | None) -> dict[str, Any] | None:
    """Return the metadata that the root holds of what is below it; None where it cannot be read."""
    try:
        metadata = json.loads(content or b"null")["consolidated_metadata"]["metadata"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


def _files(record: Mapping[str, Any] | None) -> Sums | None:
    try:
        return None if record is None else files_of(record)
    except (ValueError, OverflowError):
        return None


def _group_above(key: str) -> str | None:
    """Return the group whose metadata `key` is, if it is written as a whole."""
    path, _, name = key.rpartition("/")
    return path if name == METADATA and is_whole(path) else None


def _compare(place: Place, sizes: Mapping[str, int], sums: Mapping[str, tuple[Sum, Finding]]) -> Iterator[Finding]:
    """Read files; yield a finding for each that is not what it must be."""

    def look(name: str) -> str:
        return _problem(place, name, sizes.get(name), sums[name][0])

    with ThreadPoolExecutor(place.threads) as pool:
        problems = map(look, sums) if place.threads == 1 else pool.map(look, sums)
        for name, problem in zip(sums, problems, strict=True):
            if problem:
                yield replace(sums[name][1], problem=problem)


def _problem(place: Place, name: str, found: int | None, wanted: Sum) -> str:
    size, digest = wanted
    if found is None:
        return "is missing"
    if found != size:
        return f"has {found} bytes instead of {size}"
    files, hashed = place.files(""), xxhash.xxh3_64()
    try:
        for start in range(0, size, _AT_ONCE):
            for content in files.read([Part(name, start, min(_AT_ONCE, size - start))]):
                hashed.update(b"" if content is None else content.data)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "" if hashed.hexdigest() == digest else "is changed"
