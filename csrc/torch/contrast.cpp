// The contrast sums, as torch operators. Schemas are defined in Python (pnlac_fast/ops).
#include "../cpu/kernels.h"
#include "contrast_params.h"

namespace pnlac {
namespace {

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
