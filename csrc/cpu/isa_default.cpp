#define PNLAC_ISA isa_default
#define PNLAC_ISA_NAME "default"
#define PNLAC_VECTOR_BYTES 16
#include "kernels.inl"
