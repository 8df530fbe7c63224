// The sums of one stream, as a torch operator.
#include "../contrast.h"
#include "../cpu/kernels.h"
#include "checks.h"

namespace pnlac {
namespace {

void moments(const Tensor& x, const Tensor& rows, const Tensor& offsets, Tensor sums) {
  for (const Tensor* tensor : {&x, &rows, &offsets, static_cast<const Tensor*>(&sums)})
    require(tensor->is_cpu(), "moments: every tensor must be on the CPU.");
  const DType dtype = dtype_of(x, "moments");
  require_activations(x, "moments", "x");
  require_index(rows, "moments", "rows");
  require_index(offsets, "moments", "offsets");
  const int64_t groups = offsets.size(0) - 1, neurons = x.size(1);
  require(groups >= 0, "moments: offsets needs one entry more than there are groups.");
  require_sums(sums, groups, 2, neurons, "moments");
  const MomentsParams params{x.const_data_ptr(),
                             x.stride(0),
                             rows.const_data_ptr<int64_t>(),
                             offsets.const_data_ptr<int64_t>(),
                             sums.mutable_data_ptr<double>(),
                             groups,
                             neurons};
  require_offsets(params.offsets, groups, rows.size(0), "moments");
  require_rows(params.rows, rows.size(0), x.size(0), "moments", "rows");
  torch::stable::parallel_for(0, neurons, kGrainNeurons, [&](int64_t first, int64_t last) {
    kernels().moments(params, dtype, first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CPU, m) { m.impl("moments_cpp", TORCH_BOX(&moments)); }

}  // namespace pnlac
