// Parameters of the middle of a gated MLP. No torch header here.
#pragma once
#include <cstdint>

namespace pnlac {

enum class Activation : int32_t { kSilu, kGeluTanh };

// All [row, neuron] with contiguous neurons; strides in elements. What is written has rows one after another.
struct SwigluParams {
  const void* gate;
  const void* up;
  void* mid;
  int64_t gate_row_stride;
  int64_t up_row_stride;
  int64_t neurons;
  Activation activation;
};

struct SwigluBackwardParams {
  SwigluParams forward;  // without mid
  const void* grad;
  int64_t grad_row_stride;
  void* by_gate;
  void* by_up;
};

struct SwigluContrastParams {
  SwigluParams forward;
  int64_t rows;
  const void* base;          // [kept, neuron]
  int64_t base_row_stride;
  const int64_t* base_rows;  // [row] row of base; not read where no group counts the row
  const float* counts;       // [group, row] how often a group counts a row
  double* sums;              // [group, kSums, neuron], added to
  int64_t groups;
};

}  // namespace pnlac
