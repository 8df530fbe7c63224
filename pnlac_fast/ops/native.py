"""The compiled library: find it, load it, and say why where that is not possible."""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.parent / "_C.abi3.so"


def load() -> str:
    """Load the compiled operations into torch.

    Loading registers the CPU implementations of the operations that ``pnlac_fast.ops`` defines.

    Returns
    -------
    str
        "available", or the reason why they are not.
    """
    if not _LIBRARY.exists():
        return "the package was installed without its compiled operations; install it again with a C++ compiler"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return (
            f"the compiled operations do not load into torch {torch.__version__} ({error}); install the package again"
        )
    return "available"
