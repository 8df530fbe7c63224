"""The numerical operations of the package, one file each; ``dispatch`` is the only place that chooses who computes.

Every operation has a reference in plain torch (``reference``), compiled kernels for the CPU (``native``, ``csrc/``) and
Triton kernels for CUDA (``triton/``).
"""

from pnlac_fast.ops.dispatch import engines
from pnlac_fast.ops.fused import fuses, swiglu_contrast
from pnlac_fast.ops.masked import masked_adamw, masked_sgd
from pnlac_fast.ops.sums import contrast, moments
from pnlac_fast.ops.swiglu import swiglu, swiglu_backward

__all__ = [
    "contrast",
    "engines",
    "fuses",
    "masked_adamw",
    "masked_sgd",
    "moments",
    "swiglu",
    "swiglu_backward",
    "swiglu_contrast",
]
