#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define PNLAC_ISA isa_avx512
#define PNLAC_ISA_NAME "avx512"
#define PNLAC_VECTOR_BYTES 64
#include "kernels.inl"
#endif
