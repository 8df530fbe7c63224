// All kernels, compiled once per instruction set by isa_*.cpp. No function from a header of the standard library may be
// used in these files: the linker could keep the copy that was compiled for the newest instruction set and call it
// on an old processor.
#include "kernels.h"

namespace pnlac {
namespace PNLAC_ISA {
namespace {
#include "contrast.inl"
#include "masked.inl"
}  // namespace

extern const Kernels kTable;
const Kernels kTable = {PNLAC_ISA_NAME, contrast, masked_adamw, masked_sgd};

}  // namespace PNLAC_ISA
}  // namespace pnlac
