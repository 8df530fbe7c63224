// The kernels for the CPU, as a table per instruction set; the best one that the processor knows is chosen once.
#pragma once
#include <cstdint>

#include "../contrast.h"
#include "../dtype.h"
#include "../masked.h"
#include "../streams.h"
#include "../swiglu.h"

namespace pnlac {

struct Kernels {
  const char* isa;
  // Adds the neurons [first, last) of every group. The bits do not depend on how the neurons are divided among calls.
  void (*contrast)(const ContrastParams& params, DType dtype, int64_t first, int64_t last);
  void (*moments)(const MomentsParams& params, DType dtype, int64_t first, int64_t last);
  // Steps the entries [begin, end) of all tensors, counted one tensor after another. The bits do not depend on how they
  // are divided among calls.
  void (*masked_adamw)(const MaskedTensor* tensors, int64_t count, const AdamWStep& step, int64_t begin, int64_t end);
  void (*masked_sgd)(const MaskedTensor* tensors, int64_t count, const SGDStep& step, int64_t begin, int64_t end);
  // The entries [begin, end) of the [row, neuron] result. The bits do not depend on how they are divided among calls.
  void (*swiglu)(const SwigluParams& params, DType dtype, int64_t begin, int64_t end);
  void (*swiglu_backward)(const SwigluBackwardParams& params, DType dtype, int64_t begin, int64_t end);
  // The neurons [first, last) of every row and group, as `contrast`.
  void (*swiglu_contrast)(const SwigluContrastParams& params, DType dtype, int64_t first, int64_t last);
  // The sum of the int64 in the stretches [first, last) of every stream.
  int64_t (*read_streams)(const StreamsParams& params, int64_t first, int64_t last);
};

// Of the instruction set that the environment variable PNLAC_ISA names (default, avx2, avx512) or else of the best one.
const Kernels& kernels();

}  // namespace pnlac
