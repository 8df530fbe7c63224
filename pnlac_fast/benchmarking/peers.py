"""The same statistics by other packages, each in the way its own documentation recommends, batch by batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pnlac_fast.benchmarking.agreement import Statistics
from pnlac_fast.benchmarking.workloads import Workload

Way = Callable[[], Statistics]
PACKAGES: dict[str, Callable[[Workload], Way]] = {}


@contextmanager
def prepared(workload: Workload) -> Iterator[tuple[dict[str, Way], dict[str, str]]]:
    """The peers that are installed, ready to run on the workload; and, of the others, why they are not."""
    absent = {name: "not installed" for name in PACKAGES if importlib.util.find_spec(name) is None}
    yield {name: prepare(workload) for name, prepare in PACKAGES.items() if name not in absent}, absent
