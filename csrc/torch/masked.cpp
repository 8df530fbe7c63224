// The masked optimizer steps, as torch operators. Schemas are defined in Python (pnlac_fast/ops).
#include "../masked.h"

#include <cmath>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "checks.h"

namespace pnlac {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kGrain = 16384;  // fewer entries than this are not worth another thread

DType dtype_of_weight(const Tensor& tensor, const std::string& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: throw std::runtime_error(name + " must be float32, bfloat16 or float16.");
  }
}

void require_like(const Tensor& tensor, const Tensor& param, const std::string& name) {
  bool same = tensor.dim() == param.dim();
  for (int64_t i = 0; same && i < param.dim(); ++i) same = tensor.size(i) == param.size(i);
  require(same, name, " must have the shape of its parameter.");
  require(tensor.is_contiguous() && tensor.is_cpu(), name, " must be contiguous and on the CPU.");
}

// The i-th parameter; `first` and `second` are empty where the rule has no such moment.
MaskedTensor masked_tensor(const std::string& operation, size_t i, const Tensors& params, const Tensors& grads,
                           const Tensors& first, const Tensors& second, const Tensors& keeps,
                           const std::vector<int64_t>& dims) {
  const auto name = [&](const char* what) { return operation + ": " + what + "[" + std::to_string(i) + "]"; };
  const Tensor &param = params[i], &grad = grads[i], &keep = keeps[i];
  MaskedTensor t{};
  require(param.dim() == 1 || param.dim() == 2, name("params"), " must be [row, column] or [row].");
  require_like(param, param, name("params"));
  require_like(grad, param, name("grads"));
  t.dtype = dtype_of_weight(param, name("params"));
  t.moments = t.dtype;
  require(grad.scalar_type() == param.scalar_type(), name("grads"), " must have the dtype of its parameter.");
  t.param = param.mutable_data_ptr();
  t.grad = grad.const_data_ptr();
  if (!first.empty()) {
    require_like(first[i], param, name("moments"));
    t.moments = dtype_of_weight(first[i], name("moments"));
    require(t.moments == t.dtype || t.moments == DType::kFloat32, name("moments"),
            " must have the dtype of their parameter or be float32.");
    t.first = first[i].mutable_data_ptr();
  }
  if (!second.empty()) {
    require_like(second[i], param, name("exp_avg_sqs"));
    require(second[i].scalar_type() == first[i].scalar_type(), name("exp_avg_sqs"),
            " must have the dtype of exp_avgs.");
    t.second = second[i].mutable_data_ptr();
  }
  require(dims[i] >= 0 && dims[i] < param.dim(), name("dims"), " is ", dims[i], ", which the parameter has not.");
  t.by_row = param.dim() == 2 && dims[i] == 0;
  t.rows = param.dim() == 2 ? param.size(0) : 1;
  t.columns = param.size(param.dim() - 1);
  require(keep.scalar_type() == ScalarType::Float && keep.dim() == 1 && keep.is_contiguous() && keep.is_cpu() &&
              keep.size(0) == param.size(dims[i]),
          name("keeps"), " must be contiguous float32 [", param.size(dims[i]), "] on the CPU.");
  t.keep = keep.const_data_ptr<float>();
  for (int64_t j = 0; j < keep.size(0); ++j) {
    require(t.keep[j] >= 0.0f && t.keep[j] <= 1.0f, name("keeps"), "[", j, "] is ", t.keep[j],
            ", which is not in [0, 1].");
    t.fractions = t.fractions || (t.keep[j] != 0.0f && t.keep[j] != 1.0f);
  }
  return t;
}

std::vector<MaskedTensor> masked_tensors(const std::string& operation, const Tensors& params, const Tensors& grads,
                                         const Tensors& first, const Tensors& second, const Tensors& keeps,
                                         const std::vector<int64_t>& dims) {
  for (const size_t count : {grads.size(), keeps.size(), dims.size(), first.empty() ? params.size() : first.size(),
                             second.empty() ? params.size() : second.size()})
    require(count == params.size(), operation, ": every list must be as long as params, ", params.size(), ".");
  std::vector<MaskedTensor> tensors;
  int64_t start = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    tensors.push_back(masked_tensor(operation, i, params, grads, first, second, keeps, dims));
    tensors.back().start = start;
    start += params[i].numel();
  }
  return tensors;
}

int64_t entries(const std::vector<MaskedTensor>& tensors) {
  return tensors.empty() ? 0 : tensors.back().start + tensors.back().rows * tensors.back().columns;
}

void masked_adamw(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                  const Tensors& keeps, const std::vector<int64_t>& dims, double lr, double beta1, double beta2,
                  double eps, double weight_decay, int64_t step) {
  require(exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(),
          "masked_adamw: exp_avgs and exp_avg_sqs must be as long as params.");
  require(step >= 1, "masked_adamw: step must be 1 or more, not ", step, ".");
  require(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "masked_adamw: beta1 and beta2 must be in [0, 1).");
  const auto tensors = masked_tensors("masked_adamw", params, grads, exp_avgs, exp_avg_sqs, keeps, dims);
  const double steps = static_cast<double>(step);
  const AdamWStep rule{static_cast<float>(1 - lr * weight_decay),
                       static_cast<float>(1 - beta1),
                       static_cast<float>(beta2),
                       static_cast<float>(1 - beta2),
                       static_cast<float>(lr / (1 - std::pow(beta1, steps))),
                       static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, steps))),
                       static_cast<float>(eps)};
  const auto count = static_cast<int64_t>(tensors.size());
  torch::stable::parallel_for(0, entries(tensors), kGrain, [&](int64_t begin, int64_t end) {
    kernels().masked_adamw(tensors.data(), count, rule, begin, end);
  });
}

void masked_sgd(const Tensors& params, const Tensors& grads, const Tensors& momenta, const Tensors& keeps,
                const std::vector<int64_t>& dims, double lr, double momentum, double dampening, double weight_decay,
                bool nesterov, bool first) {
  const SGDStep rule{static_cast<float>(lr),
                     static_cast<float>(momentum),
                     static_cast<float>(1 - dampening),
                     static_cast<float>(weight_decay),
                     nesterov,
                     first};
  require(momenta.size() == (rule.momentum == 0.0f ? 0 : params.size()),
          "masked_sgd: momenta must be as long as params, and empty where momentum is 0.");
  const auto tensors = masked_tensors("masked_sgd", params, grads, momenta, {}, keeps, dims);
  const auto count = static_cast<int64_t>(tensors.size());
  torch::stable::parallel_for(0, entries(tensors), kGrain, [&](int64_t begin, int64_t end) {
    kernels().masked_sgd(tensors.data(), count, rule, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CPU, m) {
  m.impl("masked_adamw_cpp", TORCH_BOX(&masked_adamw));
  m.impl("masked_sgd_cpp", TORCH_BOX(&masked_sgd));
}

}  // namespace pnlac
