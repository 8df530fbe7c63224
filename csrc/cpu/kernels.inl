// All kernels, compiled once per instruction set by isa_*.cpp. No function from a header of the standard library may be
// used in these files: the linker could keep the copy that was compiled for the newest instruction set and call it
// on an old processor.
#include "kernels.h"

#if PNLAC_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace pnlac {
namespace PNLAC_ISA {
namespace {
#include "numbers.inl"
#include "masked.inl"
#include "vectors.inl"
#include "sums.inl"
#include "swiglu.inl"
#include "streams.inl"
}  // namespace

extern const Kernels kTable;
const Kernels kTable = {PNLAC_ISA_NAME, contrast, moments, masked_adamw, masked_sgd,
                        swiglu, swiglu_backward, swiglu_contrast, read_streams};

}  // namespace PNLAC_ISA
}  // namespace pnlac
