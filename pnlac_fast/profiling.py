"""Names of this package's stages in torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

P = ParamSpec("P")
R = TypeVar("R")


def staged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that ``torch.profiler`` shows its calls as "pnlac::NAME".

    While nothing is profiled a call costs no more than a look at a flag; torch's own ``record_function`` costs a
    hundred times that, too much for what is done once a layer of a small model.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            with profiler.record_function(f"pnlac::{name}"):
                return function(*args, **kwargs)

        return run

    return decorate
