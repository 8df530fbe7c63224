// The read probe, as a torch operator. Its schema is defined here: nothing but a benchmark calls it.
#include "../streams.h"

#include <atomic>

#include "../cpu/kernels.h"
#include "checks.h"

namespace pnlac {
namespace {

// The sum of all int64 in `data`, so that a test can tell that everything was read.
int64_t read_streams(const Tensor& data, int64_t streams) {
  require(data.is_cpu() && data.dim() == 1 && data.is_contiguous() && data.scalar_type() == ScalarType::Long,
          "read_streams: data must be a contiguous vector of int64 on the CPU.");
  require(streams == 1 || streams == 2 || streams == 4 || streams == 8 || streams == 16,
          "read_streams: streams must be 1, 2, 4, 8 or 16.");
  const int64_t bytes = data.numel() * 8;
  require(bytes % (streams * kStretchBytes) == 0, "read_streams: data must be a multiple of ", streams * kStretchBytes,
          " bytes.");
  const StreamsParams params{data.const_data_ptr(), bytes / streams, streams};
  std::atomic<uint64_t> total = 0;
  torch::stable::parallel_for(0, params.stream_bytes / kStretchBytes, 64, [&](int64_t first, int64_t last) {
    total += static_cast<uint64_t>(kernels().read_streams(params, first, last));
  });
  return static_cast<int64_t>(total.load());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pnlac_fast, m) { m.def("read_streams_cpp(Tensor data, int streams) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(pnlac_fast, CPU, m) { m.impl("read_streams_cpp", TORCH_BOX(&read_streams)); }

}  // namespace pnlac
