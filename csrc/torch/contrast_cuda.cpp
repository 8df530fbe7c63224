// The contrast sums on CUDA, as a torch operator; empty where setup.py found no nvcc.
#ifdef PNLAC_WITH_CUDA
#include <dlfcn.h>

#include "../cuda/contrast.h"
#include "contrast_params.h"

namespace pnlac {
namespace {

// torch keeps libtorch_cuda.so to itself, so that only its own handle knows the function; and where torch has no CUDA
// this library must load all the same.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  require(function != nullptr, "contrast: this torch has no CUDA.");
  void* stream = nullptr;
  require(function(device, &stream) == AOTI_TORCH_SUCCESS, "contrast: torch gives no stream of device ", device, ".");
  return stream;
}

// The values of rows and offsets are on the device and are not looked at here: that would wait for it.
void contrast(const Tensor& base, const Tensor& tuned, const Tensor& rows, const Tensor& base_rows,
              const Tensor& offsets, Tensor sums) {
  const int32_t device = base.get_device_index();
  for (const Tensor* tensor : {&base, &tuned, &rows, &base_rows, &offsets, static_cast<const Tensor*>(&sums)})
    require(tensor->is_cuda() && tensor->get_device_index() == device,
            "contrast: every tensor must be on one CUDA device.");
  const ContrastParams params = contrast_params(base, tuned, rows, base_rows, offsets, sums);
  if (params.groups == 0 || params.neurons == 0) return;
  const DType dtype = dtype_of(base, "contrast");
  const cuda::Extent extent{base.size(0), tuned.size(0), rows.size(0)};
  // torch's allocator gives this back to work that is queued later on the same stream, so that it may be freed on return.
  Tensor scratch = torch::stable::new_empty(sums, {cuda::contrast_scratch(params, extent, dtype)});
  const char* error =
      cuda::contrast(params, extent, dtype, scratch.mutable_data_ptr<double>(), device, current_stream(device));
  require(error == nullptr, "contrast: CUDA says: ", error ? error : "");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CUDA, m) { m.impl("contrast_cuda", TORCH_BOX(&contrast)); }

}  // namespace pnlac
#endif
