// What every operation checks of its tensors. Of torch only the stable ABI: one binary serves every release from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>

#include "../dtype.h"

namespace pnlac {

constexpr int64_t kGrainNeurons = 256;  // fewer neurons than this are not worth another thread

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

inline void require_activations(const Tensor& tensor, const char* operation, const char* name) {
  require(tensor.dim() == 2 && (tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1), operation, ": ", name,
          " must be [row, neuron] with contiguous neurons.");
}

inline void require_sums(const Tensor& sums, int64_t groups, int64_t terms, int64_t neurons, const char* operation) {
  require(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.dim() == 3 &&
              sums.size(0) == groups && sums.size(1) == terms && sums.size(2) == neurons,
          operation, ": sums must be contiguous float64 of shape [group, ", terms, ", neuron].");
}

// The next two only where the indices live in host memory.
inline void require_offsets(const int64_t* offsets, int64_t groups, int64_t selected, const char* operation) {
  require(offsets[0] == 0 && offsets[groups] == selected, operation, ": offsets must start at 0 and end at ", selected,
          ", the length of rows.");
  for (int64_t g = 0; g < groups; ++g)
    require(offsets[g] <= offsets[g + 1], operation, ": offsets must not decrease (group ", g, ").");
}

inline void require_rows(const int64_t* rows, int64_t selected, int64_t count, const char* operation,
                         const char* name) {
  for (int64_t i = 0; i < selected; ++i)
    require(rows[i] >= 0 && rows[i] < count, operation, ": ", name, "[", i, "] is ", rows[i], ", but there are ", count,
            " rows.");
}

}  // namespace pnlac
