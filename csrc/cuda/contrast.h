// The contrast sums on a CUDA device. No header of torch or of CUDA: the binding is compiled without either.
#pragma once
#include "../contrast.h"
#include "../dtype.h"

namespace pnlac::cuda {

struct Extent {
  int64_t base_rows;   // rows that base has
  int64_t tuned_rows;  // rows that tuned has
  int64_t selected;    // entries of `rows`
};

// How many doubles of scratch memory `contrast` needs.
int64_t contrast_scratch(const ContrastParams& p, const Extent& extent, DType dtype);

// Queues the work on a stream of the device. Returns null, or what CUDA says went wrong.
const char* contrast(const ContrastParams& p, const Extent& extent, DType dtype, double* scratch, int device,
                     void* stream);

}  // namespace pnlac::cuda
