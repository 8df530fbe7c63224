// Parameters of the masked optimizer steps. No torch header here: kernels for any device include this file alone.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pnlac {

// One parameter, of which `keep` says the share of the step that each row or column takes.
struct MaskedTensor {
  void* param;        // [row, column], contiguous; a vector is one row, with a keep for each column
  const void* grad;   // like param
  void* first;        // AdamW's first moment or SGD's momentum, [row, column]; null where SGD has none
  void* second;       // AdamW's second moment; null for SGD
  const float* keep;  // [row] or [column], in [0, 1]
  int64_t rows;
  int64_t columns;
  int64_t start;  // entries of the tensors before this one
  DType dtype;    // of param and grad
  DType moments;  // of first and second: the same or float32
  bool by_row;
  bool fractions;  // whether any keep is neither 0 nor 1
};

struct AdamWStep {
  float decay;           // 1 - lr * weight_decay
  float first_weight;    // 1 - beta1
  float beta2;
  float second_weight;   // 1 - beta2
  float size;            // lr / (1 - beta1^step)
  float correction;      // 1 / sqrt(1 - beta2^step)
  float eps;
};

struct SGDStep {
  float lr;
  float momentum;
  float gradient_weight;  // 1 - dampening
  float weight_decay;
  bool nesterov;
  bool first;  // the gradient replaces the momentum
};

}  // namespace pnlac
