// The middle of a gated MLP, as torch operators.
#include "../swiglu.h"

#include <string>
#include <tuple>

#include "../contrast.h"
#include "../cpu/kernels.h"
#include "checks.h"

namespace pnlac {
namespace {

constexpr int64_t kGrainEntries = 8192;  // fewer than this are not worth another thread

void require_like(const Tensor& tensor, const Tensor& gate, const char* operation, const char* name) {
  require_activations(tensor, operation, name);
  require(tensor.is_cpu() && tensor.scalar_type() == gate.scalar_type(), operation, ": ", name,
          " must be on the CPU and of the dtype of gate.");
  require(tensor.size(0) == gate.size(0) && tensor.size(1) == gate.size(1), operation, ": ", name,
          " must have the shape of gate.");
}

SwigluParams swiglu_params(const Tensor& gate, const Tensor& up, const std::string& activation,
                           const char* operation) {
  require_activations(gate, operation, "gate");
  require_like(gate, gate, operation, "gate");
  require_like(up, gate, operation, "up");
  require(activation == "silu" || activation == "gelu_tanh", operation, ": there is no activation '", activation, "'.");
  return {gate.const_data_ptr(),
          up.const_data_ptr(),
          nullptr,
          gate.stride(0),
          up.stride(0),
          gate.size(1),
          activation == "silu" ? Activation::kSilu : Activation::kGeluTanh};
}

Tensor new_like(const Tensor& gate) { return torch::stable::new_empty(gate, {gate.size(0), gate.size(1)}); }

Tensor swiglu(const Tensor& gate, const Tensor& up, std::string activation) {
  const DType dtype = dtype_of(gate, "swiglu");
  SwigluParams params = swiglu_params(gate, up, activation, "swiglu");
  Tensor mid = new_like(gate);
  params.mid = mid.mutable_data_ptr();
  torch::stable::parallel_for(0, gate.numel(), kGrainEntries, [&](int64_t begin, int64_t end) {
    kernels().swiglu(params, dtype, begin, end);
  });
  return mid;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                           std::string activation) {
  const DType dtype = dtype_of(gate, "swiglu_backward");
  const SwigluParams forward = swiglu_params(gate, up, activation, "swiglu_backward");
  require_like(grad, gate, "swiglu_backward", "grad");
  Tensor by_gate = new_like(gate), by_up = new_like(gate);
  const SwigluBackwardParams params{forward, grad.const_data_ptr(), grad.stride(0), by_gate.mutable_data_ptr(),
                                    by_up.mutable_data_ptr()};
  torch::stable::parallel_for(0, gate.numel(), kGrainEntries, [&](int64_t begin, int64_t end) {
    kernels().swiglu_backward(params, dtype, begin, end);
  });
  return {by_gate, by_up};
}

void require_counted(const SwigluContrastParams& p, int64_t kept) {
  for (int64_t row = 0; row < p.rows; ++row) {
    bool counted = false;
    for (int64_t group = 0; group < p.groups; ++group) {
      const float count = p.counts[group * p.rows + row];
      // NaN, infinity and fractions fail; from 2^24 on, every float is a whole number.
      require(count >= 0 && count <= 3.0e38f && (count >= 16777216.0f || count == static_cast<int64_t>(count)),
              "swiglu_contrast: counts[", group, ", ", row, "] is ", count, ", not a whole number from 0.");
      counted = counted || count > 0;
    }
    const int64_t at = p.base_rows[row];
    require(at < kept && (at >= 0 || (at == -1 && !counted)), "swiglu_contrast: base_rows[", row, "] is ", at,
            ", but there are ", kept, " rows of base", counted ? " and a group counts the row." : ".");
  }
}

Tensor swiglu_contrast(const Tensor& gate, const Tensor& up, const Tensor& base, const Tensor& base_rows,
                       const Tensor& counts, Tensor sums, std::string activation) {
  const char* const name = "swiglu_contrast";
  const DType dtype = dtype_of(gate, name);
  SwigluParams forward = swiglu_params(gate, up, activation, name);
  require_activations(base, name, "base");
  require(base.scalar_type() == gate.scalar_type() && base.size(1) == gate.size(1),
          "swiglu_contrast: base must have the dtype and the neurons of gate.");
  for (const Tensor* tensor : {&base, &base_rows, &counts, static_cast<const Tensor*>(&sums)})
    require(tensor->is_cpu(), "swiglu_contrast: every tensor must be on the CPU.");
  require_index(base_rows, name, "base_rows");
  const int64_t rows = gate.size(0);
  require(base_rows.size(0) == rows, "swiglu_contrast: base_rows must have an entry for each row.");
  require(counts.dim() == 2 && counts.scalar_type() == ScalarType::Float && counts.is_contiguous() &&
              counts.size(1) == rows,
          "swiglu_contrast: counts must be contiguous float32 [group, row].");
  const int64_t groups = counts.size(0);
  require_sums(sums, groups, kSums, forward.neurons, name);
  SwigluContrastParams params{forward,
                              rows,
                              base.const_data_ptr(),
                              base.stride(0),
                              base_rows.const_data_ptr<int64_t>(),
                              counts.const_data_ptr<float>(),
                              sums.mutable_data_ptr<double>(),
                              groups};
  require_counted(params, base.size(0));
  Tensor mid = new_like(gate);
  params.forward.mid = mid.mutable_data_ptr();
  torch::stable::parallel_for(0, forward.neurons, kGrainNeurons, [&](int64_t first, int64_t last) {
    kernels().swiglu_contrast(params, dtype, first, last);
  });
  return mid;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CPU, m) {
  m.impl("swiglu_cpp", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward_cpp", TORCH_BOX(&swiglu_backward));
  m.impl("swiglu_contrast_cpp", TORCH_BOX(&swiglu_contrast));
}

}  // namespace pnlac
