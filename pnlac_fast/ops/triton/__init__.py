"""The operations as Triton kernels, for CUDA; with TRITON_INTERPRET=1 they run on the CPU, very slowly, for tests."""

from pnlac_fast.ops.triton.masked import masked_adamw, masked_sgd
from pnlac_fast.ops.triton.sums import contrast, moments
from pnlac_fast.ops.triton.swiglu import swiglu, swiglu_backward, swiglu_contrast

__all__ = ["contrast", "masked_adamw", "masked_sgd", "moments", "swiglu", "swiglu_backward", "swiglu_contrast"]
