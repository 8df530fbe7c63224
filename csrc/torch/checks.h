// What every operation checks of its tensors. Of torch only the stable ABI: one binary serves every release from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>

#include "../dtype.h"

namespace pnlac {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK would put the path of this file in front of the sentence.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline DType dtype_of(const Tensor& tensor, const char* operation) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      throw std::runtime_error(std::string(operation) +
                               ": activations must be float32, float64, bfloat16 or float16.");
  }
}

inline void require_index(const Tensor& tensor, const char* operation, const char* name) {
  require(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), operation, ": ", name,
          " must be a contiguous vector of int64.");
}

}  // namespace pnlac
