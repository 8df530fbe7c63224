// What the contrast sums check of their tensors on any device, and the parameters of their kernels.
#pragma once
#include "../contrast.h"
#include "checks.h"

namespace pnlac {

inline ContrastParams contrast_params(const Tensor& base, const Tensor& tuned, const Tensor& rows, const Tensor& base_rows,
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

}  // namespace pnlac
