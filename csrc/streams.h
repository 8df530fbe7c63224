// Parameters of the read probe. No torch header here.
#pragma once
#include <cstdint>

namespace pnlac {

struct StreamsParams {
  const void* data;
  int64_t stream_bytes;  // from the start of one stream to that of the next
  int64_t streams;       // 1, 2, 4, 8 or 16
};

// What is read of one stream before the next: four cache lines.
constexpr int64_t kStretchBytes = 256;

}  // namespace pnlac
