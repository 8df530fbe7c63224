#define PNLAC_ISA isa_default
#define PNLAC_ISA_NAME "default"
#include "kernels.inl"
