// The types of activations and weights, as the kernels know them. No torch header here.
#pragma once
#include <cstdint>

namespace pnlac {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace pnlac
