#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define PNLAC_ISA isa_avx2
#define PNLAC_ISA_NAME "avx2"
#define PNLAC_VECTOR_BYTES 32
#include "kernels.inl"
#endif
