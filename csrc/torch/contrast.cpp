// The contrast sums, as torch operators. Schemas are defined in Python (pnlac_fast/ops).
#include "../contrast.h"
#include "../cpu/kernels.h"
#include "checks.h"

namespace pnlac {
namespace {

ContrastParams contrast_params(const Tensor& base, const Tensor& tuned, const Tensor& rows, const Tensor& base_rows,
                               const Tensor& offsets, const Tensor& sums) {
  require_activations(base, "contrast", "base");
  require_activations(tuned, "contrast", "tuned");
  require(base.size(1) == tuned.size(1), "contrast: base and tuned must have the same neurons.");
  require(base.scalar_type() == tuned.scalar_type(), "contrast: base and tuned must have one dtype.");
  const int64_t neurons = base.size(1);
  require_index(rows, "contrast", "rows");
  require_index(base_rows, "contrast", "base_rows");
  require_index(offsets, "contrast", "offsets");
  require(base_rows.size(0) == rows.size(0), "contrast: base_rows must have an entry for each row.");
  const int64_t groups = offsets.size(0) - 1;
  require(groups >= 0, "contrast: offsets needs one entry more than there are groups.");
  require_sums(sums, groups, kSums, neurons, "contrast");
  return {base.const_data_ptr(),
          tuned.const_data_ptr(),
          base.stride(0),
          tuned.stride(0),
          rows.const_data_ptr<int64_t>(),
          base_rows.const_data_ptr<int64_t>(),
          offsets.const_data_ptr<int64_t>(),
          sums.mutable_data_ptr<double>(),
          groups,
          neurons};
}

void contrast(const Tensor& base, const Tensor& tuned, const Tensor& rows, const Tensor& base_rows,
              const Tensor& offsets, Tensor sums) {
  for (const Tensor* tensor : {&base, &tuned, &rows, &base_rows, &offsets, static_cast<const Tensor*>(&sums)})
    require(tensor->is_cpu(), "contrast: every tensor must be on the CPU.");
  const ContrastParams params = contrast_params(base, tuned, rows, base_rows, offsets, sums);
  require_offsets(params.offsets, params.groups, rows.size(0), "contrast");
  require_rows(params.rows, rows.size(0), tuned.size(0), "contrast", "rows");
  require_rows(params.base_rows, rows.size(0), base.size(0), "contrast", "base_rows");
  const DType dtype = dtype_of(base, "contrast");
  torch::stable::parallel_for(0, params.neurons, kGrainNeurons, [&](int64_t first, int64_t last) {
    kernels().contrast(params, dtype, first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CPU, m) { m.impl("contrast_cpp", TORCH_BOX(&contrast)); }

}  // namespace pnlac
