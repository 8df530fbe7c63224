// The contrast sums, as torch operators. Schemas are defined in Python (pnlac_fast/ops).
#include "../contrast.h"
#include "../cpu/kernels.h"
#include "checks.h"

namespace pnlac {
namespace {

ContrastParams contrast_params(const Tensor& base, const Tensor& tuned, const Tensor& rows, const Tensor& offsets,
                               const Tensor& sums) {
  require(base.dim() == 2 && tuned.dim() == 2 && base.size(0) == tuned.size(0) && base.size(1) == tuned.size(1),
          "contrast: base and tuned must have one shape [row, neuron].");
  require(base.scalar_type() == tuned.scalar_type(), "contrast: base and tuned must have one dtype.");
  const int64_t neurons = base.size(1);
  require(neurons <= 1 || (base.stride(1) == 1 && tuned.stride(1) == 1),
          "contrast: the neurons of base and tuned must be contiguous.");
  require_index(rows, "contrast", "rows");
  require_index(offsets, "contrast", "offsets");
  const int64_t groups = offsets.size(0) - 1;
  require(groups >= 0, "contrast: offsets needs one entry more than there are groups.");
  require(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.dim() == 3 &&
              sums.size(0) == groups && sums.size(1) == kSums && sums.size(2) == neurons,
          "contrast: sums must be contiguous float64 of shape [group, 5, neuron].");
  return {base.const_data_ptr(),
          tuned.const_data_ptr(),
          base.stride(0),
          tuned.stride(0),
          rows.const_data_ptr<int64_t>(),
          offsets.const_data_ptr<int64_t>(),
          sums.mutable_data_ptr<double>(),
          groups,
          neurons};
}

// Only where rows and offsets live in host memory.
void require_in_range(const ContrastParams& p, int64_t row_count, int64_t selected) {
  require(p.offsets[0] == 0 && p.offsets[p.groups] == selected, "contrast: offsets must start at 0 and end at ",
          selected, ", the length of rows.");
  for (int64_t g = 0; g < p.groups; ++g)
    require(p.offsets[g] <= p.offsets[g + 1], "contrast: offsets must not decrease (group ", g, ").");
  for (int64_t i = 0; i < selected; ++i)
    require(p.rows[i] >= 0 && p.rows[i] < row_count, "contrast: rows[", i, "] is ", p.rows[i], ", but there are ",
            row_count, " rows.");
}

void contrast(const Tensor& base, const Tensor& tuned, const Tensor& rows, const Tensor& offsets, Tensor sums) {
  for (const Tensor* tensor : {&base, &tuned, &rows, &offsets, static_cast<const Tensor*>(&sums)})
    require(tensor->is_cpu(), "contrast: every tensor must be on the CPU.");
  const ContrastParams params = contrast_params(base, tuned, rows, offsets, sums);
  require_in_range(params, base.size(0), rows.size(0));
  const DType dtype = dtype_of(base, "contrast");
  constexpr int64_t kGrain = 256;  // fewer neurons than this are not worth another thread
  torch::stable::parallel_for(0, params.neurons, kGrain, [&](int64_t first, int64_t last) {
    kernels().contrast(params, dtype, first, last);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CPU, m) { m.impl("contrast_cpp", TORCH_BOX(&contrast)); }

}  // namespace pnlac
