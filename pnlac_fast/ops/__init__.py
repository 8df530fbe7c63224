"""The numerical operations of the package, one file each; ``dispatch`` is the only place that chooses who computes.

Every operation has a reference in plain torch (``reference``), compiled kernels for the CPU (``native``, ``csrc/``) and
Triton kernels for CUDA (``triton/``).
"""

from pnlac_fast.ops.dispatch import engines
from pnlac_fast.ops.masked import masked_adamw, masked_sgd
from pnlac_fast.ops.sums import contrast

__all__ = ["contrast", "engines", "masked_adamw", "masked_sgd"]
