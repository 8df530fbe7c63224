// How fast memory is read at best: several streams side by side, and next to nothing computed. Included by kernels.inl,
// inside a namespace.

template <int Streams>
int64_t read_stretches(const StreamsParams& p, int64_t first, int64_t last) {
  using I64 = Vector<int64_t>;
  I64 sums[4] = {};
  const char* at[Streams];
  for (int s = 0; s < Streams; ++s) at[s] = static_cast<const char*>(p.data) + s * p.stream_bytes;
  for (int64_t stretch = first; stretch < last; ++stretch)
#pragma GCC unroll 16
    for (int s = 0; s < Streams; ++s)
#pragma GCC unroll 16
      for (int64_t i = 0; i < kStretchBytes / PNLAC_VECTOR_BYTES; ++i)
        sums[i % 4] += load<I64>(at[s] + stretch * kStretchBytes + i * PNLAC_VECTOR_BYTES);
  const I64 sum = sums[0] + sums[1] + sums[2] + sums[3];
  int64_t total = 0;
  for (int lane = 0; lane < PNLAC_VECTOR_BYTES / 8; ++lane) total += sum[lane];
  return total;
}

int64_t read_streams(const StreamsParams& p, int64_t first, int64_t last) {
  switch (p.streams) {
    case 1: return read_stretches<1>(p, first, last);
    case 2: return read_stretches<2>(p, first, last);
    case 4: return read_stretches<4>(p, first, last);
    case 8: return read_stretches<8>(p, first, last);
    default: return read_stretches<16>(p, first, last);
  }
}
